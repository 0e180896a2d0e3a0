"""What shares a message: the pieces of a bucket that take the same way through the network."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.coding import header
from thinwire.coding.layout import Layout
from thinwire.comm.link import Kind, wire_bytes
from thinwire.comm.process_group import Collective, InFlight
from thinwire.core.interfaces import Compressor, Payload, State
from thinwire.core.tensors import Decompressed, flat
from thinwire.exchange.units import Unit, Worker


@dataclass(frozen=True)
class Piece:
    """What is compressed at once: a whole unit, or a run of its elements in the order of memory."""

    unit: int
    run: tuple[int, int] | None = None

    def of(self, x: Tensor) -> Tensor:
        """The piece of ``x``, as a view."""
        return x if self.run is None else flat(x)[slice(*self.run)]

    def of_state(self, state: State) -> State:
        """The pieces of all tensors of a state, as views."""
        return state if self.run is None else {key: self.of(value) for key, value in state.items()}

    def key(self, name: str) -> str:
        """What a ``Context`` calls the piece of the unit of this name."""
        return name if self.run is None else f"{name}[{self.run[0]}:{self.run[1]}]"


def remember(unit: Unit, piece: Piece, x: Tensor, own: Decompressed, worker: Worker) -> None:
    """Prepare what is left of a piece for the next step: ``x`` was asked, and ``own`` is what the receivers get."""
    worker.look(unit, x, own, piece.run)
    unit.memory.sent(x, own, piece.of_state(worker.local[unit.name].next))


@dataclass(frozen=True)
class Group(ABC):
    """The units of a bucket that share one message, and the pieces that they are compressed in."""

    kind: Kind
    units: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    """What the message is seen as: all of it must have one dtype where it is summed."""
    has_head: bool
    """Whether the message says what was used and what was bad; nothing is at stake where nothing is remembered."""

    relays: ClassVar[bool] = False
    """Whether what arrives is only a stage, after which ranks send once more."""

    @cached_property
    def by_unit(self) -> dict[int, list[tuple[int, Piece]]]:
        """The pieces of each unit, and which of the group's they are; a unit without elements has none."""
        found: dict[int, list[tuple[int, Piece]]] = {}
        for j, piece in enumerate(self.pieces):
            found.setdefault(piece.unit, []).append((j, piece))
        return found

    def head(
        self, units: Sequence[Unit], payloads: Sequence[Payload], used: Sequence[bool], step: int
    ) -> list[Payload]:
        """The head of a message of these payloads, where it has one."""
        if not self.has_head:
            return []
        totals: list[Tensor] = []
        if not any(units[i].guarded for i in self.units):
            bad = payloads[0][0].new_zeros(len(self.units), dtype=torch.bool)
            return [(header.encode([used[i] for i in self.units], bad, self.dtype, step),)]
        first = [[payloads[j][0] for j, _ in self.by_unit.get(i, [])] if units[i].guarded else [] for i in self.units]
        for each in first:
            found = [header.total(values) for values in each]
            totals.append(torch.stack(found).sum() if len(found) > 1 else [*found, payloads[0][0].new_zeros(())][0])
        bad = header.not_finite(torch.stack(totals))
        if not bad.is_cuda and bool(bad.any()):  # or a sum of what is finite has overflowed
            bad = torch.stack([torch.stack([*map(header.is_bad, each), bad.new_zeros(())]).any() for each in first])
        return [(header.encode([used[i] for i in self.units], bad, self.dtype, step),)]

    @abstractmethod
    def pack(self, payloads: Sequence[Payload], head: Sequence[Payload], *, in_place: bool) -> Tensor:
        """The message of one rank: the payloads of the pieces, and the head. ``in_place`` allows a view of them."""

    def settle(self, unit: Unit, piece: Piece, x: Tensor, own: Decompressed, worker: Worker) -> None:
        """Before the exchange starts: here a rank knows by itself what of ``x`` the receivers will get."""
        remember(unit, piece, x, own, worker)

    @abstractmethod
    def start(self, message: Tensor, collective: Collective, turn: int) -> InFlight:
        """Start the exchange; ``turn`` is the same on all ranks, be one of them at another step."""

    def packer(self, unit: Unit) -> Compressor:
        """The compressor that made the payloads of a finished exchange."""
        return unit.compressor

    @abstractmethod
    def opened(self, arrived: InFlight) -> tuple[list[tuple[int, list[Payload]]], Tensor | None]:
        """A finished exchange: the payloads of the pieces from each rank (the sum counts as one), and all heads."""

    @property
    @abstractmethod
    def stages(self) -> Sequence[tuple[Kind, int]]:
        """The collectives that it takes, and the bytes of the message that a worker hands to each."""

    @abstractmethod
    def plain_bytes(self, world: int, lossy: frozenset[int]) -> float:
        """Bytes a worker sends for the payloads of units that are not in ``lossy``."""

    def wire_bytes(self, world: int, lossy: frozenset[int]) -> tuple[float, float]:
        """Bytes a worker sends: in all, and for the units in ``lossy``, with the head where there are any."""
        total = sum(wire_bytes(kind, nbytes, world) for kind, nbytes in self.stages)
        return total, 0.0 if lossy.isdisjoint(self.units) else total - self.plain_bytes(world, lossy)

    def relay(
        self, units: Sequence[Unit], arrived: InFlight, worker: Worker, step: int, collective: Collective
    ) -> InFlight:
        """Start the next stage; where there is none, what has arrived stays."""
        return arrived


@dataclass(frozen=True)
class Whole(Group):
    """Units that are sent whole, to all: summed on the way, or gathered."""

    layout: Layout

    def pack(self, payloads: Sequence[Payload], head: Sequence[Payload], *, in_place: bool) -> Tensor:
        return self.layout.pack([*payloads, *head], in_place=in_place)

    def start(self, message: Tensor, collective: Collective, turn: int) -> InFlight:
        if self.kind == "all_gather":
            return collective.all_gather(message)
        # scaled before, as DDP does, so that the sum can't overflow
        return collective.all_reduce(message.view(self.dtype).mul_(1.0 / collective.world))

    def opened(self, arrived: InFlight) -> tuple[list[tuple[int, list[Payload]]], Tensor | None]:
        result = arrived.answer()
        rows = result.view(torch.uint8).unsqueeze(0) if self.kind == "all_reduce" else result
        senders, columns = self.layout.unpack_all(rows)
        return list(enumerate(senders)), columns[-1] if self.has_head else None

    @property
    def stages(self) -> Sequence[tuple[Kind, int]]:
        return [(self.kind, self.layout.nbytes)]

    def plain_bytes(self, world: int, lossy: frozenset[int]) -> float:
        sizes = zip(self.units, self.layout.unit_nbytes, strict=False)  # the head and the padding come after
        return wire_bytes(self.kind, sum(size for i, size in sizes if i not in lossy), world)
