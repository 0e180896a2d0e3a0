"""Quantisers with a scale for each block: QSGD, and CGX's max-min levels.

A scale is float32. It is NaN if its block has a nonfinite element, so the sum over ranks is nonfinite too. Values
beyond float32's range saturate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor

from thinwire.coding.bitpack import pack_fields, unpack_fields
from thinwire.core import Compressor, Context, Decompressed, Dense, Payload, State, Traits, flat, register
from thinwire.core.capabilities import ErrorTable
from thinwire.core.checks import check_fields, one_of, whole

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


def lost_in_rounding(shares: Tensor, scales: Tensor, n: int, tops: Sequence[int], *, randomly: bool) -> list[float]:
    """Return ``E||rounded - x||^2`` with each number ``tops`` of levels above 0.

    ``shares`` are the elements over the scale of their block, in [0, 1]; only the first n count. Rounded ``randomly``,
    an element with the fractional level f loses ``f (1 - f)``; else the distance to the nearest level, squared.
    """
    lost: list[float] = []
    for top in tops:
        levels = shares * top
        beyond = levels - levels.floor()
        squares = beyond * (1.0 - beyond) if randomly else torch.minimum(beyond, 1.0 - beyond).square()
        squares.view(-1)[n:] = 0.0
        lost.append(float(squares.sum(1, dtype=torch.float64) @ scales.double().square()) / top**2)
    return lost


def rounded_randomly(levels: Tensor, ctx: Context) -> Tensor:
    """Round each of ``levels``, floats of at least 0, at random to one of its two neighbours, without bias."""
    low = levels.floor()
    luck = torch.rand(levels.shape, generator=ctx.generator(), dtype=torch.float32, device="cpu").to(levels.device)
    return low.add_(luck < levels - low)


@register("qsgd")
@dataclass(frozen=True)
class QSGD(Compressor, ErrorTable):
    """Rounds every element at random to one of ``s = 2^(bits-1) - 1`` magnitudes and a sign; unbiased.

    ``r = ||x_B||`` of each block, ``a = s |x| / r``, ``level = floor(a) + Bernoulli(a - floor(a))``, sent as
    ``sign(x) r level / s``. ``E||x - C(x)||^2 <= omega ||x||^2`` with ``omega = min(B / 4 s^2, sqrt(B) / s)`` for
    blocks of B. With ``norm="max"`` fewer elements are 0 and the variance is smaller.

    Args:
        bits: bits per element, 2 to 8. One bit would leave only the magnitude 0.
        block: elements that share a scale.
        norm: ``"l2"`` as in the paper, or ``"max"``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: ``bits`` per element and a float32 for each block: 4.06 bits for 4 bits and blocks of 512.

    Example:
        >>> x = torch.tensor([0.0, 3.0, -4.0])
        >>> payload = QSGD(2).compress(x, {}, NOWHERE)
        >>> QSGD(2).decompress(payload, x, {}, NOWHERE).write_to(out := torch.empty(3)); out.abs().tolist()[0]
        0.0

    Source: D. Alistarh, D. Grubic, J. Li, R. Tomioka, M. Vojnovic, "QSGD: Communication-Efficient SGD via Gradient
    Quantization and Encoding", 2017, arXiv:1610.02132, section 3.

    Departures: levels take a fixed number of bits; the length of the paper's Elias codes depends on the values.
    ``B / 4 s^2`` replaces the paper's ``B / s^2``, since a Bernoulli variable has a variance of at most 1/4.
    """

    bits: int
    block: int = 512
    norm: Literal["l2", "max"] = "l2"

    def __post_init__(self) -> None:
        says = (
            "QSGD takes 2 to 8: of 1 bit the sign would be all, with 2^0 - 1 = 0 magnitudes; use Sign() with "
            "ErrorFeedback(), or TernGrad(), and beyond 8 Cast('float16')"
        )
        check_fields(self, bits=whole(2, 8, says=says), block=whole(1), norm=one_of("l2", "max"))

    @property
    def levels(self) -> int:
        """The number ``s`` of magnitudes above 0."""
        return 2 ** (self.bits - 1) - 1

    @cached_property
    def traits(self) -> Traits:
        return Traits(splittable=True, contraction=self._contraction, variance=self._variance)

    def _variance(self, n: int) -> float:
        size, s = min(n, self.block), self.levels
        return min(size / (4 * s * s), math.sqrt(size) / s)

    def _contraction(self, n: int) -> float:
        return max(0.0, 1.0 - self._variance(n))

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        n, blocks = x.numel(), -(-x.numel() // self.block)
        if x.is_meta:
            return x.new_empty(blocks, dtype=torch.float32), x.new_empty(-(-n * self.bits // 8), dtype=torch.uint8)
        rows = in_blocks(as_float32(flat(x)), self.block)
        shares, scales = self._shares(rows)
        levels = rounded_randomly(shares.mul_(self.levels), ctx).clamp_(max=self.levels)
        fields = levels.to(torch.uint8) | (rows < 0).to(torch.uint8) << (self.bits - 1)
        return scales, pack_fields(fields.view(-1)[:n], self.bits)

    def _shares(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return magnitudes over the scale of their block, and the scales."""
        scales = scale_of(l2(rows) if self.norm == "l2" else rows.abs().amax(1))
        return rows.abs() / torch.where(scales > 0, scales, 1.0).unsqueeze(1), scales

    def losses(self, x: Tensor, family: Sequence[Compressor]) -> list[float] | None:
        """Return the expectation over the rounding, if all have the same blocks and norm."""
        alike = cast("Sequence[QSGD]", family)
        if any((one.block, one.norm) != (self.block, self.norm) for one in alike):
            return None
        shares, scales = self._shares(in_blocks(as_float32(flat(x)), self.block))
        return lost_in_rounding(shares, scales, x.numel(), [one.levels for one in alike], randomly=True)

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        scales, packed = payload
        n = like.numel()
        rows = in_blocks(unpack_fields(packed, self.bits)[:n], self.block)
        s = self.levels
        table = torch.arange(s + 1, dtype=torch.float32, device=packed.device) / s
        shares = torch.cat([table, -table])[rows.int()]
        return Dense(shares.mul_(scales.unsqueeze(1)).view(-1)[:n])


@register("quantize")
@dataclass(frozen=True)
class Quantize(Compressor, ErrorTable):
    """Rounds every element to one of ``2^bits`` levels, evenly spaced from the minimum of its block to the maximum.

    ``u = (max - min) / (2^bits - 1)``, ``level = floor((x - min) / u + r)`` with ``r = 1/2`` (nearest) or uniform in
    [0, 1) (stochastic, unbiased), sent as ``min + u level``. The error of an element is at most u/2 (stochastic: in
    the root mean square), and ``||x||^2 >= (max - min)^2 / 2``. So ``||x - C(x)||^2 <= B / 2 (2^bits - 1)^2 ||x||^2``
    for blocks of B. Error feedback is safe if that factor is below 1: B < 18, 98, 450, 1922 with 2, 3, 4, 5 bits.

    Args:
        bits: bits per element, 1 to 8.
        block: elements that share a minimum and a maximum; 256 is safe with error feedback from 4 bits on.
        rounding: ``"nearest"`` has half the error, but a bias: from 4 bits on CGX trains without feedback, with fewer
            bits a memory is required. Or ``"stochastic"``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: ``bits`` per element and two float32 for each block: 4.125 bits for 4 bits and blocks of 512.

    Example:
        >>> x = torch.tensor([0.0, 0.9, 2.2, 3.0])
        >>> payload = Quantize(2).compress(x, {}, NOWHERE)
        >>> Quantize(2).decompress(payload, x, {}, NOWHERE).write_to(out := torch.empty(4)); out
        tensor([0., 1., 2., 3.])

    Source: I. Markov, H. Ramezanikebrya, D. Alistarh, "CGX: Adaptive System Support for Communication-Efficient Deep
    Learning", 2022, arXiv:2111.08617, section 4.

    Departures: the scales are the float32 minimum and maximum, so both are exact; values beyond half of float32's
    range saturate.
    """

    bits: int
    block: int = 256
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        bits = whole(1, 8, says="Quantize takes 1 to 8, whole; beyond, use Cast('float16')")
        check_fields(self, bits=bits, block=whole(1), rounding=one_of("nearest", "stochastic"))

    @cached_property
    def traits(self) -> Traits:
        coarse = self.rounding == "nearest" and self.bits < 4
        return Traits(splittable=True, needs_feedback=coarse, contraction=self._contraction, variance=self._variance)

    def _contraction(self, n: int) -> float:
        return max(0.0, 1.0 - self._worst(n))

    def _variance(self, n: int) -> float | None:
        return self._worst(n) if self.rounding == "stochastic" else None

    def _worst(self, n: int) -> float:
        size = min(n, self.block)
        return size / (2 * (2**self.bits - 1) ** 2) + 1e-6  # for float32 rounding

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        n, blocks, top = x.numel(), -(-x.numel() // self.block), 2**self.bits - 1
        if x.is_meta:
            return x.new_empty(blocks, 2, dtype=torch.float32), x.new_empty(-(-n * self.bits // 8), dtype=torch.uint8)
        rows = in_blocks(as_float32(flat(x)), self.block, repeat=True)
        half = torch.finfo(torch.float32).max / 2  # so that a difference is finite
        ends = torch.stack(rows.aminmax(dim=1), 1)  # [blocks, 2]
        ends = torch.where(ends.isfinite(), ends.clamp(-half, half), torch.nan)
        low, span = ends[:, :1], ends.diff(dim=1)
        place = (rows - low).div_(torch.where(span > 0, span, 1.0)).clamp_(0.0, 1.0).mul_(top)
        levels = rounded_randomly(place, ctx) if self.rounding == "stochastic" else place.add_(0.5).floor_()
        fields = levels.clamp_(max=top).to(torch.uint8)
        return ends, pack_fields(fields.view(-1)[:n], self.bits)

    def losses(self, x: Tensor, family: Sequence[Compressor]) -> list[float] | None:
        """Return the expectation over the rounding, if all have the same blocks and rounding."""
        alike = cast("Sequence[Quantize]", family)
        if any((one.block, one.rounding) != (self.block, self.rounding) for one in alike):
            return None
        rows = in_blocks(as_float32(flat(x)), self.block, repeat=True)
        low, high = rows.aminmax(dim=1, keepdim=True)
        span = high - low
        place = (rows - low).div_(torch.where(span > 0, span, 1.0))
        tops = [2**one.bits - 1 for one in alike]
        return lost_in_rounding(place, span.view(-1), x.numel(), tops, randomly=self.rounding == "stochastic")

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        ends, packed = payload
        n, top = like.numel(), 2**self.bits - 1
        rows = in_blocks(unpack_fields(packed, self.bits)[:n], self.block)
        up = (torch.arange(top + 1, dtype=torch.float32, device=packed.device) / top)[rows.int()]
        return Dense(((1.0 - up) * ends[:, :1] + up * ends[:, 1:]).view(-1)[:n])
