"""Which collective a payload takes.

Payloads that can be summed take one all-reduce, all others one all-gather; so a bucket needs one collective, or
two where it holds both. Where a method compresses, and the summable payloads of the whole model (biases, norms) are
small, they are gathered too: that saves a round trip, and does not depend on how the model is cut into buckets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from thinwire.core import Payload
from thinwire.exchange.collectives import Collective, InFlight
from thinwire.link import Kind, wire_bytes
from thinwire.units import Unit, payload_like
from thinwire.wire import head
from thinwire.wire.layout import ROW_ALIGNMENT, Layout


@dataclass(frozen=True)
class Group:
    """The units of a bucket that share one message."""

    kind: Kind
    units: tuple[int, ...]
    layout: Layout
    dtype: torch.dtype
    """What the message is seen as: all of it must have one dtype where it is summed."""
    has_head: bool
    """Whether its last payload says what was used and what was bad; nothing is at stake where nothing is remembered."""

    def start(self, message: Tensor, collective: Collective) -> InFlight:
        """Start the exchange. An all-reduce is scaled before, as DDP does, so that the sum can't overflow."""
        if self.kind == "all_gather":
            return collective.all_gather(message)
        return collective.all_reduce(message.view(self.dtype).mul_(1.0 / collective.world))

    def arrived(self, result: Tensor) -> list[list[Payload]]:
        """The payloads of a finished exchange, for each sender (the sum counts as one) and unit."""
        rows = result.view(torch.uint8).unsqueeze(0) if self.kind == "all_reduce" else result
        return [self.layout.unpack(row) for row in rows]


@dataclass(frozen=True)
class Bucket:
    """Units whose gradients are ready together, and the messages that carry them."""

    units: tuple[Unit, ...]
    groups: tuple[Group, ...]

    @cached_property
    def lossy(self) -> frozenset[int]:
        """The units that their method compresses."""
        return frozenset(i for i, unit in enumerate(self.units) if unit.compressed)

    def wire_bytes(self, world: int) -> tuple[float, float]:
        """Bytes a worker sends for this bucket in a step: in all, and for the compressed units with the head."""
        total = compressed = 0.0
        for group in self.groups:
            total += wire_bytes(group.kind, group.layout.nbytes, world)
            if self.lossy.isdisjoint(group.units):
                continue
            sizes = zip(group.units, group.layout.unit_nbytes, strict=False)  # the head and the padding come after
            plain = sum(size for i, size in sizes if i not in self.lossy)
            compressed += wire_bytes(group.kind, group.layout.nbytes - plain, world)
        return total, compressed


def plan_bucket(units: Sequence[Unit], world: int) -> Bucket:
    """Sort the units of a bucket into messages."""
    payloads = [payload_like(unit.compressor, unit.like) for unit in units]
    summed: dict[torch.dtype, list[int]] = {}
    gathered: list[int] = []
    for i, unit in enumerate(units):
        if unit.compressor.summable and not unit.gathered:
            summed.setdefault(payloads[i][0].dtype, []).append(i)
        else:
            gathered.append(i)

    def group(kind: Kind, chosen: list[int], dtype: torch.dtype) -> Group:
        alignment = ROW_ALIGNMENT if kind == "all_gather" else 1
        has_head = any(units[i].guarded for i in chosen)
        parts = [payloads[i] for i in chosen]
        if has_head:
            parts.append((torch.empty(head.size(len(chosen), dtype), dtype=dtype, device="meta"),))
        return Group(kind, tuple(chosen), Layout(parts, alignment), dtype, has_head)

    groups = [group("all_gather", gathered, torch.uint8)] if gathered else []
    groups += [group("all_reduce", chosen, dtype) for dtype, chosen in summed.items()]
    return Bucket(tuple(units), tuple(groups))
