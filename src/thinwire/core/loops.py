"""The interface of the kernels: the loops that take most of the time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Found: TypeAlias = tuple[Tensor, Tensor]
"""Elements of a flat tensor: ascending int64 indices, and the values there."""


@dataclass(frozen=True)
class Accumulation:
    """Settings for a kernel that adds a gradient to a memory's state.

    ``u' = m u + s g``, ``v' = v + u'``; with Nesterov ``u' = m (u + s g)``, ``v' = v + u' + s g``; without a momentum
    ``v' = v + s g``. ``s`` is 1 / loss scale. Each operation is rounded to float32; ``m u + (s g)`` is rounded once, as
    a fused multiply-add.
    """

    momentum: float | None
    nesterov: bool = False


@dataclass(frozen=True)
class Pass:
    """A contiguous range of one unit to accumulate and search: 1-D tensors ``[n]``.

    ``grad`` has any floating dtype; ``clear`` sets it to zero. The states are all float32 or all bfloat16.
    """

    rule: Accumulation
    grad: Tensor
    old_residual: Tensor
    new_residual: Tensor
    old_momentum: Tensor | None
    new_momentum: Tensor | None
    scale: float = 1.0
    clear: bool = True


@dataclass(frozen=True)
class Cut:
    """A rule for the elements to send: those not below a threshold, at most the ``k`` of largest magnitude.

    The threshold is the first of ``levels`` that at least ``enough`` elements reach, or the last level.
    """

    threshold: Tensor
    """A scalar above 0, of the tensor's dtype and device."""
    k: int
    lower: float = 1.0
    """In (0, 1]: if fewer than this share of k elements pass, the threshold is multiplied by it."""
    attempts: int = 0

    @property
    def enough(self) -> int:
        return math.ceil(self.lower * self.k)

    def levels(self) -> Tensor:
        """Return ``threshold lower^i`` for i from 0 to ``attempts``, never 0.

        It uses only multiplications, so that every device gets the same bits.
        """
        levels, factor = self.threshold.double().view(1), self.lower
        while levels.numel() <= self.attempts:
            levels, factor = torch.cat([levels, levels * factor]), factor * factor
        dtype = self.threshold.dtype
        return levels[: self.attempts + 1].to(dtype).clamp_(min=smallest(dtype))


def smallest(dtype: torch.dtype) -> float:
    """Return the smallest number above 0, the lowest threshold, since zeros are not sent."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


@dataclass(frozen=True)
class Selection:
    """A selection of about the ``k`` largest magnitudes, by a threshold from a sample.

    The sample is ``run`` elements at every ``stride``-th from ``start`` on, and the threshold its ``rank``-th largest.
    Of the elements that pass, the k largest are kept. If fewer than ``lower * k`` pass, the threshold is multiplied by
    ``lower`` and tried again, at most ``attempts`` times.
    """

    k: int
    start: int
    stride: int
    run: int
    rank: int
    lower: float
    attempts: int

    def cut(self, sampled: Tensor, kernels: "Kernels") -> Cut:
        """Choose the threshold from the sampled magnitudes."""
        threshold = kernels.kth(sampled, self.rank).clamp_(min=smallest(sampled.dtype))
        return Cut(threshold, self.k, self.lower, self.attempts)


class Kernels(Protocol):
    """The loops that take most of the time. All implementations give the same bits as plain PyTorch."""

    name: str

    def runs(self, work: Pass) -> bool:
        """Return True if the kernels support this dtype and device."""
        ...

    def sample(self, work: Pass, start: int, stride: int, run: int) -> Tensor:
        """Return ``|v'|`` before the pass, in any order, for ``run`` elements at every ``stride``-th from ``start`` on.

        A last run that would reach beyond the end is left out. Writes nothing.
        """
        ...

    def accumulate(self, works: Sequence[Pass], cuts: Sequence[Cut]) -> list[Found]:
        """Write the new states; return the ``k`` elements of ``v'`` to send, padded as by ``fill``. NaN is infinite."""
        ...

    def look(self, x: Tensor, cut: Cut) -> Found:
        """Return the ``k`` elements of ``x`` ``[n]`` to send, k <= n, as ``accumulate`` does."""
        ...

    def fill(self, indices: Tensor, values: Tensor, k: int) -> Found:
        """Pad to ``k`` elements: the nonzero ones of ``[m]``, m <= k, then the last of their indices with value 0.

        If there are none, the index is 0.
        """
        ...

    def kth(self, magnitude: Tensor, k: int) -> Tensor:
        """Return the k-th largest of ``magnitude`` ``[n]``, a scalar; 1 <= k <= n, and NaN counts as infinity."""
        ...

    def largest(self, x: Tensor, k: int) -> Tensor:
        """Return ascending indices, int64 ``[min(k, n)]``, of the k largest ``|x|`` ``[n]``; of ties the first."""
        ...

    def add(self, out: Tensor, indices: Tensor, values: Tensor, alpha: float) -> None:
        """Compute ``out[indices] += alpha * values`` in order, for ``out`` of one dimension."""
        ...

    def merge(self, indices: Sequence[Tensor], values: Sequence[Tensor], alpha: float) -> Found:
        """Return the distinct int64 indices of all ``[m_i]``, and the sum of ``alpha * values`` at each, in order."""
        ...

    def gather(self, packed: Sequence[Tensor], values: Sequence[Tensor], n: int, alpha: float) -> Found:
        """Decode each sender's ``packed`` indices, drop repeats from its ``values`` ``[k]``, and ``merge`` them."""
        ...

    def coordinates(self, indices: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the coordinates of flat indices ``[m]`` in a tensor of this shape, int64 ``[len(shape), m]``."""
        ...

    def without_repeats(self, indices: Tensor, values: Tensor) -> Tensor:
        """Return ``values`` ``[k]`` with 0 for each index equal to the one before; may return ``values`` itself."""
        ...

    def encode_indices(self, indices: Tensor, n: int) -> Tensor:
        """Encode as ``coding.elias_fano.encode``."""
        ...

    def decode_indices(self, packed: Tensor, k: int, n: int) -> Tensor:
        """Decode as ``coding.elias_fano.decode``."""
        ...

    def close(self) -> None:
        """Stop threads."""
        ...
