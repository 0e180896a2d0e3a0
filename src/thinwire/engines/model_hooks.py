"""Hooks on a model that do nothing in its copies.

``copy.deepcopy`` and ``pickle`` include the hooks of a module. Ours hold objects that can't be copied or pickled, such
as a process group; and a copy has no session.
"""

import contextlib
from collections.abc import Callable
from typing import Any


class Hook:
    """A hook that calls ``call``; in a copy or a pickle it is replaced by a function that does nothing.

    That function is from the standard library, so a pickled model can be read where thinwire is not installed.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")
