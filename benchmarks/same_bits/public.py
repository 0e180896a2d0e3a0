"""The public names of whatever revision is here, and the only place where another name for one of them stands."""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import thinwire

OTHERWISE: dict[str, tuple[str, ...]] = {
    "block": ("bucket",),
    "clip_rms": ("clip",),
    "decoupled_momentum": ("demo",),
    "emulate_link": ("link",),
    "ranks_per_node": ("nodes",),
    "second_stage_density_ratio": ("second",),
    "state_dtype": ("state",),
    "terngrad": ("ternary",),
}
"""Names of the package, and of options, in other revisions."""
PLACES = ("compressors", "memories", "methods", "optim", "policies")
"""The packages that hold what the top does not."""
SHARDED = ("replicate", "reduce_scatter", "all_gather")
"""Options of ``attach`` that stand together in ``Fsdp2Options``, or each for itself."""


class Public:
    """``public.topk(0.01)`` is ``thinwire.topk(0.01)``, whatever this revision calls it, and wherever it stands."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        for place in (thinwire, *(_package(name) for name in PLACES)):
            for other in (name, *OTHERWISE.get(name, ())):
                found = getattr(place, other, None)
                if found is not None and not inspect.ismodule(found):
                    return partial(_call, found)
        raise AttributeError(f"thinwire has no {name} here; benchmarks.same_bits.public is the place for another name")


def _package(name: str) -> Any:
    return importlib.import_module(f"thinwire.{name}") if hasattr(thinwire, name) else None


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    known = inspect.signature(function).parameters
    if "fsdp2" in known and (sharded := {key: options.pop(key) for key in SHARDED if key in options}):
        options["fsdp2"] = thinwire.Fsdp2Options(**sharded)
    everything = any(one.kind is one.VAR_KEYWORD for one in known.values())
    older = {name: next((o for o in OTHERWISE.get(name, ()) if o in known), name) for name in options}
    return function(
        *args, **{name if name in known or everything else older[name]: value for name, value in options.items()}
    )


public = Public()
