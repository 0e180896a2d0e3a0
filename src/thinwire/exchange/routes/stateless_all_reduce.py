"""An all-reduce whose messages are compressed, of a tensor that nothing is known about and nothing is remembered of.

It is a compressed reduce-scatter, and an all-gather of the sums, which their owners compress once more.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.nn.functional import pad

from thinwire.comm.process_group import InFlight
from thinwire.core.ambient import undisturbed
from thinwire.core.context import Context
from thinwire.core.interfaces import Compressor, State
from thinwire.core.tensors import flat, float_at_least_32
from thinwire.exchange.routes.reduce_scatter import Carrier, layout_of, reduce_scatter
from thinwire.memories.error_feedback import NoMemory


class Gatherer(Carrier, Protocol):
    """Some ranks that also gather."""

    def all_gather(self, message: Tensor) -> InFlight: ...


def payload_bytes(compressor: Compressor, x: Tensor, world: int) -> int:
    """Bytes that stand for ``x``, of ``x.nbytes``, in ``all_reduce``."""
    return world * layout_of(compressor, -(-x.numel() // world), float_at_least_32(x.dtype)).nbytes


@undisturbed
def all_reduce(
    x: Tensor, compressor: Compressor, carrier: Gatherer, context: Callable[[int, int], Context], timeout: float
) -> None:
    """``x`` = its sum over the ranks, in place, the same bits on each; after an error it may be anything. A collective
    call; it waits.

    ``s_r = x_r,r + sum over i != r of C(x_i,r)`` by the owner of row r, and ``C(s_r)`` for all.

    Args:
        x: contiguous, of a floating dtype; sums are made in float32 at least.
        context: of what a rank (first) sends to another (second), or of its sum (second is the number of ranks).
        timeout: seconds for each of the two exchanges.

    **Wire**: ``2 (N-1) / N`` of the payload of x, in place of as much of x itself.
    """
    world, width = carrier.world, -(-x.numel() // carrier.world)
    short = width * world - x.numel()
    rows = (pad(flat(x), (0, short)) if short else flat(x)).view(world, width)
    total = rows.new_empty(width, dtype=float_at_least_32(x.dtype))
    nothing: list[tuple[State, State]] = [({}, {})] * world
    reduce_scatter(rows, total, compressor, NoMemory(), nothing, carrier, context, 1.0, timeout)
    layout = layout_of(compressor, width, total.dtype)
    message = layout.pack([compressor.compress(total, {}, context(carrier.rank, world))])
    arrived = carrier.all_gather(message)
    arrived.wait(timeout)
    for r, (received, row) in enumerate(zip(arrived.answer(), rows, strict=True)):
        compressor.decompress(layout.unpack(received)[0], total, {}, context(r, world)).write_to(row)
    if short:
        flat(x).copy_(rows.view(-1)[: x.numel()])
