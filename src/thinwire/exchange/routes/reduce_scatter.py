"""A reduce-scatter whose messages are compressed: an all-to-all, and a sum in float32 by the rank that keeps it.

Nothing is rounded twice: what a rank sends to another is compressed once, and its own part is added as it is.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from thinwire.coding.layout import Layout
from thinwire.comm.process_group import InFlight
from thinwire.core.ambient import undisturbed
from thinwire.core.context import NOWHERE, NUMBER, Context
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor, Memory, State
from thinwire.core.tensors import float_at_least_32
from thinwire.exchange.units import payload_like


class Carrier(Protocol):
    """Some ranks that send each other rows."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...

    def all_to_all(self, message: Tensor) -> InFlight: ...


@lru_cache(maxsize=1024)
def layout_of(compressor: Compressor, numel: int, dtype: torch.dtype) -> Layout:
    """The message of that many elements in a row, alone."""
    return Layout([payload_like(compressor, torch.empty(numel, dtype=dtype, device="meta"))])


@undisturbed
def reduce_scatter(
    rows: Tensor,
    out: Tensor,
    compressor: Compressor,
    memory: Memory,
    states: Sequence[tuple[State, State]],
    collective: Carrier,
    context: Callable[[int, int], Context],
    scale: float,
    timeout: float,
) -> None:
    """``out`` = the sum over the ranks of their row for this one. A collective call; it waits.

    Args:
        rows: of this rank, ``[world, n]``; row r is for rank r. They may be overwritten.
        out: ``[n]``.
        states: for each row, what the memory remembers: (old, new); the own one is not used.
        context: of what a rank (first) sends to another (second).
        scale: 1 / loss scale, for a memory that remembers.

    **Wire**: ``(N-1) / N`` of the payloads of all rows, where fp32 takes ``4 (N-1) / N`` bytes an element.
    """
    world, rank = collective.world, collective.rank
    layout = layout_of(compressor, rows.shape[1], memory.dtype(rows.dtype))
    message = torch.zeros(world, layout.nbytes, dtype=torch.uint8, device=rows.device)
    for r, (row, (old, new)) in enumerate(zip(rows, states, strict=True)):
        if r != rank:
            ctx = context(rank, r)
            x = memory.compensate(row, row, old, new, scale, ctx)
            payload = compressor.compress(x, {}, ctx)
            memory.sent(x, compressor.decompress(payload, x, {}, ctx), new)
            message[r] = layout.pack([payload])
    arrived = collective.all_to_all(message)
    total = rows[rank].to(float_at_least_32(rows.dtype))
    like = torch.empty_like(total, dtype=memory.dtype(rows.dtype))
    arrived.wait(timeout)
    back = 1.0 / scale if memory.stateful else 1.0
    for r, received in enumerate(arrived.answer()):
        if r != rank:
            compressor.decompress(layout.unpack(received)[0], like, {}, context(r, rank)).add_to(total, back)
    out.copy_(total)


def check_flat(argument: str, carries: str, compressor: Compressor) -> None:
    """Raises a ``ThinwireError`` where a compressor can't work on any run of elements by itself."""
    if compressor.min_ndim or compressor.period != 1 or compressor.init(NUMBER, NOWHERE):
        raise ThinwireError(
            f"{argument}={type(compressor).__name__} needs matrices, keeps a state or changes its shapes; the "
            f"{carries}: use one like thinwire.compressors.Quantize(8) or thinwire.compressors.Cast('bfloat16')"
        )
    if type(compressor).__hash__ is None:
        raise ThinwireError(
            f"{argument}={type(compressor).__name__} can't be hashed; make it a @dataclass(frozen=True)"
        )
