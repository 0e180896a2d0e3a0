"""Migration of state: to the next method, which all ranks agree on, and to another memory layout."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire._version import __version__
from thinwire.comm.collectives import Collective, ControlChannel
from thinwire.comm.texts import known_to_all
from thinwire.core import Memory, Role, State, ThinwireError, flat
from thinwire.core.capabilities import inherit, moved
from thinwire.core.interfaces import named
from thinwire.core.memory_capabilities import OwnsMomentum, inferred, take_buffer, traits_of
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker
from thinwire.methods.method import Method
from thinwire.session.momentum_transfer import averaged, averaged_buffer


def agree(channel: ControlChannel, lines: Sequence[tuple[str, str]]) -> None:
    """Raise a ``ThinwireError`` that names the first line that is not the same on all ranks. A collective call."""
    mine = hashlib.sha256(repr(lines).encode("utf-8", "backslashreplace")).hexdigest()
    if len(set(channel.exchange_text(mine))) == 1:
        return
    ranks = [text.split("\n") for text in channel.exchange_text("\n".join(f"{k}: {v}" for k, v in lines))]
    for line in range(max(map(len, ranks))):
        said = [rank[line] if line < len(rank) else "nothing" for rank in ranks]
        if other := next((r for r in range(len(said)) if said[r] != said[0]), None):
            raise known_to_all(
                ThinwireError(
                    f"ranks differ: rank 0 has {said[0]}; rank {other} has {said[other]}; give all ranks the same"
                )
            )


def describe(method: Method, units: Sequence[Unit], rest: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return all that must be the same on all ranks, for ``agree``."""
    described = [(f"unit {unit.name!r}", unit.describe()) for unit in units]
    texts = [("method", method.to_json()), *((key, str(value)) for key, value in rest.items())]
    return [("thinwire", __version__), *described, *texts]


def migrate(old: Unit | None, new: Unit, workers: Sequence[Worker], collective: Collective, timeout: float) -> None:
    """Migrate the state of the old unit, as far as the new unit has slots for it. A collective call.

    A replicated estimate migrates in both parts (local and shared) or not at all. If the new unit compresses a
    difference, no residual can be added to it: the residual is averaged over ranks and added to the next mean received.
    """
    was = [worker.local.get(new.name, TwoCopies()) for worker in workers]
    for worker in workers:
        worker.local[new.name] = new.fresh_local()
    if old is None:
        return
    gain = traits_of(old.memory).residual_gain / traits_of(new.memory).residual_gain
    packed, alone = new.init_packed(), old.replicated ^ new.replicated
    for worker, state in zip(workers, was, strict=True):
        left = {k: v for k, v in state.now.items() if k not in alone}
        _keep(left | inferred(new.memory, left), worker.local[new.name].now, old.memory, new.memory, gain)
    known = {k: v for k, v in old.shared.now.items() if k not in (alone | packed.keys())}
    _keep(known, new.shared.now, old.memory, new.memory)
    states = [worker.local[new.name].now for worker in workers] if new.replicated else []
    if pending := [state.pop("pending_residual") for state in states if "pending_residual" in state]:
        mean = averaged(pending, collective, timeout)
        earlier = new.shared.now.get("pending_residual")
        new.shared.now["pending_residual"] = mean if earlier is None else earlier + mean
    for key, value in inherit(new.method_compressor, old.shared.now, packed).items():
        new.shared.now[key], new.shared.next[key] = value.clone(), value.clone()
    same = set(old.shared.now) == set(new.shared.now) and set(was[0].now) == set(workers[0].local[new.name].now)
    if same or not (isinstance(old.memory, OwnsMomentum) and isinstance(new.memory, OwnsMomentum)):
        return
    # momentum in another form migrates as SGD's momentum buffer, averaged over ranks
    before = [Worker(worker.rank, local={old.name: state}) for worker, state in zip(workers, was, strict=True)]
    buffer = averaged_buffer(old, before, collective, timeout)
    if buffer is not None:
        for worker in workers:
            take_buffer(new.memory, buffer, worker.local[new.name].now, new.shared.now)


def slot_for(key: str, was: Memory, memory: Memory, fresh: State) -> str | None:
    """Return the slot of ``fresh``, a state of ``memory``, that goes on with the slot ``key`` of the memory ``was``.

    It is the slot of the same name and role. A pending residual also fits the pending slot; a memory that has none
    sends it with the next step, as "pending_residual". Nothing goes on with any other slot: None.
    """
    before, after = was.slots.get(key), memory.slots.get(key)
    if key in fresh and (before is None or after is None or before.role is after.role):
        return key
    if key in named(was, Role.PENDING) or key == "pending_residual":
        return next((slot for slot in named(memory, Role.PENDING) if slot in fresh), "pending_residual")
    return None


def _keep(old: State, new: State, was: Memory, memory: Memory, gain: float = 1.0) -> None:
    """Fill the slots of ``new`` with those of ``old``, see ``slot_for``; ``gain`` scales a pending residual."""
    pending = named(was, Role.PENDING) | {"pending_residual"}
    for key, value in old.items():
        if (kept := slot_for(key, was, memory, new)) is not None:
            value = value * gain if key in pending and gain != 1.0 else value
            if (key != kept or key == "pending_residual") and kept in new:
                value = value + new[kept]
            new[kept] = value.to(new[kept].dtype) if kept in new else value


@torch.no_grad()
def follow(
    units: Sequence[Unit],
    workers: Sequence[Worker],
    strides: Mapping[str, tuple[int, ...]],
    optimizer: Callable[[Unit], Mapping[str, Any]],
) -> None:
    """Lay out the state of some units, element by element, as their parameters are now.

    ``strides`` are their earlier ones; ``optimizer`` returns a unit's optimizer state, if that is part of the method.
    """
    for unit in units:
        like, packed = unit.own, unit.init_packed()
        for state in (state for both in unit.states(workers) for state in (both.now, both.next)):
            for key, value in state.items():
                if key not in packed and value.shape == like.shape:
                    state[key] = _laid(value, like)
        for value in optimizer(unit).values():
            if isinstance(value, Tensor) and value.shape == like.shape:
                value.data = _laid(value, like)
        if packed:
            places = torch.arange(like.numel(), device=like.device).as_strided(like.shape, strides[unit.name])
            order = flat(_laid(places, like))
            for state in (unit.shared.now, unit.shared.next):
                before = {key: state[key] for key in packed}
                state.update(moved(unit.method_compressor, before, packed, order))


def _laid(value: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
