"""What a session remembers, to a checkpoint and back, also at another world size or under another method.

The state is a dict of tensors, ints and strings, so ``torch.load(weights_only=True)`` reads it::

    version, world, step, installed_at    ints
    method                                the method in JSON
    plan      {unit: JSON of its shape, compressor and memory}
    local     {unit: {key: tensor [world, *shape]}}    a DTensor of which each rank holds its row
    shared    {unit: {key: tensor [*shape]}}           equal on all ranks

Rows are DTensors since ``torch.distributed.checkpoint`` takes plain tensors of equal names for copies of each other: it
would save one rank's residual and give it to all.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor

from thinwire.compressors import catalogue
from thinwire.core import State, ThinwireError, norm
from thinwire.units import Unit, Worker

VERSION = 1
OnWorldChange: TypeAlias = Literal["error", "fold", "reset"]
_load: Callable[..., None] = cast(Any, dcp).load
Rows: TypeAlias = Callable[[Tensor], Tensor]
"""From this rank's tensor to the one of which it is a row."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint that has been read and found right, to be put in place by the session."""

    step: int
    installed_at: int
    local: dict[str, State]
    shared: dict[str, State]
    notes: list[str]


def save(units: Sequence[Unit], worker: Worker, rows: Rows, clock: Mapping[str, int], method: str) -> dict[str, Any]:
    """The state of one rank. Everything is copied: what loads in place writes into these tensors."""
    return {
        "version": VERSION,
        **clock,
        "method": method,
        "plan": {unit.name: plan_of(unit) for unit in units},
        "local": {u.name: {key: rows(t.clone()) for key, t in worker.local[u.name].now.items()} for u in units},
        "shared": {unit.name: {key: t.clone() for key, t in unit.shared.now.items()} for unit in units},
    }


def plan_of(unit: Unit) -> str:
    parts = (catalogue.to_json(unit.method_compressor), catalogue.to_json(unit.memory))
    return json.dumps({"shape": list(unit.param.shape), "compressor": parts[0], "memory": parts[1]}, sort_keys=True)


def restore(
    states: Sequence[Mapping[str, Any]], units: Sequence[Unit], rank: int, world: int, on_world_change: OnWorldChange
) -> Restored:
    """Check a checkpoint against the running session, and make its states.

    Args:
        states: that of this rank; or those of all ranks of the saved world, in their order, to fold them.

    Raises:
        ThinwireError: it is damaged, or of another plan or world size.
    """
    if on_world_change not in ("error", "fold", "reset"):
        raise ThinwireError(f"on_world_change is {on_world_change!r}; choose 'error', 'fold' or 'reset'")
    if not states:
        raise ThinwireError("there is no state to load")
    state = states[rank] if len(states) == world and len(states) > 1 else states[0]
    saved_world = _integer(state, "world", 1)
    if (version := _integer(state, "version", 1)) != VERSION:
        raise ThinwireError(f"the checkpoint has version {version}; this thinwire reads version {VERSION}")
    clock = _integer(state, "step", 0), _integer(state, "installed_at", 0)
    if saved_world != world and on_world_change == "error":
        raise ThinwireError(
            f"the checkpoint was saved by {saved_world} workers, and {world} load it; choose on_world_change='fold' to "
            "give each of them the mean of what was pending, or 'reset' to drop it"
        )
    plan, local, shared = (_mapping(state, key) for key in ("plan", "local", "shared"))
    _check_plan(plan, units)
    notes: list[str] = []
    new_local: dict[str, State] = {}
    new_shared: dict[str, State] = {}
    for unit in units:
        saved = _mapping(local, unit.name)
        if saved_world == world:
            mine = {key: _row(value, unit, key, rank, saved_world) for key, value in saved.items()}
        else:
            mine = {key: _mean_row(states, unit, key, saved_world) for key in saved}
            if on_world_change == "reset":
                if "residual" in mine:
                    size = float(norm([mine["residual"]]))
                    notes.append(f"{unit.name}: a mean pending update of norm {size:.3g} was dropped")
                mine = {key: value for key, value in mine.items() if key not in ("residual", "carried")}
        gain = _gain(plan[unit.name], unit)
        fresh = unit.fresh(unit.memory.init).now
        new_local[unit.name] = _fit(mine, fresh, gain, unit, notes)
        both = {key: _plain(value, unit, key) for key, value in _mapping(shared, unit.name).items()}
        new_shared[unit.name] = _fit(both, unit.fresh(unit.memory.init_shared).now, 1.0, unit, notes)
    return Restored(*clock, new_local, new_shared, notes)


def read_folder(folder: str | Path, key: str) -> dict[str, Any]:
    """The state that ``torch.distributed.checkpoint`` saved there under ``key``, with all rows of all ranks.

    Raises:
        ThinwireError: it can't be read.
    """
    try:
        metadata = cast(Any, FileSystemReader(folder).read_metadata())
        wanted: dict[str, Any] = {}
        for name, entry in metadata.state_dict_metadata.items():
            if name.startswith(f"{key}."):
                tensor = hasattr(entry, "size")
                wanted[name] = torch.empty(entry.size, dtype=entry.properties.dtype) if tensor else 0
        with warnings.catch_warnings():  # it says that it reads alone, which is what we ask for
            warnings.simplefilter("ignore")
            _load(wanted, storage_reader=FileSystemReader(folder), no_dist=True)
        state: dict[str, Any] = {}
        for name, value in wanted.items():
            place: Any = state
            *inner, last = metadata.planner_data[name][1:]
            for part in inner:
                place = place.setdefault(part, {})
            place[last] = value
        for kind in ("local", "shared"):  # what is empty leaves no trace there
            state[kind] = {name: state.get(kind, {}).get(name, {}) for name in state["plan"]}
    except (Exception, CheckpointException) as error:  # whatever a damaged folder makes torch raise
        raise ThinwireError(f"no checkpoint under {key!r} can be read from {folder}: {error!r:.300}") from error
    return state


def _fit(saved: State, fresh: State, gain: float, unit: Unit, notes: list[str]) -> State:
    """What the memory has a place for; a residual without one is carried to the next step."""
    fitted = dict(fresh)
    for key, value in saved.items():
        pending = key in ("residual", "carried")
        place = key if key in fresh else "carried" if pending else None
        if place is None:
            notes.append(f"{unit.name}: the checkpoint's {key} has no place in the present method and was dropped")
        else:
            like = fresh.get(place, next(iter(saved.values())))
            fitted[place] = (value * gain if pending and gain != 1.0 else value).to(like.dtype)
    for key in fresh.keys() - saved.keys():
        notes.append(f"{unit.name}: {key} is not in the checkpoint and starts from zero")
    return fitted


def _gain(plan: Any, unit: Unit) -> float:
    """From the units of the saved residual to those of the present memory."""
    try:
        saved = catalogue.from_json(json.loads(plan)["memory"], catalogue.MEMORIES)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ThinwireError(f"{unit.name}: the checkpoint's plan can't be read: {error!r}") from error
    return saved.residual_gain / unit.memory.residual_gain


def _check_plan(plan: Mapping[str, Any], units: Sequence[Unit]) -> None:
    for unit in units:
        shape = json.dumps(list(unit.param.shape))
        if unit.name not in plan:
            raise ThinwireError(f"the checkpoint has no unit {unit.name!r} (of shape {shape}); it is of another model")
        if not isinstance(plan[unit.name], str) or f'"shape": {shape}' not in plan[unit.name]:
            raise ThinwireError(
                f"unit {unit.name!r} has shape {shape} here, and {plan[unit.name]!s:.200} in the checkpoint"
            )
    if extra := [name for name in plan if name not in {unit.name for unit in units}]:
        raise ThinwireError(f"the checkpoint has a unit {extra[0]!r} that the model has not")


def _row(value: Any, unit: Unit, key: str, rank: int, world: int) -> Tensor:
    """This rank's row, from a DTensor or from all rows."""
    tensor = _tensor(value, unit, key)
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.shape[:1] == (world,) and world > 1:
        tensor = tensor[rank : rank + 1]
    return _plain(tensor[0] if tensor.ndim else tensor, unit, key)


def _mean_row(states: Sequence[Mapping[str, Any]], unit: Unit, key: str, world: int) -> Tensor:
    """The mean over all rows, which keeps the mean pending update whoever holds it."""
    values = [_mapping(_mapping(state, "local"), unit.name).get(key) for state in states]
    parts = [_tensor(value, unit, key) for value in values]
    stacked = torch.cat([p.to_local() if isinstance(p, DTensor) else p for p in parts])
    if stacked.shape[0] != world:
        raise ThinwireError(
            f"{unit.name}: {stacked.shape[0]} of {world} rows are here; to change the world size, load all of them, "
            "with wire.load(checkpoint folder), or give load_state_dict a list of all ranks' states"
        )
    return _plain(stacked.double().mean(0).to(stacked.dtype), unit, key)


def _plain(value: Any, unit: Unit, key: str) -> Tensor:
    tensor = _tensor(value, unit, key)
    if tensor.shape != unit.param.shape or not tensor.is_floating_point():
        raise ThinwireError(
            f"{unit.name}: the checkpoint's {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"not of {tuple(unit.param.shape)}"
        )
    if not bool(tensor.isfinite().all()):
        raise ThinwireError(f"{unit.name}: the checkpoint's {key} is not finite")
    return torch.empty_like(unit.param, dtype=tensor.dtype).copy_(tensor)


def _tensor(value: Any, unit: Unit, key: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ThinwireError(f"{unit.name}: the checkpoint's {key} is {type(value).__name__}, not a tensor")
    return value


def _mapping(state: Any, key: str) -> Mapping[str, Any]:
    value = state.get(key) if isinstance(state, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not isinstance(value, Mapping):
        raise ThinwireError(f"the checkpoint has no {key!r}; it is damaged, or not of thinwire")
    return cast(Mapping[str, Any], value)


def _integer(state: Any, key: str, least: int) -> int:
    value = state.get(key) if isinstance(state, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**62:
        raise ThinwireError(f"the checkpoint's {key} is {value!s:.40}, not a number from {least} on; it is damaged")
    return value
