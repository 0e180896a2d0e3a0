"""The loops in which the time goes: what a kernel is asked to do, in plain PyTorch, on the CPU or on CUDA."""

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
    """How a memory adds a gradient to what it holds, as far as a kernel needs to know.

    ``u' = m u + s g``, ``v' = v + u'``; with Nesterov ``u' = m (u + s g)``, ``v' = v + u' + s g``; without a momentum
    ``v' = v + s g``. ``s`` is 1 / loss scale. Each operation is rounded to float32, ``m u + (s g)`` once: a fused
    multiply-add.
    """

    momentum: float | None
    nesterov: bool = False


@dataclass(frozen=True)
class Pass:
    """One contiguous range of one unit, to be accumulated and looked through: 1-D tensors ``[n]``.

    ``grad`` has any floating dtype and, where ``clear``, is set to zero; the states are float32 or bfloat16, all alike.
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
    """What is sent of a tensor: of the elements not below a threshold, at most the ``k`` of largest magnitude.

    The threshold is the first of ``levels`` that ``enough`` elements pass, or the last of them.
    """

    threshold: Tensor
    """A scalar above 0, of the tensor's dtype and device."""
    k: int
    lower: float = 1.0
    """In (0, 1]: what the threshold is multiplied by where it passes fewer than this share of k."""
    attempts: int = 0

    @property
    def enough(self) -> int:
        return math.ceil(self.lower * self.k)

    def levels(self) -> Tensor:
        """``threshold lower^i`` for i from 0 to ``attempts``, never 0.

        By multiplications of two numbers alone, so that every device gets the same.
        """
        levels, factor = self.threshold.double().view(1), self.lower
        while levels.numel() <= self.attempts:
            levels, factor = torch.cat([levels, levels * factor]), factor * factor
        dtype = self.threshold.dtype
        return levels[: self.attempts + 1].to(dtype).clamp_(min=smallest(dtype))


def smallest(dtype: torch.dtype) -> float:
    """The smallest number above 0: what is 0 is not sent."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


class Selection(Protocol):
    """Which elements are sent, where a threshold that is known beforehand decides it."""

    @property
    def start(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def run(self) -> int: ...

    def cut(self, sampled: Tensor, kernels: "Kernels") -> Cut:
        """From the magnitudes of ``run`` elements at every ``stride``-th from ``start`` on."""
        ...


class Kernels(Protocol):
    """The loops in which the time goes. All implementations give the same bits as plain PyTorch."""

    name: str

    def runs(self, work: Pass) -> bool:
        """Whether this dtype and device can be taken."""
        ...

    def sample(self, work: Pass, start: int, stride: int, run: int) -> Tensor:
        """``|v'|`` before the pass itself, in any order: ``run`` elements at every ``stride``-th from ``start`` on.

        The last run is left out where it would reach beyond the end. Writes nothing.
        """
        ...

    def accumulate(self, works: Sequence[Pass], cuts: Sequence[Cut]) -> list[Found]:
        """Write the new states; answers what is sent of ``v'``, ``k`` elements, as ``fill`` says. NaN is infinite."""
        ...

    def look(self, x: Tensor, cut: Cut) -> Found:
        """What is sent of ``x`` ``[n]``, k <= n, as ``accumulate`` answers it."""
        ...

    def fill(self, indices: Tensor, values: Tensor, k: int) -> Found:
        """``k`` elements: those of ``[m]``, m <= k, whose value is not 0; then the last of them again, with value 0.

        Where there are none, the index is 0.
        """
        ...

    def kth(self, magnitude: Tensor, k: int) -> Tensor:
        """The k-th largest of ``magnitude`` ``[n]``, a scalar; 1 <= k <= n, and NaN is as large as infinity."""
        ...

    def largest(self, x: Tensor, k: int) -> Tensor:
        """Ascending indices, int64 ``[min(k, n)]``, of the k largest of ``|x|`` ``[n]``; of equal ones the first."""
        ...

    def add(self, out: Tensor, indices: Tensor, values: Tensor, alpha: float) -> None:
        """``out[indices] += alpha * values``, one after the other, for ``out`` of one dimension."""
        ...

    def merge(self, indices: Sequence[Tensor], values: Sequence[Tensor], alpha: float) -> Found:
        """All indices that occur in these int64 ``[m_i]``, and the sum of ``alpha * values`` at each, in this order."""
        ...

    def gather(self, packed: Sequence[Tensor], values: Sequence[Tensor], n: int, alpha: float) -> Found:
        """``merge`` of what each sender's ``packed`` indices and ``values`` ``[k]`` are after ``without_repeats``."""
        ...

    def coordinates(self, indices: Tensor, shape: Sequence[int]) -> Tensor:
        """Where flat indices ``[m]`` stand in a tensor of this shape, int64 ``[len(shape), m]``."""
        ...

    def without_repeats(self, indices: Tensor, values: Tensor) -> Tensor:
        """``values`` ``[k]``, with 0 where an index is the one before; where none is, perhaps no copy."""
        ...

    def encode_indices(self, indices: Tensor, n: int) -> Tensor:
        """``wire.elias_fano.encode``."""
        ...

    def decode_indices(self, packed: Tensor, k: int, n: int) -> Tensor:
        """``wire.elias_fano.decode``."""
        ...

    def close(self) -> None:
        """Let go of threads."""
        ...
