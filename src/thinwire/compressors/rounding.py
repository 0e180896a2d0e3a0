"""Quantisers that round every element at random, without blocks: TernGrad, and natural compression."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from thinwire.coding.bitpack import pack_bits, pack_trits, unpack_bits, unpack_trits
from thinwire.compressors.quantize import as_float32, l2, scale_of
from thinwire.core import Compressor, Context, Decompressed, Dense, Payload, State, Traits, flat, register
from thinwire.core.checks import check_fields, optional, real

MANTISSA = 23
"""Bits of a float32 below its exponent."""


@register("terngrad")
@dataclass(frozen=True)
class TernGrad(Compressor):
    """A quantiser that sends the sign of an element with a probability proportional to its magnitude, and one scale.

    ``y = clamp(x, -c, c)`` with ``c = clip_rms * rms(x)``; ``s = max |y|``; sent is ``s sign(y) Bernoulli(|y| / s)``.
    Unbiased without clipping, ``omega = (sqrt(n) - 1) / 2``. Clipping at 2.5 adds a bias of 0.24 % of the energy of
    normal data, and cuts the variance of a million normal values from 2.8 to 1.0.

    Args:
        clip_rms: clipping bound in root mean squares of the tensor; None for no clipping.

    Raises:
        ThinwireError: ``clip_rms`` is not above 0.

    **Wire**: 1.6 bits per element (five in a byte), and a float32.

    Example:
        >>> x = torch.tensor([2.0, -2.0, 0.0])
        >>> payload = TernGrad().compress(x, {}, NOWHERE)
        >>> TernGrad().decompress(payload, x, {}, NOWHERE).write_to(out := torch.empty(3)); out
        tensor([ 2., -2.,  0.])

    Source: W. Wen, C. Xu, F. Yan, C. Wu, Y. Wang, Y. Chen, H. Li, "TernGrad: Ternary Gradients to Reduce Communication
    in Distributed Deep Learning", 2017, arXiv:1705.07878, algorithm 1 and section 3.2.

    Departures: the deviation is measured from 0, not from the mean, so that a tensor of equal elements (or of one
    element) is not clipped to 0. Workers do not share scales, which would need another collective.
    """

    clip_rms: float | None = 2.5

    def __post_init__(self) -> None:
        check_fields(
            self, clip_rms=optional(real(0.0, above=True, hint=", in root mean squares, or None for no clipping"))
        )

    @cached_property
    def traits(self) -> Traits:
        return Traits(splittable=True, contraction=self._contraction, variance=self._variance)

    def _variance(self, n: int) -> float | None:
        return (math.sqrt(max(n, 1)) - 1.0) / 2.0 + 1e-6 if self.clip_rms is None else None

    def _contraction(self, n: int) -> float:
        return 0.0 if (omega := self._variance(n)) is None else max(0.0, 1.0 - omega)

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        n = x.numel()
        if x.is_meta:
            return x.new_empty(1, dtype=torch.float32), x.new_empty(-(-n // 5), dtype=torch.uint8)
        y = as_float32(flat(x))
        magnitude = y.abs()
        scale = magnitude.amax(0, keepdim=True) if n else y.new_zeros(1)
        if self.clip_rms is not None and n:
            rms = l2(y.view(1, -1)) / math.sqrt(n)
            scale = scale.double().minimum(self.clip_rms * rms)
        scale = scale_of(scale)
        luck = torch.rand(n, generator=ctx.generator(), dtype=torch.float32, device="cpu").to(x.device)
        sent = luck * scale < magnitude
        return scale, pack_trits(torch.where(y < 0, 2, 1).to(torch.uint8).mul_(sent & (magnitude > 0)))

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        scale, packed = payload
        table = torch.cat([torch.zeros_like(scale), scale, -scale])
        return Dense(table[unpack_trits(packed)[: like.numel()].int()])


@register("natural")
@dataclass(frozen=True)
class Natural(Compressor):
    """A quantiser that rounds every element at random to a neighbouring power of two; unbiased, ``omega = 1/8``.

    With ``2^e <= |x| < 2^(e+1)``: to ``2^(e+1)`` with probability ``|x| / 2^e - 1``, else to ``2^e``. Powers of two
    and 0 stay as they are.

    **Wire**: 9 bits per element (sign and exponent of a float32), and one float32: 0, or NaN if ``x`` is nonfinite.

    Example:
        >>> x = torch.tensor([0.0, 0.25, -8.0])
        >>> Natural().decompress(Natural().compress(x, {}, NOWHERE), x, {}, NOWHERE).entries()[1]
        tensor([ 0.0000,  0.2500, -8.0000])

    Source: S. Horvath, C. Ho, L. Horvath, A. Sahu, M. Canini, P. Richtarik, "Natural Compression for Distributed Deep
    Learning", 2019, arXiv:1905.10988, definition 1.

    Departures: none within float32's exponent range, all of which is kept. Values beyond the largest power of two of
    their dtype become that power; below 2^-126 the neighbours are 0 and 2^-126.
    """

    @cached_property
    def traits(self) -> Traits:
        return Traits(splittable=True, contraction=lambda n: 0.875, variance=lambda n: 0.125)

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        n = x.numel()
        if x.is_meta:
            exponents, signs = (x.new_empty(size, dtype=torch.uint8) for size in (n, -(-n // 8)))
            return x.new_empty(1, dtype=torch.float32), exponents, signs
        y = as_float32(flat(x))
        finite = y.new_zeros(1).masked_fill_(y.isfinite().all().logical_not(), torch.nan)
        largest = 2.0 ** min(127, math.frexp(torch.finfo(x.dtype).max)[1] - 1)
        bits = y.clamp(-largest, largest).view(torch.int32)
        luck = torch.randint(2**MANTISSA, (n,), dtype=torch.int32, generator=ctx.generator(), device="cpu").to(x.device)
        up = (bits & (2**MANTISSA - 1)) > luck
        exponents = ((bits >> MANTISSA) & 0xFF) + up
        return finite, exponents.to(torch.uint8), pack_bits((y < 0).to(torch.uint8))

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        finite, exponents, signs = payload
        powers = (exponents.int() << MANTISSA).view(torch.float32)
        negative = unpack_bits(signs)[: like.numel()] > 0
        return Dense(torch.where(negative, -powers, powers).add_(finite))
