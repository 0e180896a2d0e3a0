"""The sum of all ranks' payloads of one piece, in rank order, so that every rank has the same bits."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thinwire.core.capabilities import SumsSparsely
from thinwire.core.context import Context
from thinwire.core.interfaces import Compressor, Payload, State
from thinwire.core.loops import Found
from thinwire.core.tensors import Decompressed, float_at_least_32
from thinwire.kernels.reference import REFERENCE


def added(
    compressor: Compressor,
    payloads: Sequence[tuple[int, Payload]],
    like: Tensor,
    state: State,
    ctx: Context,
    alpha: float = 1.0,
    most: float = math.inf,
) -> Found | None:
    """Return the ascending indices of the elements that any rank sent, and ``alpha`` times the sum of their values.

    Return None if more than the fraction ``most`` of the elements might be among them.

    Args:
        payloads: the ranks and their payloads of the piece.
        like: a tensor of the shape and dtype of the piece; values are summed in float32 at least.
        state: the compressor's.
        ctx: of the piece, on any rank.
    """
    if isinstance(compressor, SumsSparsely):
        found = compressor.together(payloads, like, ctx, alpha, most)
        if found is not None:
            return found
    parts: list[Decompressed] = []
    for rank, payload in payloads:
        parts.append(compressor.decompress(payload, like, state, replace(ctx, rank=rank)))
        if parts[0].density * len(payloads) > most:
            return None
    dtype = float_at_least_32(like.dtype)
    if parts[0].density >= 1.0:
        total = torch.zeros(like.numel(), dtype=dtype, device=payloads[0][1][0].device)
        for part in parts:
            part.add_to(total, alpha)
        return torch.arange(like.numel(), device=total.device), total
    indices, values = zip(*(part.entries() for part in parts), strict=True)
    return (ctx.kernels or REFERENCE).merge(indices, [some.to(dtype) for some in values], alpha)
