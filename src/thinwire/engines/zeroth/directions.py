"""Perturbation and update of parameters along random directions, which are made again each time they are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thinwire.core.ambient import undisturbed
from thinwire.core.errors import ThinwireError
from thinwire.core.supported import check_parameter
from thinwire.core.tensors import flat, is_dense
from thinwire.kernels.normal import CHUNK, CHUNK_CUDA, normals


@dataclass(frozen=True)
class Update:
    """One step's change: ``theta <- (1 - lr wd) theta - lr / n (g_1 z_1 + ... + g_n z_n)``, for directions ``z_i``."""

    lr: float
    weight_decay: float
    pairs: tuple[tuple[int, float], ...]
    """Of each direction its number and the projected gradient."""


@dataclass(frozen=True)
class Trained:
    """A trained parameter; ``number`` says which numbers of a direction are its own."""

    number: int
    name: str
    param: nn.Parameter
    decays: bool
    """True if weight decay applies: to matrices, not to biases and norms."""

    def describe(self) -> tuple[str, str]:
        """Return the line that must be equal on all ranks."""
        strides, dtype = tuple(self.param.stride()), str(self.param.dtype).removeprefix("torch.")
        return f"parameter {self.name!r}", f"{dtype} of shape {tuple(self.param.shape)}, strides {strides}"


def trained(model: nn.Module) -> list[Trained]:
    """Return the parameters that require a gradient, numbered in the model's order.

    Raises:
        ThinwireError: there is none, or one of them can't be trained so.
    """
    named: list[tuple[str, nn.Parameter]] = [*model.named_parameters()]
    found = [(name, param) for name, param in named if param.requires_grad]
    if not found:
        raise ThinwireError(
            "the model has no parameter that requires a gradient, so there is nothing to train; requires_grad_(True) "
            "on those that should change"
        )
    for name, param in found:
        check_parameter(name, param)
        if param.is_complex():
            raise ThinwireError(
                f"parameter {name!r} is {param.dtype}, and directions are real; make it two real parameters, or "
                "freeze it, with requires_grad_(False)"
            )
        if isinstance(param, DTensor):
            raise ThinwireError(
                f"parameter {name!r} is sharded (a DTensor); zeroth-order training needs whole parameters: train the "
                "model before fully_shard(), with blocks= where it does not fit on the device"
            )
        if not is_dense(param):
            raise ThinwireError(
                f"parameter {name!r} has strides {tuple(param.stride())}, which leave gaps; use contiguous()"
            )
    return [Trained(number, name, param, param.ndim >= 2) for number, (name, param) in enumerate(found)]


@undisturbed
def perturb(theta: Tensor, scale: float, seed: int, direction: int, number: int, out: Tensor) -> None:
    """Compute ``out = theta + scale * z``, rounded once to their dtype; both are 1-D."""
    for part, z in _chunks(theta, seed, number):
        wide = z(direction, part.start).mul_(scale)
        out[part].copy_(theta[part].to(wide.dtype).add_(wide) if theta.dtype != wide.dtype else theta[part] + wide)


@undisturbed
def apply(theta: Tensor, updates: Sequence[Update], seed: int, one: Trained) -> None:
    """Apply updates in order to the 1-D ``theta``; several at once leave the bits of one after the other."""
    for part, z in _chunks(theta, seed, one.number):
        for update in updates:
            wide = theta[part].to(z.dtype)
            if one.decays and update.weight_decay:
                wide.mul_(1.0 - update.lr * update.weight_decay)
            for direction, scalar in update.pairs:  # two operations, since a fused one may round once or twice
                wide.add_(z(direction, part.start).mul_(-update.lr * scalar / len(update.pairs)))
            if wide.dtype != theta.dtype:
                theta[part].copy_(wide)


class _Chunk:
    """Scratch for the direction's elements of a chunk."""

    def __init__(self, like: Tensor, size: int, seed: int, number: int) -> None:
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._z = torch.empty(size, dtype=torch.float32, device=like.device)
        self._seed, self._number = seed, number
        self._normals = normals(like.device.type)
        self.size = size

    def __call__(self, direction: int, start: int) -> Tensor:
        z = self._z[: self.size]
        self._normals.fill(z, self._seed, direction, self._number, start)
        return z.to(self.dtype)


def _chunks(theta: Tensor, seed: int, number: int) -> Iterator[tuple[slice, _Chunk]]:
    size = CHUNK if theta.device.type == "cpu" else CHUNK_CUDA
    z = _Chunk(theta, min(size, theta.numel()), seed, number)
    for start in range(0, theta.numel(), size):
        z.size = min(size, theta.numel() - start)
        yield slice(start, start + z.size), z


class Resident:
    """Trained parameters that stay where they are; their perturbed values lie in scratch memory of the same size."""

    def __init__(self, parts: Sequence[Trained], seed: int) -> None:
        self.parts, self.seed = parts, seed
        self._theta = [one.param.data for one in parts]
        self._scratch: list[Tensor] = []

    def enter(self, scale: float, direction: int) -> None:
        """Let the model compute with ``theta + scale * z``; ``theta`` is not written to."""
        if not self._scratch:
            self._scratch = [torch.empty_like(one.param) for one in self.parts]
        self._theta = [one.param.data for one in self.parts]
        for one, theta, scratch in zip(self.parts, self._theta, self._scratch, strict=True):
            perturb(flat(theta), scale, self.seed, direction, one.number, flat(scratch))
        # not functional_call: the closure may hold the model, or a parameter, by any path
        for one, scratch in zip(self.parts, self._scratch, strict=True):
            one.param.data = scratch

    def leave(self) -> None:
        """Give the model ``theta`` back."""
        for one, theta in zip(self.parts, self._theta, strict=True):
            one.param.data = theta

    def update(self, update: Update) -> None:
        for one in self.parts:
            apply(flat(one.param.data), [update], self.seed, one)
