"""Migration from one method to the next: the ranks agree on it, and each unit's state moves over."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

from thinwire._version import __version__
from thinwire.comm.collectives import Collective, ControlChannel
from thinwire.comm.control import Together
from thinwire.comm.texts import known_to_all
from thinwire.core.capabilities import inherit
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Memory, Role, State, named
from thinwire.core.memory_capabilities import OwnsMomentum, inferred, take_buffer, traits_of
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker
from thinwire.methods.method import Method
from thinwire.session.checkpoint import Restored
from thinwire.session.momentum_transfer import averaged, averaged_buffer


def agree(channel: ControlChannel, lines: Sequence[tuple[str, str]]) -> None:
    """Compare the settings of all ranks, and name the first difference. A collective call.

    Raises:
        ThinwireError: the ranks have different settings.
    """
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


def restore_alike(together: Together, collective: Collective, restore: Callable[[], Restored]) -> Restored:
    """Return the checkpoint that this rank restores, after checking that all ranks use the same. A collective call.

    Raises:
        ThinwireError: they use different ones.
    """
    with together.alone():
        restored = restore()
        said = restored.clock(), restored.fingerprint()
    agree(collective.everyone, [("checkpoint", said[0])])
    agree(collective, [("checkpoint", said[1])])
    return restored


def migrate_all(
    before: Sequence[Unit], after: Sequence[Unit], workers: Sequence[Worker], collective: Collective, timeout: float
) -> None:
    """Migrate the state of each old unit to the new unit of the same name. A collective call."""
    known = {unit.name: unit for unit in before}
    for unit in after:
        migrate(known.get(unit.name), unit, workers, collective, timeout)


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
    pending = [worker.local[new.name].now.pop("pending_residual") for worker in workers if _has_no_place(new, worker)]
    if pending:
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


def _has_no_place(unit: Unit, worker: Worker) -> bool:
    """Return True if a pending residual can't be added to this unit's compensated tensor."""
    return bool(unit.replicated) and "pending_residual" in worker.local[unit.name].now


def _keep(old: State, new: State, was: Memory, memory: Memory, gain: float = 1.0) -> None:
    """Fill the slots of ``new`` with those of ``old`` of the same name and role.

    A pending residual goes to the pending slot of the new memory; without one it is sent with the next step.

    Args:
        was, memory: the memories of the two states.
        gain: factor of a pending residual.
    """
    slots, pending = memory.slots, named(was, Role.PENDING) | {"pending_residual"}
    home = next((key for key in named(memory, Role.PENDING) if key in new), "pending_residual")
    for key, value in old.items():
        fits = key in new and (key not in was.slots or slots[key].role is was.slots[key].role)
        kept = key if fits else home if key in pending else None
        if kept is not None:
            value = value * gain if key in pending and gain != 1.0 else value
            if (key != kept or key == "pending_residual") and kept in new:
                value = value + new[kept]
            new[kept] = value.to(new[kept].dtype) if kept in new else value
