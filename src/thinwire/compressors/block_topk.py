"""Block-wise Top-k: the largest elements of each block."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.coding.bitpack import pack_words, unpack_words
from thinwire.compressors.sampling import largest_of_each
from thinwire.compressors.sparsifier import Sparsifier
from thinwire.core import Context, Payload, Sparse, State, register
from thinwire.core.checks import check_fields, share, whole
from thinwire.core.loops import Found
from thinwire.kernels.reference import REFERENCE


@register("block_topk")
@dataclass(frozen=True)
class BlockTopK(Sparsifier):
    """Sends the ``ceil(density * B)`` elements of largest magnitude of each block of B.

    ``||x - C(x)||^2 <= (1 - density) ||x||^2``, as for Top-k. It loses more than Top-k if the blocks differ. Every
    block is searched on its own, without a threshold or a pass over the whole tensor.

    Args:
        density: kept / total, in (0, 1]; at least one element of each block.
        block: elements of a block, in the order of memory; the last may be short.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: k values, and k indices in the shorter of two codes: positions in the block of ``ceil(log2 B)`` bits each,
    or Elias-Fano over all, from four indices per block on: 12 bits each for one in 4096, 9.0 for 32. The size is the
    same at every step.

    Example:
        >>> x = torch.tensor([0.5, -3.0, 1.0, 2.0])
        >>> payload = BlockTopK(0.5, block=2).compress(x, {}, NOWHERE)
        >>> BlockTopK(0.5, block=2).decompress(payload, x, {}, NOWHERE).write_to(out := torch.empty(4)); out
        tensor([ 0., -3.,  0.,  2.])

    Source: S. Shi, X. Zhao, Q. Wang, Z. Tang, X. Chu, "A Convergence Analysis of Distributed SGD with
    Communication-Efficient Gradient Sparsification", 2019, for selection in parts of a model.

    Departures: equal blocks, not layers.
    """

    density: float
    block: int = 4096

    def __post_init__(self) -> None:
        check_fields(self, density=share("0.01"), block=whole(1))

    def _contraction(self, n: int) -> float:
        return self.density

    def _each(self, n: int) -> tuple[int, int]:
        """Return the size of a whole block, and the number of elements sent of each."""
        size = min(self.block, n)
        return size, math.ceil(self.density * size)

    def k(self, n: int) -> int:
        return n // self.block * self._each(n)[1] + math.ceil(self.density * (n % self.block))

    def select(self, x: Tensor, k: int, ctx: Context) -> Tensor:
        magnitude, whole = x.abs(), x.numel() - x.numel() % self.block
        rows = largest_of_each(magnitude[:whole].view(-1, self.block), self._each(x.numel())[1])
        tail = REFERENCE.largest(magnitude[whole:], math.ceil(self.density * (x.numel() - whole))) + whole
        return torch.cat([rows, tail])

    def compress_sparse(self, x: Sparse, like: Tensor, state: State, ctx: Context) -> Payload:
        return self.compress(x.dense(like), state, ctx)

    def together(
        self, payloads: Sequence[tuple[int, Payload]], like: Tensor, ctx: Context, alpha: float, most: float
    ) -> Found | None:
        return None  # kernels gather Elias-Fano codes alone

    def _position_bits(self, n: int) -> int | None:
        """Return the bits of a position in a block; None if Elias-Fano codes take fewer bytes in all."""
        bits = max(self._each(n)[0] - 1, 0).bit_length()
        return bits if -(-self.k(n) * bits // 8) < super()._indices_nbytes(n) else None

    def _indices_nbytes(self, n: int) -> int:
        bits = self._position_bits(n)
        return super()._indices_nbytes(n) if bits is None else -(-self.k(n) * bits // 8)

    def _encode_indices(self, indices: Tensor, n: int, ctx: Context) -> Tensor:
        if (bits := self._position_bits(n)) is None:
            return super()._encode_indices(indices, n, ctx)
        return pack_words(indices % self._each(n)[0], bits)

    def _decode_indices(self, packed: Tensor, n: int, ctx: Context) -> Tensor:
        if (bits := self._position_bits(n)) is None:
            return super()._decode_indices(packed, n, ctx)
        k, (size, each) = self.k(n), self._each(n)
        block = torch.arange(k, device=packed.device).div_(max(each, 1), rounding_mode="floor")
        return unpack_words(packed, k, bits).add_(block, alpha=size)
