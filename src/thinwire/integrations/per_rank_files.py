"""Per-rank files next to a checkpoint that a framework writes once for all ranks.

A file is ``thinwire-rank<r>-of-<world>.pt``. It holds that rank's ``Session.state_dict()`` as plain tensors, so that
``torch.load(weights_only=True)`` reads it without a process group.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinwire import Session, ThinwireError
from thinwire.comm.control import Together
from thinwire.core import files
from thinwire.session.checkpoint import OnWorldChange
from thinwire.session.migrate import agree

NAME = re.compile(r"thinwire-rank(\d+)-of-(\d+)\.pt")


def save(wire: Session, folder: str | Path) -> None:
    """Write this rank's state next to the checkpoint. Every rank calls it; no rank waits for another.

    Args:
        wire: the session that ``attach`` returned.
        folder: a folder on a filesystem of this machine; created if missing.

    Raises:
        ThinwireError: the folder is not a path of a filesystem, or the file can't be written.
    """
    place, channel = _local(folder), wire.collective.everyone
    path = place / _name(channel.rank, channel.world)
    for killed in files.leftovers(path):
        killed.unlink(missing_ok=True)
    state = _plain(wire.state_dict())
    files.write(path, lambda file: torch.save(state, file))
    for other, world in _files(place).items():
        if world != channel.world:  # from an earlier run with another number of ranks
            (place / other).unlink(missing_ok=True)


def load(wire: Session, folder: str | Path, on_world_change: OnWorldChange = "error", strict: bool = True) -> None:
    """Load the files next to a checkpoint. A collective call.

    Args:
        wire: the session that ``attach`` returned.
        folder: the folder that ``save`` wrote to.
        on_world_change: as for ``Session.load_state_dict``, if another number of ranks saved the files; with
            "fold" and "reset" every rank reads all files.
        strict: True to raise an error if there are no files; False to keep the session as it is, with a ledger note.

    Raises:
        ThinwireError: there are no files, or one is missing or damaged, or as ``Session.load_state_dict``.
    """
    channel = wire.collective.everyone
    with Together(wire.collective, f"step {wire.step}: loading a checkpoint") as together:
        with together.alone():  # all ranks load, or none
            given = _read(_local(folder), channel.rank, channel.world)
            if given is None and strict:
                raise ThinwireError(
                    f"there is no thinwire-rank*.pt in {folder}; the checkpoint was saved without an attached session. "
                    "Begin with nothing remembered by strict=False, or give the folder that has them"
                )
        agree(channel, [("checkpoint", "none" if given is None else "there")])
    if given is None:
        wire.ledger.note(f"step {wire.step}: nothing remembered was found in {folder}")
        return
    wire.load_state_dict(given, on_world_change)


def remove(wire: Session, folder: str | Path) -> None:
    """Remove this rank's file, and the folder if that was the last one."""
    place, channel = _local(folder), wire.collective.everyone
    (place / _name(channel.rank, channel.world)).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other ranks' files are still there
        place.rmdir()


def _read(folder: Path, rank: int, world: int) -> Any:
    """Read this rank's state; the states of all ranks if another number of ranks saved them; None if no files exist."""
    worlds = set(_files(folder).values())
    if not worlds:
        return None
    if world in worlds:
        return _open(folder / _name(rank, world))
    if len(worlds) > 1:
        raise ThinwireError(
            f"{folder} has the files of {' and of '.join(map(str, sorted(worlds)))} ranks, and {world} load them; "
            "remove those that are not of this checkpoint"
        )
    saved = worlds.pop()
    return [_open(folder / _name(other, saved)) for other in range(saved)]


def _name(rank: int, world: int) -> str:
    return f"thinwire-rank{rank}-of-{world}.pt"


def _open(path: Path) -> Any:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ThinwireError(
            f"{path.name} is missing in {path.parent}, where other ranks' files are; on machines that share no "
            "filesystem, every rank needs its own file where it runs, and all of them to change the number of ranks"
        ) from error
    except Exception as error:  # torch raises many types for a damaged file
        raise ThinwireError(f"{path} can't be read, it is damaged: {error!r:.200}") from error
    return {**cast(dict[str, Any], state), "file": str(path)} if isinstance(state, dict) else state


def _files(folder: Path) -> dict[str, int]:
    """Return the world size of each file, by the file's name."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = {name: NAME.fullmatch(name) for name in names}
    return {name: int(match[2]) for name, match in found.items() if match}


def _local(folder: str | Path) -> Path:
    if "://" in str(folder):
        raise ThinwireError(
            f"{folder} is not on a filesystem of this machine, and every rank writes its file beside the checkpoint; "
            "save to a local or mounted folder"
        )
    return Path(folder)


def _plain(state: Any) -> Any:
    """Replace DTensors by their local tensors, so that the file does not depend on a device mesh."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in cast(dict[str, Any], state).items()}
    return state.to_local() if isinstance(state, DTensor) else cast(Tensor | int | str, state)
