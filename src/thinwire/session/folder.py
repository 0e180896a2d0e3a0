"""Reads a whole ``torch.distributed.checkpoint`` folder in one process."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from thinwire.core.errors import ThinwireError

_load: Callable[..., None] = cast(Any, dcp).load


def read_folder(folder: str | Path, key: str) -> dict[str, Any]:
    """Return the state that ``torch.distributed.checkpoint`` saved there under ``key``, with the rows of all ranks.

    The folder's metadata is a torch pickle, which can run code: load only folders that you trust. (Files that
    ``torch.load(weights_only=True)`` reads, and frames, need no trust.)

    Raises:
        ThinwireError: it can't be read.
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
            _load(wanted, storage_reader=FileSystemReader(folder), no_dist=True)
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
