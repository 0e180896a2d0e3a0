"""The loops in which the time goes: what a kernel is asked to do, in plain PyTorch, on the CPU or on CUDA."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

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


class Selection(Protocol):
    """Which elements are sent, where a threshold that is known beforehand decides it."""

    @property
    def start(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def run(self) -> int: ...

    def threshold(self, sampled: Tensor, kernels: "Kernels") -> Tensor:
        """The threshold, a scalar, from the magnitudes of ``run`` elements at every ``stride``-th from ``start`` on."""
        ...

    def settle(self, found: Found, threshold: Tensor, x: Tensor, kernels: "Kernels") -> Found:
        """What is sent of ``x`` ``[n]``, where ``found`` is what is not below the threshold."""
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

    def accumulate(self, works: Sequence[Pass], thresholds: Sequence[Tensor]) -> list[Found]:
        """Write the new states; answers where ``|v'|`` is not below the threshold.

        Thresholds are scalars of the state's dtype and device. NaN is not below any.
        """
        ...

    def look(self, x: Tensor, threshold: Tensor) -> Found:
        """Where ``|x|``, of one dimension, is not below the threshold."""
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

    def without_repeats(self, indices: Tensor, values: Tensor) -> Tensor:
        """``values`` ``[k]``, with 0 where an index is the one before."""
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
