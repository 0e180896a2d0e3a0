"""The base of the compressors that select elements, and send their values and indices."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.coding import elias_fano
from thinwire.coding import values as codes
from thinwire.compressors.cast import DTYPES, OWN, dtype_named
from thinwire.core import Compressor, Context, Decompressed, Payload, Sparse, State, ThinwireError, Traits, flat
from thinwire.core.capabilities import Adjustable, LeaderSelected, SumsSparsely, TakesSparse
from thinwire.core.checks import dtype, optional
from thinwire.core.loops import Found
from thinwire.core.tensors import float_at_least_32, shortened
from thinwire.kernels.reference import REFERENCE

VALUES = optional(dtype((*codes.CODES, *DTYPES), OWN))
"""Check of ``values``: a code, a dtype or None."""


class Sparsifier(Compressor, Adjustable, SumsSparsely, TakesSparse, LeaderSelected):
    """A compressor that sends k of n elements: their values, and their indices in Elias-Fano code.

    A member is a frozen dataclass with a density and ``select``. If it selects fewer than k elements, the last index is
    repeated with value 0; a code has no 0, so there a repeated index means 0.
    """

    values: str | None = None
    """Dtype or code of the values on the wire, None for the tensor's dtype."""
    _repeats: ClassVar[bool] = True
    """False if always k elements are selected, so that no index is repeated."""

    def k(self, n: int) -> int:
        """Return the number of elements sent of n."""
        return min(n, math.ceil(self._share * n))

    @abstractmethod
    def select(self, x: Tensor, k: int, ctx: Context) -> Tensor:
        """Return the ascending indices of the elements of ``x`` ``[m]`` to send, at most k."""

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            splittable=True,
            needs_feedback=self._needs_feedback,
            keeps_values=self.values not in codes.CODES,
            selects=self.values is None,
            contraction=self._contraction,
        )

    @property
    def _needs_feedback(self) -> bool:
        return self._share < 1.0

    def _contraction(self, n: int) -> float:
        return 1.0 / (2 * max(n, 1))  # the largest is sent

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        if not x.is_meta:
            return self.encode(*self._found(x, ctx), x.numel(), ctx)
        k = self.k(x.numel())
        indices = x.new_empty(self._indices_nbytes(x.numel()), dtype=torch.uint8)
        if self.values in codes.CODES:
            scales, packed = codes.sizes(self.values, k)
            return x.new_empty(scales, dtype=torch.float32), x.new_empty(packed, dtype=torch.uint8), indices
        return x.new_empty(k, dtype=dtype_named(self.values, x.dtype)), indices

    def _found(self, x: Tensor, ctx: Context) -> Found:
        chosen = self.select(flat(x), self.k(x.numel()), ctx)
        return chosen, flat(x)[chosen]

    def compress_sparse(self, x: Sparse, like: Tensor, state: State, ctx: Context) -> Payload:
        chosen = self.select(x.values, self.k(like.numel()), ctx)
        return self.encode(x.indices[chosen], x.values[chosen].to(like.dtype), like.numel(), ctx)

    def follow(self, x: Tensor, choice: Payload, state: State, ctx: Context) -> Payload:
        return flat(x)[self._decode_indices(choice[0], x.numel(), ctx)], *choice

    def encode(self, chosen: Tensor, values: Tensor, n: int, ctx: Context) -> Payload:
        """Encode ``values`` ``[m]`` at the indices ``chosen``, int64 ``[m]`` ascending below n, ``m <= k``."""
        k = self.k(n)
        if values.numel() > k:
            raise ThinwireError(f"{values.numel()} values for a message of {k}, of {n} elements; send at most {k}")
        if self.values in codes.CODES or values.numel() < k:  # a code has no 0
            chosen, values = (ctx.kernels or REFERENCE).fill(chosen, values, k)
        if self.values in codes.CODES:
            parts = codes.encode(values, self.values)
        else:
            dtype = dtype_named(self.values, values.dtype)
            if torch.finfo(dtype).max < torch.finfo(values.dtype).max:  # saturate: the residual keeps the rest
                values = shortened(values, dtype, torch.finfo(dtype).max)
            parts = (values.to(dtype),)
        return *parts, self._encode_indices(chosen, n, ctx)

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        indices = self._decode_indices(payload[-1], like.numel(), ctx)
        values = self._decode_values(payload, like.numel())
        if self._repeats:  # padding must become 0, even if the code, or the compressor after >>, has no 0
            values = (ctx.kernels or REFERENCE).without_repeats(indices, values)
        return Sparse(indices, values, self._share, ctx.kernels)

    def together(
        self, payloads: Sequence[tuple[int, Payload]], like: Tensor, ctx: Context, alpha: float, most: float
    ) -> Found | None:
        if self._share * len(payloads) > most:
            return None
        n, dtype = like.numel(), float_at_least_32(like.dtype)
        values = [self._decode_values(payload, n).to(dtype) for _, payload in payloads]
        return (ctx.kernels or REFERENCE).gather([payload[-1] for _, payload in payloads], values, n, alpha)

    def _decode_values(self, payload: Payload, n: int) -> Tensor:
        if self.values in codes.CODES:
            return codes.decode(payload[0], payload[1], self.values, self.k(n))
        return payload[0]

    def _indices_nbytes(self, n: int) -> int:
        return sum(elias_fano.sizes(self.k(n), n))

    def _encode_indices(self, indices: Tensor, n: int, ctx: Context) -> Tensor:
        return (ctx.kernels or REFERENCE).encode_indices(indices, n)

    def _decode_indices(self, packed: Tensor, n: int, ctx: Context) -> Tensor:
        return (ctx.kernels or REFERENCE).decode_indices(packed, self.k(n), n)
