"""Readers of checkpoints without trust: whatever is not what a session wrote is an error that says what it is."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor

from thinwire.compressors.cast import DTYPES
from thinwire.core import ThinwireError, checks
from thinwire.core.sharding import shape_of
from thinwire.exchange.units import Unit

KEYS = ("version", "world", "step", "method", "plan", "local", "shared")
UNREADABLE = (ValueError, KeyError, TypeError, RecursionError)
"""The errors of JSON that is not as it was written."""


def read_tensor(value: Any, what: str, dtypes: Mapping[str, torch.dtype] = DTYPES) -> Tensor:
    """Return an ordinary tensor of one of these dtypes, or the local part of a DTensor."""
    tensor: Any = value.to_local() if isinstance(value, DTensor) else value
    ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not ordinary or tensor.is_meta or tensor.is_nested or tensor.dtype not in dtypes.values():
        kind = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ThinwireError(f"{what} in the checkpoint is {kind}, not a tensor of {', '.join(dtypes)}; it is damaged")
    if tensor.nbytes > tensor.untyped_storage().nbytes():  # expanded: one number that claims to be a million
        raise ThinwireError(
            f"{what} in the checkpoint is of shape {tuple(tensor.shape)}, with less in it; it is damaged"
        )
    return tensor.detach()


def read_mapping(state: Any, key: str) -> Mapping[str, Any]:
    value = state.get(key) if isinstance(state, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not isinstance(value, Mapping):
        raise ThinwireError(f"the checkpoint has no {key!r}; it is damaged, or not of thinwire")
    if wrong := [name for name in cast(Mapping[Any, Any], value) if not isinstance(name, str)]:
        raise ThinwireError(f"the checkpoint's {key!r} has {shown(wrong[0])} where a name should be; it is damaged")
    return cast(Mapping[str, Any], value)


def read_integer(state: Any, key: str, least: int) -> int:
    value: object = cast(Mapping[Any, Any], state).get(key) if isinstance(state, Mapping) else None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**62:
        raise ThinwireError(f"the checkpoint's {key} is {shown(value)}, not a number from {least} on; it is damaged")
    return value


def shown(value: object, length: int = 40) -> str:
    """Return the start of the value's text, or its type's name if printing it may fail (huge ints, deep lists)."""
    small = value is None or isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 2**128)
    return str(value)[:length] if small else type(value).__name__


def read_states(given: Any) -> Sequence[Mapping[str, Any]]:
    """Return the states, one or those of all ranks, if a session's ``state_dict()`` wrote them."""
    if isinstance(given, (str, bytes)) or hasattr(given, "__fspath__"):
        raise ThinwireError(
            f"state is the path {checks.shown(given)}; use wire.load(folder) for a folder of dcp.save, and "
            "wire.load_state_dict(torch.load(file, weights_only=True)) for a file"
        )
    each: Any = [given] if isinstance(given, Mapping) else given
    states = cast("Sequence[Any]", each if isinstance(each, Sequence) else ())
    for one in states:
        if isinstance(one, Mapping):
            _check_foreign(cast("Mapping[Any, Any]", one))
    if not states or not all(isinstance(one, Mapping) for one in states):
        raise ThinwireError(
            f"a checkpoint is a dict, or a list of those of all ranks, not {shown(cast(object, given))}"
        )
    return states


def _check_foreign(given: Mapping[Any, Any]) -> None:
    if any(key in given for key in KEYS):
        return  # a thinwire state, perhaps damaged
    if not given:
        raise ThinwireError("this state is empty, so it is no state of thinwire; give what wire.state_dict() returned")
    if holding := [key for key, value in given.items() if isinstance(value, Mapping) and "plan" in value]:
        key = checks.shown(holding[0])
        raise ThinwireError(
            f"this is no state of thinwire, but a checkpoint that has one under {key}; give state[{key}]"
        )
    names = ", ".join(checks.shown(key) for key in list(given)[:3])
    kind = "an optimizer's" if {"state", "param_groups"} <= given.keys() else "a model's, or another's"
    raise ThinwireError(
        f"this is no state of thinwire, but {kind} (it has {names}); give what wire.state_dict() returned"
    )


def check_plan(plan: Mapping[str, Any], units: Sequence[Unit]) -> None:
    """Raise a ``ThinwireError`` if the checkpoint's parameters have other names or shapes than the model's."""
    for unit in units:
        shape = json.dumps(list(shape_of(unit.param)))
        if unit.name not in plan:
            raise ThinwireError(f"the checkpoint has no unit {unit.name!r} (of shape {shape}); it is of another model")
        try:
            there: object = json.loads(plan[unit.name])["shape"]
        except UNREADABLE:
            there = None
        if not isinstance(there, list):
            found = shown(plan[unit.name], 200)
            raise ThinwireError(
                f"unit {unit.name!r} has shape {shape} here, and {found} in the checkpoint, whose plan can't be read"
            )
        if json.dumps(there) != shape:
            raise ThinwireError(
                f"unit {unit.name!r} has shape {shape} here, and {json.dumps(there)} in the checkpoint; it is of "
                "another model"
            )
    if extra := [name for name in plan if name not in {unit.name for unit in units}]:
        raise ThinwireError(f"the checkpoint has a unit {extra[0]!r} that the model has not")


def read_folder(folder: str | Path, key: str) -> dict[str, Any]:
    """Return the state that ``torch.distributed.checkpoint`` saved there under ``key``, with the rows of all ranks.

    The folder's metadata is a torch pickle, which can run code: load only folders that you trust. (Files that
    ``torch.load(weights_only=True)`` reads, and frames, need no trust.)
    """
    try:
        metadata = cast(Any, FileSystemReader(folder).read_metadata())
        there = sum(file.stat().st_size for file in Path(folder).iterdir())
        wanted: dict[str, Any] = {}
        for name, entry in metadata.state_dict_metadata.items():
            if name.startswith(f"{key}."):
                tensor = hasattr(entry, "size")
                if tensor and entry.size.numel() * entry.properties.dtype.itemsize > there:
                    raise ValueError(f"{name} is said to have {entry.size.numel()} elements in {there} bytes of files")
                wanted[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu") if tensor else 0
        if not wanted:
            raise KeyError(f"it has {sorted({name.partition('.')[0] for name in metadata.state_dict_metadata})}")
        with warnings.catch_warnings():  # it warns that it loads in a single process, as intended here
            warnings.simplefilter("ignore")
            cast(Any, dcp).load(wanted, storage_reader=FileSystemReader(folder), no_dist=True)
        state: dict[str, Any] = {}
        for name, value in wanted.items():
            place: Any = state
            *inner, last = metadata.planner_data[name][1:]
            for part in inner:
                place = place.setdefault(part, {})
            place[last] = value
        for kind in ("local", "shared"):  # empty dicts are not saved
            state[kind] = {name: state.get(kind, {}).get(name, {}) for name in state["plan"]}
        state["file"] = str(folder)
    except (Exception, CheckpointException) as error:  # a damaged folder can make torch raise anything
        raise ThinwireError(f"no checkpoint under {key!r} can be read from {folder}: {error!r:.300}") from error
    return state
