"""Hooks on a model that do nothing in its copies, and hooks that do not keep their object alive.

``copy.deepcopy`` and ``pickle`` include the hooks of a module. Ours hold objects that can't be copied or pickled, such
as a process group; and a copy has no session.
"""

import contextlib
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod


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


def weak(method: Callable[..., None]) -> Callable[..., None]:
    """Return a hook with a weak reference, for hooks that outlive a session or that the garbage collector can't see."""
    call = WeakMethod(method)

    def hook(*args: Any) -> None:
        if (found := call()) is not None:
            found(*args)

    return hook
