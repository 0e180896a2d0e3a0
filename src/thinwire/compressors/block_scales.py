"""Runs of equal length, each with a scale of its own: what the quantisers share.

A scale is float32, and NaN where what it was made of is not finite, so that whoever sums the scales sees it. What lies
beyond float32 saturates.
"""

import math
from typing import cast

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def count(n: int, size: int) -> int:
    """Blocks of n elements; the last may be short."""
    return math.ceil(n / size)


def as_float32(x: Tensor) -> Tensor:
    """``x`` in float32; what is finite stays so."""
    short = x.float()
    return torch.where(x.isfinite(), short.clamp(-LARGEST, LARGEST), short) if x.dtype == torch.float64 else short


def in_blocks(x: Tensor, size: int, *, repeat: bool = False) -> Tensor:
    """``x`` ``[n]`` as ``[count(n, size), size]``; zeros fill the last one, or, to ``repeat``, its last element."""
    missing = -x.numel() % size
    if missing:
        fill = x[-1:].expand(missing) if repeat else x.new_zeros(missing)
        x = torch.cat([x, fill])
    return x.view(-1, size)


def scale_of(wide: Tensor) -> Tensor:
    """A scale as it is sent, float32."""
    return torch.where(wide.isfinite(), wide.clamp(-LARGEST, LARGEST), torch.nan).float()


def l2(rows: Tensor) -> Tensor:
    """The l2 norm of each row, float64: squares of what is small do not vanish."""
    return cast(Tensor, torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
