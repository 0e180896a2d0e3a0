"""The leader-selected route: one rank selects the elements, and the bytes per worker do not grow with their number.

At step t (``Context.phase``) rank ``t mod N`` is the leader. It broadcasts the indices it selected. Then all ranks sum
their values at these indices with one all-reduce. A rank does not know which elements it sends until the leader's
message arrives: it keeps the compensated tensor, and updates the residual between the stages.

Source: C. Chen et al., "ScaleCom: Scalable Sparsified Gradient Compression for Communication-Efficient Distributed
Training", 2020, arXiv:2104.11125, algorithm 1.

Departures: every rank selects elements at every step, though only the leader's count, to detect nonfinite values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from thinwire.coding.layout import Layout
from thinwire.comm.collectives import Carrier, InFlight
from thinwire.comm.link import Kind
from thinwire.core import Context, Decompressed, Payload
from thinwire.core.capabilities import LeaderSelected
from thinwire.exchange.routes.route import Route, Senders
from thinwire.exchange.units import Piece, Unit
from thinwire.exchange.workers import Worker


@dataclass(frozen=True)
class LeaderRoute(Route):
    """A route that broadcasts the leader's selection of elements, and sums all ranks' values there."""

    choices: Layout
    """Layout of the leader's message."""
    values: Layout
    """Layout of the summed message: the values and the header, all of ``dtype``."""

    relays: ClassVar[bool] = True

    def pack(self, payloads: Sequence[Payload], header: Sequence[Payload], *, in_place: bool) -> Tensor:
        """Return the selection, and the header, which is sent in the second stage."""
        choice = self.choices.pack([payload[1:] for payload in payloads])
        return torch.cat([choice, *(t.view(torch.uint8) for payload in header for t in payload)])

    def update_residual(self, unit: Unit, piece: Piece, x: Tensor, own: Decompressed | None, worker: Worker) -> None:
        worker.held[unit.name] = x

    def start(self, message: Tensor, collective: Carrier, turn: int) -> InFlight:
        choice, header = message[: self.choices.nbytes], message[self.choices.nbytes :]
        leader = turn % collective.world  # no message needs it, since ``turn`` is the same on all ranks
        return replace(collective.broadcast(choice, leader), side_data=header)

    def relay(
        self, units: Sequence[Unit], arrived: InFlight, worker: Worker, step: int, collective: Carrier
    ) -> InFlight:
        chosen = arrived.answer()
        sending: list[Payload] = []
        for piece, choice in zip(self.pieces, self.choices.unpack(chosen), strict=True):
            unit = units[piece.unit]
            x, known = worker.held.pop(unit.name), unit.shared.now
            ctx = Context(worker.seed, step, unit.name, worker.rank, worker.kernels, unit.exact, unit.saturates)
            payload = cast(LeaderSelected, unit.compressor).follow(x, choice, known, ctx)
            sending.append(payload[:1])
            worker.update_residual(unit, piece, x, unit.compressor.decompress(payload, x, known, ctx))
        if self.has_header:
            sending.append((cast(Tensor, arrived.side_data).view(self.dtype),))
        message = self.values.pack(sending).view(self.dtype).mul_(1.0 / collective.world)  # so the sum can't overflow
        return replace(collective.all_reduce(message), side_data=chosen)

    def opened(self, arrived: InFlight) -> tuple[Senders, Tensor | None]:
        summed = self.values.unpack(arrived.answer().view(torch.uint8))
        choices = self.choices.unpack(cast(Tensor, arrived.side_data))
        payloads = [(*values, *choice) for values, choice in zip(summed, choices, strict=False)]  # header last
        return [(0, payloads)], summed[-1][0].unsqueeze(0) if self.has_header else None

    @property
    def stages(self) -> Sequence[tuple[Kind, int]]:
        return [("broadcast", self.choices.nbytes), ("all_reduce", self.values.nbytes)]
