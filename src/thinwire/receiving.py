"""What a unit receives: the mean over all senders, as a gradient or, where few elements arrive, as a sparse tensor."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from thinwire.core import Context, Payload
from thinwire.exchange.groups import Group, Piece
from thinwire.kernels.reference import REFERENCE
from thinwire.loops import Kernels
from thinwire.tensors import Decompressed, float_at_least_32
from thinwire.units import Unit

FEW = 1 / 32
"""Of the elements, over all senders: above that an optimizer is faster with a dense gradient."""


def mean_of(
    group: Group,
    unit: Unit,
    pieces: Sequence[tuple[int, Piece]],
    senders: Sequence[tuple[int, list[Payload]]],
    out: Tensor,
    ctx: Context,
    clear: bool,
    sparse: bool,
) -> Tensor:
    """The mean of what all senders sent of one unit, added in their order; the same on every rank, bit for bit.

    Args:
        pieces: of the unit, and which of the group's they are.
        out: where it is written, if it is dense and of a dtype that is summed as it is.
        clear: whether ``out`` is zero.
        sparse: whether it may be sparse.
    """
    wide, share = float_at_least_32(out.dtype), 1.0 / len(senders)
    mean = out if out.dtype == wide else torch.empty_like(out, dtype=wide)  # short dtypes are summed in float32
    packer = group.packer(unit)

    def arrived(j: int, piece: Piece) -> Generator[Decompressed]:
        part, known = piece.of(mean), piece.of_state(unit.shared.now)
        for rank, payloads in senders:
            yield packer.decompress(payloads[j], part, known, _of(ctx, unit, piece, rank, ctx.kernels))

    whole = sparse and mean is out and out.ndim > 0 and out.is_contiguous()
    if whole and unit.memory.passes_on and not packer.learns and "carried" not in unit.shared.now:
        few: list[tuple[Piece, Decompressed]] = []
        for piece, got in ((own, got) for j, own in pieces for got in arrived(j, own)):
            if got.density * len(senders) > FEW:
                break
            few.append((piece, got))
        else:
            return _added(few, out, share, ctx.kernels or REFERENCE)
    for j, piece in pieces:
        part = piece.of(mean)
        for later, got in enumerate(arrived(j, piece)):
            got.add_to(part, share) if later or (clear and mean is out) else got.write_to(part, share)
        if unit.compressor.summable and not unit.gathered:  # the only sender is the mean
            now, new = piece.of_state(unit.shared.now), piece.of_state(unit.shared.next)
            packer.commit(senders[0][1][j], part, now, new, _of(ctx, unit, piece, 0, None))
    return mean


def _of(ctx: Context, unit: Unit, piece: Piece, rank: int, kernels: Kernels | None) -> Context:
    return Context(ctx.seed, ctx.step, piece.key(unit.name), rank, kernels)


def _added(few: Sequence[tuple[Piece, Decompressed]], like: Tensor, share: float, kernels: Kernels) -> Tensor:
    """The sum, in the order in which the dense one would be made.

    Raises:
        IndexError: an index from the network lies outside.
    """
    entries = [
        (indices + piece.run[0] if piece.run else indices, values)
        for piece, (indices, values) in ((piece, got.entries()) for piece, got in few)
    ]
    indices, values = [one for one, _ in entries], [some.to(like.dtype) for _, some in entries]
    there, total = kernels.merge(indices, values, share)
    if there.device.type == "cpu" and there.numel() and int(there[-1]) >= like.numel():
        raise IndexError(f"an index of {int(there[-1])} has arrived for a tensor of {like.numel()} elements")
    where = kernels.coordinates(there, like.shape)
    return torch.sparse_coo_tensor(where, total, like.shape, is_coalesced=True, check_invariants=False)
