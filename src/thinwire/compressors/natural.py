"""Natural compression: rounding of every element to a power of two."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from thinwire.coding.bitpack import pack_bits, unpack_bits
from thinwire.compressors.block_scales import as_float32
from thinwire.core.context import Context
from thinwire.core.interfaces import Compressor, Payload, State, Traits
from thinwire.core.registry import register
from thinwire.core.tensors import Decompressed, Dense, flat

MANTISSA = 23
"""Bits of a float32 below its exponent."""


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
        return Traits(splittable=True, contraction=self._contraction, variance=self._variance)

    def _variance(self, n: int) -> float:
        return 0.125

    def _contraction(self, n: int) -> float:
        return 0.875

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
