"""Linear sketches of gradients: their sum over the workers gives the squared norm of the mean gradient.

Elements get random signs and are added up into a few sums, whose squares have the squared norm as their expected sum.
The signs are the same on all workers, so the sums of the mean gradient are the means of the workers' sums. Next to them
travels the worker's own squared norm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from thinwire.coding.bitpack import unpack_bits
from thinwire.core.context import Context

TENSOR_SUMS = 31
"""Signed sums of a tensor with one ratio. A prime, so that neither rows nor columns of a matrix share a sum."""
CHEAP = 1 / 32
"""Bits per element and step up to which ``per="auto"`` takes a ratio per row."""


@dataclass(frozen=True)
class Layout:
    """The part of a sketch that belongs to one tensor: for each ratio, ``sums`` signed sums and a squared norm."""

    ratios: int
    sums: int

    @property
    def numbers(self) -> int:
        """Number of float32 values in the message."""
        return self.ratios * (self.sums + 1)


def layout(shape: Sequence[int], per: str, sketches: int, every: int) -> Layout:
    """Choose the layout for a tensor of this shape, sketched once in ``every`` steps.

    Args:
        shape: of the tensor; the first dimension counts the rows.
        per: "row", "tensor", or "auto" for rows where they cost at most ``CHEAP``. Vectors have one ratio.
        sketches: signed sums of a row.
        every: steps from one sketch to the next.
    """
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    sums = min(sketches, columns)
    cheap = 32 * (sums + 1) <= CHEAP * columns * every
    if rows > 1 and columns > 0 and (per == "row" or (per == "auto" and cheap)):
        return Layout(rows, sums)
    return Layout(1, max(1, min(TENSOR_SUMS, rows * columns)))


def sketch(x: Tensor, of: Layout, ctx: Context) -> Tensor:
    """Compute the sums and the squared norm of each row, ``[ratios, sums + 1]``; element j is in sum ``j mod sums``.

    Args:
        x: the gradient as ``[ratios, elements]``, in at least float32.
        of: its layout.
        ctx: seed, step and unit, which decide the signs. They are independent for all elements, since rows of a
            gradient resemble each other and must not share an error.
    """
    words = torch.empty(-(-x.numel() // 64), dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=ctx.generator(shared=True))  # all 64 bits
    minus = unpack_bits(words.view(torch.uint8).to(x.device))[: x.numel()].bool().view_as(x)
    signed = torch.nn.functional.pad(torch.where(minus, -x, x), (0, -x.shape[1] % of.sums))
    norms = cast(Tensor, torch.linalg.vector_norm(x, dim=1, keepdim=True))
    return torch.cat([signed.view(of.ratios, -1, of.sums).sum(1), norms.square()], 1)


def squared_norms(summed: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """Estimate ``||mean_i g_i||^2`` and compute ``mean_i ||g_i||^2``, both ``[ratios]``, from a sum of sketches."""
    mean = summed / world
    return mean[:, :-1].square().sum(1), mean[:, -1]


def noise_scale(mean: float, local: float, world: int) -> float:
    """Estimate ``tr(Sigma) / ||G||^2`` from ``||mean_i g_i||^2`` and ``mean_i ||g_i||^2``, in batches of one worker.

    With ``mean = ||G||^2 + tr(Sigma) / N`` and ``local = ||G||^2 + tr(Sigma)``; infinite if no signal is left.
    """
    signal, noise = world * mean - local, world * (local - mean)
    return max(noise, 0.0) / signal if signal > 0.0 else math.inf
