"""Scaled signs: one bit per element, and a scale for each block."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from thinwire.coding.bitpack import pack_bits, unpack_bits
from thinwire.compressors.quantize import as_float32, in_blocks, l2, scale_of
from thinwire.core import Compressor, Context, Decompressed, Dense, Payload, State, Traits, flat, register
from thinwire.core.checks import check_fields, one_of, whole


@register("sign")
@dataclass(frozen=True)
class Sign(Compressor):
    """A quantiser that sends the sign of every element, and the scale of each block of B.

    ``l1``: ``sign(x) ||x||_1 / B``, so ``||x - C(x)||^2 = (1 - rho^2) ||x||^2`` with
    ``rho = ||x||_1 / (sqrt(B) ||x||_2)``, ``rho^2 >= 1/B``.
    ``l2``: ``sign(x) ||x||_2 / sqrt(B)`` keeps the norm, and loses ``2 (1 - rho) ||x||^2``: more than ``||x||^2``
    if ``rho < 1/2``, as for sparse gradients.
    ``none``: only a vote, ``sign(x)``.

    Args:
        block: elements that share a scale.
        scale: ``"l1"``, ``"l2"`` or ``"none"``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: 1 bit per element, and a float32 for each block (``none``: for each tensor).

    Example:
        >>> x = torch.tensor([1.0, -2.0, 3.0])
        >>> payload = Sign().compress(x, {}, NOWHERE)
        >>> Sign().decompress(payload, x, {}, NOWHERE).write_to(out := torch.empty(3)); out
        tensor([ 2., -2.,  2.])

    Source: S. Karimireddy, Q. Rebjock, S. Stich, M. Jaggi, "Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes", 2019, arXiv:1901.09847, algorithm 1; l2: H. Tang et al., "1-bit Adam", 2021, arXiv:2102.02888.

    Departures: a scale for each block, not for the tensor; padding of the last block does not count. ``sign(0)`` is 1
    with a scale. A vote has no feedback to correct it, so there ``sign(0)`` is drawn by seed, and a tensor of zeros
    casts no vote.
    """

    block: int = 4096
    scale: Literal["l1", "l2", "none"] = "l1"

    def __post_init__(self) -> None:
        check_fields(self, block=whole(1), scale=one_of("l1", "l2", "none"))

    @cached_property
    def traits(self) -> Traits:
        return Traits(splittable=True, needs_feedback=True, votes=self.scale == "none", contraction=self._contraction)

    def _contraction(self, n: int) -> float:
        return 1.0 / max(1, min(n, self.block)) if self.scale == "l1" else 0.0

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        n = x.numel()
        if x.is_meta:
            scales = 1 if self.scale == "none" else -(-n // self.block)
            return x.new_empty(scales, dtype=torch.float32), x.new_empty(-(-n // 8), dtype=torch.uint8)
        y = as_float32(flat(x))
        negative = y < 0
        if self.scale == "none" and not (there := y != 0).all():
            coins = torch.randint(2, (n,), dtype=torch.uint8, generator=ctx.generator(), device="cpu").to(x.device)
            negative = torch.where(there, negative, coins > 0)
        return self._scales(y), pack_bits(negative.to(torch.uint8))

    def _scales(self, y: Tensor) -> Tensor:
        n = y.numel()
        if self.scale == "none":
            some = y.new_ones(1).masked_fill_(y.isfinite().all().logical_not(), torch.nan)
            return some.masked_fill_((y == 0).all(), 0.0)
        rows = in_blocks(y, self.block)
        sizes = torch.full((len(rows),), self.block, dtype=torch.float64, device=y.device)
        sizes[-1:] -= len(rows) * self.block - n
        if self.scale == "l1":
            return scale_of(rows.abs().sum(1, dtype=torch.float64) / sizes)
        return scale_of(l2(rows) / sizes.sqrt())

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        scales, packed = payload
        n = like.numel()
        size = max(n, 1) if self.scale == "none" else self.block
        negative = in_blocks(unpack_bits(packed)[:n], size) > 0
        return Dense(torch.where(negative, -scales.unsqueeze(1), scales.unsqueeze(1)).reshape(-1)[:n])
