"""The interface of a route: the pieces of a bucket that share a message, its collectives, and its decoding.

Also the routes of one stage that send whole units to all ranks: all-reduce and all-gather.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from thinwire.coding import header as headers
from thinwire.coding.layout import Layout
from thinwire.comm.collectives import Carrier, InFlight
from thinwire.comm.link import Kind, wire_bytes
from thinwire.core import Compressor, Context, Decompressed, Payload
from thinwire.exchange.receiving import mean_of
from thinwire.exchange.units import Piece, Unit
from thinwire.exchange.workers import Worker

Senders: TypeAlias = Sequence[tuple[int, Sequence[Payload]]]
"""Ranks with their payloads, one for each piece; a sum counts as one rank."""


@dataclass(frozen=True)
class Route(ABC):
    """The units of a bucket that share one message, and the pieces that they are compressed in."""

    kind: Kind
    units: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    """The dtype that the message is viewed as; a summed message has one dtype."""
    has_header: bool
    """True if the message has a header; see ``Unit.told``."""

    unscaled: ClassVar[bool] = True
    """True if ``combine`` returns gradients without the loss scale, where the memory remembers something."""
    relays: ClassVar[bool] = False
    """True if the route has a second stage, before which ranks compute."""

    @cached_property
    def by_unit(self) -> dict[int, list[tuple[int, Piece]]]:
        """The pieces of each unit, and their numbers in the route; a unit without elements has none."""
        found: dict[int, list[tuple[int, Piece]]] = {}
        for j, piece in enumerate(self.pieces):
            found.setdefault(piece.unit, []).append((j, piece))
        return found

    def header(
        self, units: Sequence[Unit], payloads: Sequence[Payload], used: Sequence[bool], step: int
    ) -> list[Payload]:
        """Return the header of a message of these payloads, in a list that is empty if it has none."""
        if not self.has_header:
            return []
        if any(units[i].guarded for i in self.units):
            nonfinite = self._nonfinite(units, payloads)
        else:
            nonfinite = payloads[0][0].new_zeros(len(self.units), dtype=torch.bool)
        return [(headers.encode([used[i] for i in self.units], nonfinite, self.dtype, step),)]

    def _nonfinite(self, units: Sequence[Unit], payloads: Sequence[Payload]) -> Tensor:
        """Return for each unit True if it is guarded and has a nonfinite value; bool ``[units]``."""
        totals: list[Tensor] = []
        first = [[payloads[j][0] for j, _ in self.by_unit.get(i, [])] if units[i].guarded else [] for i in self.units]
        for each in first:
            found = [headers.total(values) for values in each]
            totals.append(torch.stack(found).sum() if len(found) > 1 else [*found, payloads[0][0].new_zeros(())][0])
        nonfinite = headers.nonfinite_of(torch.stack(totals))
        if not nonfinite.is_cuda and bool(nonfinite.any()):  # maybe only the total has overflowed
            nonfinite = torch.stack(
                [torch.stack([*map(headers.is_nonfinite, each), nonfinite.new_zeros(())]).any() for each in first]
            )
        return nonfinite

    @abstractmethod
    def pack(self, payloads: Sequence[Payload], header: Sequence[Payload], *, in_place: bool) -> Tensor:
        """Return one rank's message: the pieces' payloads and the header. ``in_place`` allows a view of them."""

    def update_residual(self, unit: Unit, piece: Piece, x: Tensor, own: Decompressed | None, worker: Worker) -> None:
        """Update the residual before the exchange starts, since the sender knows what the receivers will get."""
        worker.update_residual(unit, piece, x, own)

    @abstractmethod
    def start(self, message: Tensor, collective: Carrier, turn: int) -> InFlight:
        """Start the exchange; ``turn`` is the same on all ranks, even if one of them is at another step."""

    def relay(
        self, units: Sequence[Unit], arrived: InFlight, worker: Worker, step: int, collective: Carrier
    ) -> InFlight:
        """Start the second stage; a route without one returns what has arrived."""
        return arrived

    @abstractmethod
    def opened(self, arrived: InFlight) -> tuple[Senders, Tensor | None]:
        """Return the payloads and the headers of a finished exchange."""

    def decoder(self, unit: Unit) -> Compressor:
        """Return the compressor that decodes the payloads of a finished exchange."""
        return unit.compressor

    def combine(
        self, unit: Unit, i: int, senders: Senders, out: Tensor, ctx: Context, *, zero: bool, sparse: bool
    ) -> Tensor:
        """Return the mean over the senders of unit ``i``, or another combination of their payloads.

        ``out`` gets the result, if that is dense and sums in the dtype of ``out``; with ``zero``, ``out`` is zero now.
        With ``sparse``, the result may be a sparse tensor.
        """
        return mean_of(self.decoder(unit), unit, self.by_unit[i], senders, out, ctx, zero=zero, sparse=sparse)

    @property
    @abstractmethod
    def stages(self) -> Sequence[tuple[Kind, int]]:
        """The collectives of the route, with the bytes of a worker's message to each."""

    def plain_bytes(self, world: int, lossy: frozenset[int]) -> float:
        """Return the bytes that a worker sends for the payloads of units that are not in ``lossy``."""
        return 0.0  # as for leader-selected units, which are all compressed

    def wire_bytes(self, world: int, lossy: frozenset[int]) -> tuple[float, float]:
        """Return the bytes a worker sends: in all, and for units in ``lossy``, with the header if there are any."""
        total = sum(wire_bytes(kind, nbytes, world) for kind, nbytes in self.stages)
        return total, 0.0 if lossy.isdisjoint(self.units) else total - self.plain_bytes(world, lossy)


@dataclass(frozen=True)
class Whole(Route):
    """A route that sends whole units to all ranks: all-reduced or gathered."""

    layout: Layout

    def pack(self, payloads: Sequence[Payload], header: Sequence[Payload], *, in_place: bool) -> Tensor:
        return self.layout.pack([*payloads, *header], in_place=in_place)

    def start(self, message: Tensor, collective: Carrier, turn: int) -> InFlight:
        if self.kind == "all_gather":
            return collective.all_gather(message)
        # scaled before, as DDP does, so that the sum can't overflow
        return collective.all_reduce(message.view(self.dtype).mul_(1.0 / collective.world))

    def opened(self, arrived: InFlight) -> tuple[Senders, Tensor | None]:
        result = arrived.answer()
        rows = result.view(torch.uint8).unsqueeze(0) if self.kind == "all_reduce" else result
        senders, columns = self.layout.unpack_all(rows)
        return list(enumerate(senders)), columns[-1] if self.has_header else None

    @property
    def stages(self) -> Sequence[tuple[Kind, int]]:
        return [(self.kind, self.layout.nbytes)]

    def plain_bytes(self, world: int, lossy: frozenset[int]) -> float:
        sizes = zip(self.units, self.layout.unit_nbytes, strict=False)  # the header and the padding come last
        return wire_bytes(self.kind, sum(size for i, size in sizes if i not in lossy), world)
