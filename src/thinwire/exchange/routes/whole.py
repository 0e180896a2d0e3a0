"""All-reduce and all-gather: the routes that send whole units to all ranks in one stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.coding.layout import Layout
from thinwire.comm.collectives import Carrier, InFlight
from thinwire.comm.link import Kind, wire_bytes
from thinwire.core.interfaces import Payload
from thinwire.exchange.routes.route import Route, Senders


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
