"""Hooks on a model that no copy of it has.

``copy.deepcopy`` and ``pickle`` take the hooks of a module along, and what ours hold, as a process group, can't be
copied or pickled. A copy has no session.
"""

import contextlib
from collections.abc import Callable
from typing import Any


class Hook:
    """Calls ``call``; what stands in its place in a copy, or in a pickle, takes anything and does nothing.

    That is a name of the standard library, so a pickled model can be read where thinwire is not installed.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")
