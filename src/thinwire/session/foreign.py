"""Errors for objects that are not a thinwire state: they name what was given and what to pass instead."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from thinwire.core.checks import shown
from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import shape_of
from thinwire.exchange.units import Unit
from thinwire.session import untrusted

KEYS = ("version", "world", "step", "method", "plan", "local", "shared")


def check_state(given: Any) -> None:
    """Check that a session's ``state_dict()`` wrote this.

    Raises:
        ThinwireError: it did not.
    """
    if isinstance(given, (str, bytes)) or hasattr(given, "__fspath__"):
        raise ThinwireError(
            f"state is the path {shown(given)}; use wire.load(folder) for a folder of dcp.save, and "
            "wire.load_state_dict(torch.load(file, weights_only=True)) for a file"
        )
    if isinstance(given, Mapping):
        _check_mapping(cast("Mapping[Any, Any]", given))
    elif isinstance(given, Sequence):
        for one in cast("Sequence[Any]", given):
            if isinstance(one, Mapping):
                _check_mapping(cast("Mapping[Any, Any]", one))


def _check_mapping(given: Mapping[Any, Any]) -> None:
    if any(key in given for key in KEYS):
        return  # a thinwire state, perhaps damaged
    if not given:
        raise ThinwireError("this state is empty, so it is no state of thinwire; give what wire.state_dict() returned")
    inside = [key for key, value in given.items() if isinstance(value, Mapping) and "plan" in value]
    if inside:
        key = shown(inside[0])
        raise ThinwireError(
            f"this is no state of thinwire, but a checkpoint that has one under {key}; give state[{key}]"
        )
    names = ", ".join(shown(key) for key in list(given)[:3])
    kind = "an optimizer's" if {"state", "param_groups"} <= given.keys() else "a model's, or another's"
    raise ThinwireError(
        f"this is no state of thinwire, but {kind} (it has {names}); give what wire.state_dict() returned"
    )


def check_plan(plan: Mapping[str, Any], units: Sequence[Unit]) -> None:
    """Check that the checkpoint is of this model.

    Raises:
        ThinwireError: its parameters have other names or shapes.
    """
    for unit in units:
        shape = json.dumps(list(shape_of(unit.param)))
        if unit.name not in plan:
            raise ThinwireError(f"the checkpoint has no unit {unit.name!r} (of shape {shape}); it is of another model")
        there = _shape_of(plan[unit.name])
        if there is None:
            found = untrusted.shown(plan[unit.name], 200)
            raise ThinwireError(
                f"unit {unit.name!r} has shape {shape} here, and {found} in the checkpoint, whose plan can't be read"
            )
        if there != shape:
            raise ThinwireError(
                f"unit {unit.name!r} has shape {shape} here, and {there} in the checkpoint; it is of another model"
            )
    if extra := [name for name in plan if name not in {unit.name for unit in units}]:
        raise ThinwireError(f"the checkpoint has a unit {extra[0]!r} that the model has not")


def _shape_of(plan: Any) -> str | None:
    """Return the unit's shape in JSON from its plan in a checkpoint; None if the plan has none."""
    try:
        shape: object = json.loads(plan)["shape"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return json.dumps(shape) if isinstance(shape, list) else None
