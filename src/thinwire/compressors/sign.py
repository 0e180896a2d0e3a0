"""Scaled signs: one bit an element, and a scale for each block."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from thinwire.core import Compressor, Context, Payload, State
from thinwire.tensors import Decompressed, Dense, Sparse, ThinwireError, flat
from thinwire.wire.bitpack import pack_bits, unpack_bits


@dataclass(frozen=True)
class Sign(Compressor):
    """Sends the sign of every element, and the scale of each block of B.

    ``l1``: ``sign(x) ||x||_1 / B``; ``l2``: ``sign(x) ||x||_2 / sqrt(B)``; ``none``: ``sign(x)``.

    Args:
        block: elements that share a scale.
        scale: ``"l1"``, ``"l2"`` or ``"none"``.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: 1 bit an element, and a float32 for each block.

    Source: S. Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", 2019,
    arXiv:1901.09847.
    """

    cuttable: ClassVar[bool] = True

    block: int = 4096
    scale: Literal["l1", "l2", "none"] = "l1"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ThinwireError(f"block is {self.block}; it must be at least 1")
        if self.scale not in ("l1", "l2", "none"):
            raise ThinwireError(f"scale is {self.scale!r}; choose 'l1', 'l2' or 'none'")

    @property
    def needs_feedback(self) -> bool:
        return True

    def contraction(self, n: int) -> float:
        return 1.0 / max(1, min(n, self.block)) if self.scale == "l1" else 0.0

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        n = x.numel()
        if x.is_meta:
            scales = x.new_empty(-(-n // self.block), dtype=torch.float32)
            return scales, x.new_empty(-(-n // 8), dtype=torch.uint8)
        y = flat(x).double()
        rows = [y[start : start + self.block] for start in range(0, n, self.block)]
        if self.scale == "l1":
            means = [row.abs().mean() for row in rows]
        elif self.scale == "l2":
            means = [row.square().mean().sqrt() for row in rows]
        else:
            means = [torch.where(row.isfinite().all(), 1.0, torch.nan) for row in rows]
        scales = torch.stack(means).float() if rows else x.new_empty(0, dtype=torch.float32)
        return scales, pack_bits((flat(x) < 0).to(torch.uint8))

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        scales, packed = payload
        n = like.numel()
        spread = scales.repeat_interleave(self.block)[:n]
        return Dense(torch.where(unpack_bits(packed)[:n] > 0, -spread, spread))

    def compress_sparse(self, x: Sparse, like: Tensor, state: State, ctx: Context) -> Payload:
        out = x.values.new_empty(like.shape, dtype=like.dtype)
        x.write_to(out)
        return self.compress(out, state, ctx)
