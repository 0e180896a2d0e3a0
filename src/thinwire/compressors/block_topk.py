"""Block-wise Top-k: the largest elements of each block."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from thinwire.compressors import chunked_indices
from thinwire.compressors.sampling import largest_of_each
from thinwire.core.capabilities import Adjustable
from thinwire.core.checks import check_fields, share, whole
from thinwire.core.context import Context
from thinwire.core.interfaces import Compressor, Payload, State, Traits
from thinwire.core.registry import register
from thinwire.core.tensors import Decompressed, Sparse, flat
from thinwire.kernels.reference import REFERENCE


@register("block_topk")
@dataclass(frozen=True)
class BlockTopK(Compressor, Adjustable):
    """Sends the ``ceil(density * B)`` elements of largest magnitude of each block of B.

    ``||x - C(x)||^2 <= (1 - density) ||x||^2``, as for Top-k. It loses more than Top-k if the blocks differ. Every
    block is searched on its own, without a threshold or a pass over the whole tensor.

    Args:
        density: kept / total, in (0, 1]; at least one element of each block.
        block: elements of a block, in the order of memory; the last may be short.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: k values, and k indices as in ``thinwire.compressors.chunked_indices``: 12 bits each for one in 4096, 9.0
    for 32. The size is the same at every step.

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

    def with_density(self, density: float) -> "BlockTopK":
        return replace(self, density=max(density, self.density))

    def scaled_density(self, factor: float) -> "BlockTopK":
        return replace(self, density=min(1.0, factor * self.density))

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            splittable=True, needs_feedback=self.density < 1.0, keeps_values=True, contraction=self._contraction
        )

    def _contraction(self, n: int) -> float:
        return self.density

    def sizes(self, n: int) -> tuple[int, int]:
        """Return the number of elements sent of each whole block and in all."""
        each = math.ceil(self.density * min(self.block, n))
        return each, n // self.block * each + math.ceil(self.density * (n % self.block))

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        n = x.numel()
        each, k = self.sizes(n)
        size = min(self.block, n)
        if x.is_meta:
            return x.new_empty(k), x.new_empty(chunked_indices.nbytes(k, n, size), dtype=torch.uint8)
        flattened = flat(x)
        magnitude, whole = flattened.abs(), n - n % self.block
        rows = largest_of_each(magnitude[:whole].view(-1, self.block), each)
        tail = REFERENCE.largest(magnitude[whole:], math.ceil(self.density * (n - whole))) + whole
        chosen = torch.cat([rows, tail])
        return flattened[chosen], chunked_indices.encode(chosen, n, size, ctx)

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        n = like.numel()
        each, k = self.sizes(n)
        return Sparse(chunked_indices.decode(payload[1], k, n, min(self.block, n), each, ctx), payload[0], self.density)
