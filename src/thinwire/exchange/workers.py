"""A worker: one rank, the state that only it has, and those who measure it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from thinwire.core.loops import Kernels
from thinwire.core.tensors import Decompressed, flat
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.units import Unit
from thinwire.kernels.reference import REFERENCE

PROBE_EVERY = 100
"""Steps."""


@dataclass
class Probe:
    """Measures what compression loses; it reads all that it looks at once, so it looks at few steps."""

    lost: list[Tensor] = field(default_factory=list[Tensor])
    asked: list[Tensor] = field(default_factory=list[Tensor])

    def look(self, x: Tensor, own: Decompressed) -> None:
        indices, values = own.entries()
        before = flat(x)[indices].double()
        asked = flat(x).double().square().sum()  # as below, so that what loses nothing loses exactly 0
        self.asked.append(asked)
        self.lost.append(asked - before.square().sum() + (before - values).square().sum())

    @property
    def error(self) -> float | None:
        """``||x - sent||² / ||x||²`` over all that was looked at."""
        asked = sum(float(a) for a in self.asked)
        return sum(float(e) for e in self.lost) / asked if asked else None


class Watch(Protocol):
    """Looks at what a worker is asked to send; it must neither change nor keep it."""

    def look(self, name: str, x: Tensor, run: tuple[int, int] | None) -> None:
        """``x`` is what the compressor of the unit of this name is given: all of it, or a run of its elements."""
        ...


@dataclass
class Worker:
    """One rank, and the state that only it has: ``local[unit name]``."""

    rank: int
    seed: int = 0
    local: dict[str, TwoCopies] = field(default_factory=dict[str, TwoCopies])
    probe: Probe | None = None
    kernels: Kernels = REFERENCE
    watch: Watch | None = None
    """A policy's, where it needs to see what is compressed."""
    held: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What was asked of units until it is known what of it is sent."""

    def looks(self, unit: Unit) -> bool:
        """True if somebody measures this unit in this step."""
        return self.watch is not None or (self.probe is not None and unit.compressed)

    def look(self, unit: Unit, x: Tensor, own: Decompressed, run: tuple[int, int] | None = None) -> None:
        """Show what is asked of a unit, or of a run of its elements, and what is sent of it, to whoever measures."""
        if self.probe is not None and unit.compressed:
            self.probe.look(x, own)
        if self.watch is not None:
            self.watch.look(unit.name, x, run)


def carry(units: Sequence[Unit], workers: Sequence[Worker]) -> bool:
    """Whether an earlier method left something that waits for the next step."""
    local = (state for worker in workers for state in worker.local.values())
    return any("carried" in state.now for state in (*local, *(unit.shared for unit in units)))
