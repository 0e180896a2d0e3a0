"""Blocks of equal length with one scale each, as the quantisers use them.

A scale is float32. It is NaN if its block has a nonfinite element, so the sum over ranks is nonfinite too. Values
beyond float32's range saturate.
"""

from typing import cast

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def as_float32(x: Tensor) -> Tensor:
    """Convert ``x`` to float32; finite values stay finite."""
    short = x.float()
    return torch.where(x.isfinite(), short.clamp(-LARGEST, LARGEST), short) if x.dtype == torch.float64 else short


def in_blocks(x: Tensor, size: int, *, repeat: bool = False) -> Tensor:
    """Reshape ``x`` ``[n]`` to ``[ceil(n / size), size]``, padded with zeros or, with ``repeat``, its last element."""
    missing = -x.numel() % size
    if missing:
        fill = x[-1:].expand(missing) if repeat else x.new_zeros(missing)
        x = torch.cat([x, fill])
    return x.view(-1, size)


def scale_of(wide: Tensor) -> Tensor:
    """Convert scales to float32 as they are sent: saturated, and NaN if nonfinite."""
    return torch.where(wide.isfinite(), wide.clamp(-LARGEST, LARGEST), torch.nan).float()


def l2(rows: Tensor) -> Tensor:
    """Return the l2 norm of each row in float64, in which squares of small values do not underflow."""
    return cast(Tensor, torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
