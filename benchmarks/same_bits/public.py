"""The public names of whatever revision is here, and the only place where another name for one of them stands."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import thinwire

OTHERWISE: dict[str, tuple[str, ...]] = {"terngrad": ("ternary",), "decoupled_momentum": ("demo",)}
"""What a name of the package, or an option, is called in other revisions."""


class Public:
    """``public.topk(0.01)`` is ``thinwire.topk(0.01)``, whatever this revision calls it."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        for other in (name, *OTHERWISE.get(name, ())):
            if hasattr(thinwire, other):
                return partial(_call, getattr(thinwire, other))
        raise AttributeError(f"thinwire has no {name} here; benchmarks.same_bits.public is the place for another name")


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    known = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return function(*args, **options)
    renamed = {
        next((other for other in (name, *OTHERWISE.get(name, ())) if other in known), name): value
        for name, value in options.items()
    }
    return function(*args, **renamed)


public = Public()
