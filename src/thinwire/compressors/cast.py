"""Cast: send every element, in its own dtype or a shorter one."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from thinwire.core import Compressor, Context, Decompressed, Dense, Payload, State, Traits, flat, register
from thinwire.core.checks import check_fields, dtype, optional
from thinwire.core.tensors import shortened

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


OWN = ", or None for the tensor's own"


def dtype_named(name: str | None, default: torch.dtype) -> torch.dtype:
    """Return the dtype of that name, or ``default`` for None."""
    return default if name is None else DTYPES[name]


@register("cast")
@dataclass(frozen=True)
class Cast(Compressor):
    """A compressor that sends every element cast to ``dtype``; with None it is the identity.

    Args:
        dtype: ``"float16"`` or ``torch.float16``, ``"bfloat16"``, ``"float32"``, ``"float64"``; None for the tensor's.

    Raises:
        ThinwireError: the dtype is unknown.

    **Wire**: 2, 4 or 8 bytes per element, summed by an all-reduce.

    Departures from PyTorch's ``fp16_compress_hook``: none without a memory; a float16 overflow becomes infinite there
    too. With error feedback finite values saturate (at half of the range if an all-reduce sums them, since a sum
    rounds), and the rest stays in the residual.
    """

    dtype: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, dtype=optional(dtype(tuple(DTYPES), OWN)))

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            summable=True,
            splittable=True,
            linear=True,
            keeps_values=True,
            contraction=self._contraction,
            variance=self._variance,
        )

    def _contraction(self, n: int) -> float | None:
        return 1.0 if self.dtype is None else 0.999

    def _variance(self, n: int) -> float | None:
        return 0.0 if self.dtype is None else None

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        short = dtype_named(self.dtype, x.dtype)
        limit = ctx.saturates * torch.finfo(short).max
        if 0.0 < limit < torch.finfo(x.dtype).max and short != x.dtype:
            return (shortened(flat(x), short, limit),)
        return (flat(x).to(short),)

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        return Dense(payload[0])
