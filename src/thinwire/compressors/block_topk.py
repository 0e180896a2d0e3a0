"""Top-k in blocks: the largest elements of each, and DeMo's, the largest coefficients of a cosine transform of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.coding.bitpack import pack_words, unpack_words
from thinwire.compressors.sampling import largest_of_each
from thinwire.compressors.sparsifier import Sparsifier
from thinwire.core import Compressor, Context, Decompressed, Dense, Payload, Sparse, State, Traits, flat, register
from thinwire.core.ambient import full_precision
from thinwire.core.capabilities import Adjustable
from thinwire.core.checks import check_fields, share, whole
from thinwire.core.loops import Found
from thinwire.core.tensors import float_at_least_32, shortened
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

    _repeats: ClassVar[bool] = False

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
        if whole == x.numel():
            return rows
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


def chunk_of(n: int, largest: int) -> int:
    """Return the chunk size along a dimension of n: its largest divisor up to ``largest``, if at least half of that.

    Otherwise (e.g. primes) it is ``largest``, and zeros fill the last chunk.
    """
    if n <= largest:
        return max(n, 1)
    divisor = next(d for d in range(largest, 0, -1) if n % d == 0)
    return divisor if 2 * divisor >= largest else largest


@lru_cache(maxsize=64)
def basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II matrix ``[n, n]``; row j is the j-th cosine."""
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    rows = torch.cos(math.pi / n * i.unsqueeze(1) * (i + 0.5)) * math.sqrt(2.0 / n)
    rows[0] /= math.sqrt(2.0)
    return rows.to(device, dtype)


@dataclass(frozen=True)
class Grid:
    """The layout of a tensor ``[rows, columns]`` in chunks ``[height, width]``."""

    rows: int
    columns: int
    height: int
    width: int

    @full_precision()
    def transform(self, x: Tensor) -> Tensor:
        """Compute the coefficients ``[chunks * height * width]`` of ``x`` ``[rows * columns]``."""
        h, w = self.height, self.width
        fill = (0, -self.columns % w, 0, -self.rows % h)
        tiles = torch.nn.functional.pad(x.view(self.rows, self.columns), fill)
        tiles = tiles.view(-(-self.rows // h), h, -1, w).transpose(1, 2)
        d, e = (basis(n, x.dtype, x.device) for n in (h, w))
        return (d @ tiles @ e.t()).reshape(-1)

    @full_precision()
    def back(self, coefficients: Tensor) -> Tensor:
        """Undo ``transform``."""
        h, w = self.height, self.width
        d, e = (basis(n, coefficients.dtype, coefficients.device) for n in (h, w))
        tiles = d.t() @ coefficients.view(-(-self.rows // h), -1, h, w) @ e
        padded = tiles.transpose(1, 2).reshape(-(-self.rows // h) * h, -1)
        return padded[: self.rows, : self.columns].reshape(-1)


@lru_cache(maxsize=4096)
def _chunked(rows: int, columns: int, chunk: int, density: float) -> tuple[Grid, int, BlockTopK]:
    height, width = chunk_of(rows, chunk), chunk_of(columns, chunk)
    n = math.ceil(rows / height) * height * math.ceil(columns / width) * width
    return Grid(rows, columns, height, width), n, BlockTopK(density, height * width)


@register("dct_topk")
@dataclass(frozen=True)
class DctTopK(Compressor, Adjustable):
    """Sends the largest coefficients of an orthonormal cosine transform (DCT-II) of each chunk.

    ``T = D X D^T`` in chunks of 64 x 64 (tensors that are not matrices: 64 in the order of memory); it sends the
    ``ceil(density * size)`` largest of each chunk. ``||x - C(x)||^2 <= (1 - density) ||x||^2``: D is orthonormal.

    Args:
        density: kept / total coefficients, in (0, 1]; at least one per chunk. DeMo's 32 of 64 x 64 are 0.0078.
        chunk: largest size of a chunk along each dimension, at least 1; the size is a divisor of the dimension.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: k values, and k indices as in ``thinwire.compressors.BlockTopK``, 9.0 bits each for 32 of 4096: 41
    bits per coefficient, 25 with ``>> Cast("bfloat16")``; the reference sends 96.

    Example:
        >>> x = torch.ones(64, 64)
        >>> payload = DctTopK(1 / 4096).compress(x, {}, NOWHERE)
        >>> DctTopK(1 / 4096).decompress(payload, x, {}, NOWHERE).write_to(out := torch.empty(64, 64))
        >>> torch.allclose(out, x)
        True

    Source: B. Peng, J. Quesnelle, D. Kingma, "DeMo: Decoupled Momentum Optimization", 2024, arXiv:2411.19870.

    Departures: a dimension without a divisor of at least half a chunk (a prime above 64, e.g.) is padded with zeros.
    k is proportional to the size of a chunk; the reference keeps 32 of 64 in one dimension. Replicas are bit-equal if
    their matrix products are, so use machines of one kind.
    """

    density: float = 32 / 4096
    chunk: int = 64

    def __post_init__(self) -> None:
        check_fields(self, density=share("32 / 4096"), chunk=whole(1))

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            splittable=True, needs_feedback=self.density < 1.0, keeps_values=True, contraction=self._contraction
        )

    def _contraction(self, n: int) -> float:
        return min(self.density, 1.0 - 1e-6)  # a transform rounds

    def _layout(self, x: Tensor) -> tuple[Grid, int, BlockTopK]:
        """Return the chunks of ``x``, the number of coefficients, and the compressor of these.

        Matrices have chunks in two dimensions, all other tensors in one, in the order of memory.
        """
        rows, columns = (1, x.numel()) if x.ndim != 2 else x.shape if x.is_contiguous() else x.shape[::-1]
        return _chunked(rows, columns, self.chunk, self.density)

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        grid, n, blocks = self._layout(x)
        if x.is_meta:
            return blocks.compress(x.new_empty(n), state, ctx)
        coefficients = grid.transform(flat(x).to(float_at_least_32(x.dtype)))
        chosen = blocks.select(coefficients, blocks.k(n), ctx)
        values = shortened(coefficients[chosen], x.dtype, torch.finfo(x.dtype).max)
        return blocks.encode(chosen, values, n, ctx)

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        grid, n, blocks = self._layout(like)
        coefficients = payload[0].new_zeros(n, dtype=float_at_least_32(payload[0].dtype))
        indices, values = blocks.decompress(payload, coefficients, state, ctx).entries()
        coefficients[indices] = values.to(coefficients.dtype)
        return Dense(grid.back(coefficients))
