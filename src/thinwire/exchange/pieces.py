"""Pieces: the elements that are compressed together."""

from dataclasses import dataclass

from torch import Tensor

from thinwire.core.interfaces import State
from thinwire.core.tensors import Decompressed, flat
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker


@dataclass(frozen=True)
class Piece:
    """A whole unit, or a run of its elements in memory order."""

    unit: int
    run: tuple[int, int] | None = None

    def of(self, x: Tensor) -> Tensor:
        """Return the piece of ``x`` as a view."""
        return x if self.run is None else flat(x)[slice(*self.run)]

    def of_state(self, state: State) -> State:
        """Return the pieces of all tensors of a state as views."""
        return state if self.run is None else {key: self.of(value) for key, value in state.items()}

    def key(self, name: str) -> str:
        """Return the key of the piece in a ``Context``; ``name`` is the unit's name."""
        return name if self.run is None else f"{name}[{self.run[0]}:{self.run[1]}]"


def update_residual(unit: Unit, piece: Piece, x: Tensor, own: Decompressed | None, worker: Worker) -> None:
    """Write the next residual of a piece: ``x`` was compressed, and the receivers get ``own``.

    ``own`` is None if no memory or measurement needs it.
    """
    if own is not None:
        worker.look(unit, x, own, piece.run)
        unit.memory.sent(own, piece.of_state(worker.local[unit.name].next))
