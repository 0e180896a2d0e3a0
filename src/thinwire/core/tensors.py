"""Flat views of tensors in the order of memory, and decompressed payloads."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from thinwire.core.errors import ThinwireError
from thinwire.core.loops import Kernels


def is_dense(x: Tensor) -> bool:
    """Return True if the elements of ``x`` fill one block of memory, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(x.stride(), x.shape, strict=True) if si != 1):
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True


def flat(x: Tensor) -> Tensor:
    """Return a 1-D view of ``x`` in the order of its memory, so channels_last tensors are not copied.

    Raises:
        ThinwireError: the elements of ``x`` do not fill one block of memory.
    """
    if x.is_contiguous():
        return x if x.ndim == 1 else x.view(-1)
    if not is_dense(x):
        raise ThinwireError(
            f"a tensor of shape {tuple(x.shape)} has strides {x.stride()}, which leave gaps; use x.contiguous()"
        )
    return x.as_strided((x.numel(),), (1,))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return True if every element is finite; waits for the device once."""
    found = [x.isfinite().all() for x in tensors]
    return not found or bool(torch.stack(found).all())


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the l2 norm of all elements of all tensors, computed in at least float32, on the first one's device."""
    each: list[Tensor] = []
    for x in tensors:
        own = cast(Tensor, torch.linalg.vector_norm(x, dtype=float_at_least_32(x.dtype)))
        each.append(own.to(each[0].device) if each else own)
    return torch.stack(each).square().sum().sqrt()


class Decompressed(ABC):
    """A decompressed payload; ``density`` is the share of elements that it has."""

    density: float

    @abstractmethod
    def write_to(self, out: Tensor, alpha: float = 1.0) -> None:
        """Set ``out = alpha * self``."""

    @abstractmethod
    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        """Add ``out += alpha * self``."""

    @abstractmethod
    def clear(self, out: Tensor) -> None:
        """Set ``out = 0`` at every element that was sent."""

    @abstractmethod
    def entries(self) -> tuple[Tensor, Tensor]:
        """Return flat indices (int64) and values of the elements that were sent."""


@dataclass(frozen=True)
class Dense(Decompressed):
    """A payload with every element: ``values`` is 1-D, in the order of memory."""

    values: Tensor
    density: float = 1.0

    def write_to(self, out: Tensor, alpha: float = 1.0) -> None:
        if out.data_ptr() != self.values.data_ptr() or out.dtype != self.values.dtype:  # summed in place
            flat(out).copy_(self.values)
        if alpha != 1.0:
            out.mul_(alpha)

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        flat(out).add_(self.values, alpha=alpha)

    def clear(self, out: Tensor) -> None:
        out.zero_()

    def entries(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.values.numel(), device=self.values.device), self.values


@dataclass(frozen=True)
class Sparse(Decompressed):
    """A payload with ``values[j]`` at ``indices[j]`` (int64) of the flat tensor; values at equal indices add up."""

    indices: Tensor  # [k]
    values: Tensor  # [k]
    density: float
    kernels: Kernels | None = None

    def write_to(self, out: Tensor, alpha: float = 1.0) -> None:
        out.zero_()
        self.add_to(out, alpha)

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        values = self.values.to(out.dtype)
        if self.kernels is not None:
            self.kernels.add(flat(out), self.indices, values, alpha)
        else:
            flat(out).index_add_(0, self.indices, values, alpha=alpha)

    def clear(self, out: Tensor) -> None:
        flat(out).index_fill_(0, self.indices, 0.0)

    def entries(self) -> tuple[Tensor, Tensor]:
        return self.indices, self.values

    def dense(self, like: Tensor) -> Tensor:
        """Return all elements in a tensor like ``like``, whose values are not read."""
        out = torch.empty_like(like, device=self.values.device)
        self.write_to(out)
        return out


def shortened(x: Tensor, dtype: torch.dtype, limit: float) -> Tensor:
    """Convert ``x`` to ``dtype``: finite values saturate at ``limit``, nonfinite ones become NaN."""
    eps = torch.finfo(x.dtype).eps
    step = eps * 2.0 ** (math.frexp(limit)[1] - 1)
    if round(limit / step) * step > limit:  # bfloat16 would round float16's largest, 65504, to 65536
        limit *= 1.0 - eps
    return torch.where(x.isfinite(), x.clamp(-limit, limit), torch.nan).to(dtype)


def float_at_least_32(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, float32 for every shorter dtype."""
    return torch.promote_types(dtype, torch.float32)
