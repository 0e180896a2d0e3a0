"""Workers: one rank each, with its local state and its measurements."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from thinwire.core.interfaces import Role, named
from thinwire.core.loops import Kernels
from thinwire.core.tensors import Decompressed, flat
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.units import Piece, Unit
from thinwire.kernels.reference import REFERENCE

PROBE_EVERY = 100
"""Steps from one measurement to the next."""


@dataclass
class Probe:
    """The measurement of the compression error. It reads every tensor once, so only few steps are measured."""

    lost: list[Tensor] = field(default_factory=list[Tensor])
    compensated: list[Tensor] = field(default_factory=list[Tensor])

    def look(self, x: Tensor, own: Decompressed) -> None:
        indices, values = own.entries()
        before = flat(x)[indices].double()
        total = flat(x).double().square().sum()  # summed as below, so that a lossless unit has an error of exactly 0
        self.compensated.append(total)
        self.lost.append(total - before.square().sum() + (before - values).square().sum())

    @property
    def error(self) -> float | None:
        """``||x - sent||² / ||x||²`` over all measured tensors; None without any."""
        total = sum(float(one) for one in self.compensated)
        return sum(float(one) for one in self.lost) / total if total else None


class Watch(Protocol):
    """An observer of the tensors that a worker compresses; it must neither change nor keep them."""

    def look(self, name: str, x: Tensor, run: tuple[int, int] | None) -> None:
        """Observe ``x``, the compensated tensor of the unit of this name, or a run of its elements."""
        ...


@dataclass
class Worker:
    """One rank, and its local state: ``local[unit name]``."""

    rank: int
    seed: int = 0
    local: dict[str, TwoCopies] = field(default_factory=dict[str, TwoCopies])
    probe: Probe | None = None
    kernels: Kernels = REFERENCE
    watch: Watch | None = None
    """The observer of a policy that needs the compensated tensors."""
    held: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Compensated tensors of leader-selected units, kept until the leader's selection arrives."""

    def looks(self, unit: Unit) -> bool:
        """Return True if this unit is measured or watched in this step."""
        return self.watch is not None or (self.probe is not None and unit.compressed)

    def update_residual(self, unit: Unit, piece: Piece, x: Tensor, own: Decompressed | None) -> None:
        """Write the next residual of a piece, and measure: ``x`` was compressed, and the receivers get ``own``.

        ``own`` is None if no memory or measurement needs it.
        """
        if own is None:
            return
        if self.probe is not None and unit.compressed:
            self.probe.look(x, own)
        if self.watch is not None:
            self.watch.look(unit.name, x, piece.run)
        unit.memory.sent(own, piece.of_state(self.local[unit.name].next))


def has_pending(units: Sequence[Unit], workers: Sequence[Worker]) -> bool:
    """Return True if a residual of an earlier method is sent with the next step."""
    local = (state for worker in workers for state in worker.local.values())
    return any("pending_residual" in state.now for state in (*local, *(unit.shared for unit in units)))


def pending_residuals(units: Sequence[Unit], workers: Sequence[Worker]) -> list[Tensor]:
    """Return every tensor that holds gradients that were not sent yet."""
    return [
        state.now[key]
        for unit in units
        for state in unit.states(workers)
        for key in (*named(unit.memory, Role.PENDING), "pending_residual")
        if key in state.now
    ]
