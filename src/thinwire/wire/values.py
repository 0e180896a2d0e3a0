"""Values in 1, 2, 4 or 8 bits: what stands beside the indices of a sparse message.

What a selection sends clusters just above its threshold, so the levels span the magnitudes that are there, and none
is spent on zero. With ``m = |v|`` over the values of one message, ``lo = min m``, ``range = max m - lo``, ``b`` bits:

``sign``    ``v -> sign(v) mean(m)``, which keeps the l1 norm
``int<b>``  ``v -> sign(v) (lo + range * level / L)``, ``level = round(L (m - lo) / range)``, ``L = 2^(b-1) - 1``;
            halves round to even, and the level is 0 where the range is

So ``||v - v^||^2 <= (1 - 1/k) ||v||^2``: a sign keeps ``(sum m)^2 / k`` of the energy, the levels at least ``max m^2``.

Format: float32 scales, ``mean`` or ``lo, range``, then ``ceil(k b / 8)`` bytes of b-bit fields as in ``bitpack``, each
``sign << (b - 1) | level``. The scales are NaN when a value is not finite, so whoever sums them sees it; what lies
beyond float32 saturates. A code has no zero to fill a message with: the caller marks what only fills it.

Source: F. Sattler et al., "Sparse Binary Compression", 2018, arXiv:1805.08768, for the sign with a mean magnitude;
the levels are plain uniform quantisation.
"""

import torch
from torch import Tensor

from thinwire.core import float_at_least_32
from thinwire.wire.bitpack import pack_fields, unpack_fields

CODES = {"sign": 1, "int2": 2, "int4": 4, "int8": 8}
"""The name of each code, and its bits a value."""


def sizes(code: str, k: int) -> tuple[int, int]:
    """Scales (float32), and bytes of k values."""
    return 1 if code == "sign" else 2, -(-k * CODES[code] // 8)


def encode(values: Tensor, code: str, k: int) -> tuple[Tensor, Tensor]:
    """Encode at most k floats ``[m]`` to (scales, uint8), of the ``sizes`` of k; the fields after the m-th are 0."""
    count, _ = sizes(code, k)
    magnitude = values.abs().to(float_at_least_32(values.dtype)).clamp_(max=torch.finfo(torch.float32).max)
    fields = values.lt(0).to(torch.uint8)
    if not values.numel():
        scales = torch.zeros(count, dtype=torch.float32, device=values.device)
    elif code == "sign":
        scales = magnitude.mean(dtype=torch.float64).float().view(1)
    else:
        levels = 2 ** (CODES[code] - 1) - 1
        least, most = torch.aminmax(magnitude)
        lo = least.float()
        span = (most - lo).clamp(min=0).float()  # lo may have been rounded up
        level = ((magnitude - lo) / span).mul_(levels).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(0, levels)
        fields = (fields * (levels + 1)) | level.to(torch.uint8)
        scales = torch.stack([lo, span])
    scales = torch.where(values.isfinite().all(), scales, torch.nan)
    return scales, pack_fields(torch.nn.functional.pad(fields, (0, k - values.numel())), CODES[code])


def decode(scales: Tensor, packed: Tensor, code: str, k: int) -> Tensor:
    """The inverse of ``encode``, as far as there is one: float32 ``[k]``."""
    fields = unpack_fields(packed, CODES[code])[:k]
    if code == "sign":
        return torch.where(fields > 0, -scales, scales)
    levels = 2 ** (CODES[code] - 1) - 1
    magnitude = (fields & levels).to(torch.float32).div_(levels).mul_(scales[1]).add_(scales[0])
    return torch.where(fields > levels, -magnitude, magnitude)
