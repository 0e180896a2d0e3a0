"""Sums of received payloads, always in rank order, so that every rank has the same bits.

The mean of a unit over all senders is a dense gradient or, if few elements arrive, a sparse tensor.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thinwire.core import Compressor, Context, Decompressed, Payload, State
from thinwire.core.capabilities import SumsSparsely, commit
from thinwire.core.loops import Found, Kernels
from thinwire.core.memory_capabilities import traits_of
from thinwire.core.tensors import float_at_least_32
from thinwire.exchange.units import Piece, Unit
from thinwire.kernels.reference import REFERENCE

FEW = 1 / 32
"""Largest fraction of elements, over all senders, for a sparse result; above it, a dense one is faster to step on."""


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

    Values are summed in float32 at least. Return None if more than the fraction ``most`` of the elements of a piece
    like ``like`` might be among them. ``payloads``: the ranks and their payloads of the piece.
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


def mean_of(
    decoder: Compressor,
    unit: Unit,
    pieces: Sequence[tuple[int, Piece]],
    senders: Sequence[tuple[int, Sequence[Payload]]],
    out: Tensor,
    ctx: Context,
    *,
    zero: bool,
    sparse: bool,
) -> Tensor:
    """Return the mean of all senders' payloads of one unit; see ``Route.combine``.

    ``pieces``: of the unit, with their numbers in the route.
    """
    wide, share = float_at_least_32(out.dtype), 1.0 / len(senders)
    mean = out if out.dtype == wide else torch.empty_like(out, dtype=wide)  # short dtypes are summed in float32
    if (
        sparse
        and mean is out
        and out.ndim > 0
        and out.is_contiguous()
        and traits_of(unit.memory).passes_on
        and not decoder.traits.warm_started
        and "pending_residual" not in unit.shared.now
    ):
        found: list[Found] = []
        for j, piece in pieces:
            theirs, known = [(rank, payloads[j]) for rank, payloads in senders], piece.of_state(unit.shared.now)
            here = _of(ctx, unit, piece, 0, ctx.kernels)
            some = added(decoder, theirs, piece.of(mean), known, here, share, FEW)
            if some is None:
                break
            there, n = some[0], piece.of(mean).numel()
            # on CPUs only, as CUDA would need a synchronization
            if there.device.type == "cpu" and there.numel() and int(there[-1]) >= n:
                raise IndexError(f"an index of {int(there[-1])} has arrived for {n} elements")
            found.append((some[0] + piece.run[0], some[1]) if piece.run else some)
        else:
            there, total = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
            where = (ctx.kernels or REFERENCE).coordinates(there, out.shape)
            values = total.to(out.dtype)
            return torch.sparse_coo_tensor(where, values, out.shape, is_coalesced=True, check_invariants=False)

    for j, piece in pieces:
        part, known = piece.of(mean), piece.of_state(unit.shared.now)
        for later, (rank, payloads) in enumerate(senders):
            got = decoder.decompress(payloads[j], part, known, _of(ctx, unit, piece, rank, ctx.kernels))
            got.add_to(part, share) if later or (zero and mean is out) else got.write_to(part, share)
        if unit.compressor.traits.summable and not unit.gathered:  # the only payload is the mean
            new = piece.of_state(unit.shared.next)
            commit(decoder, senders[0][1][j], part, known, new, _of(ctx, unit, piece, 0, None))
    return mean


def written(grad: Tensor, out: Tensor, *, saturates: bool) -> Tensor:
    """Return the gradient for the optimizer: ``grad`` written to ``out``, or ``grad`` itself if it is sparse.

    ``saturates`` clamps to float16's range. Else, with a loss scale, an overflow skips the step.
    """
    if grad.is_sparse or grad is out:
        return grad
    if saturates and out.dtype == torch.float16:
        limit = torch.finfo(out.dtype).max
        grad = grad.clamp(-limit, limit)
    return out.copy_(grad)


def _of(ctx: Context, unit: Unit, piece: Piece, rank: int, kernels: Kernels | None) -> Context:
    return Context(ctx.seed, ctx.step, piece.key(unit.name), rank, kernels, turn=ctx.turn)
