"""Parameters of which a rank holds a part: DTensors sharded over a mesh of one dimension, as FSDP2 leaves them.

A parameter that is no DTensor is its own only part, so who calls these need not ask; nor whether it is complex, since
then what a rank holds of it are real numbers, in one dimension more.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def own(x: Tensor) -> Tensor:
    """What this rank holds of ``x``, as an ordinary tensor of real numbers in the same memory."""
    if isinstance(x, DTensor):
        with torch.no_grad():
            x = x.to_local().detach()
    return torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x


def shape_of(x: Tensor) -> torch.Size:
    """The shape of all of ``x``, in real numbers."""
    return torch.Size((*x.shape, 2)) if x.is_complex() else x.shape


def real_strides(x: Tensor, strides: tuple[int, ...]) -> tuple[int, ...]:
    """What the strides of ``x``, which may have been others once, are in real numbers."""
    return (*(2 * stride for stride in strides), 1) if x.is_complex() else strides


def wrapped(part: Tensor, like: Tensor) -> Tensor:
    """``part``, as this rank's part of a tensor that is sharded as ``like`` is, and complex if it is."""
    if like.is_complex():
        part = torch.view_as_complex(part)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def shard_dim(like: Tensor) -> int | None:
    """The dimension along which ``like`` is sharded."""
    if not isinstance(like, DTensor):
        return None
    return next((int(cast(Any, p).dim) for p in like.placements if isinstance(p, Shard)), None)


def place(like: Tensor) -> tuple[int, int]:
    """Which of how many parts of ``like`` this rank holds."""
    return (like.device_mesh.get_local_rank(), like.device_mesh.size()) if isinstance(like, DTensor) else (0, 1)


def cut(whole: Tensor, like: Tensor, leading: int = 0) -> Tensor:
    """This rank's part of ``whole``, which is shaped as all of ``like``, after ``leading`` dimensions of its own."""
    dim = shard_dim(like)
    if dim is None:
        return whole
    rank, world = place(like)
    parts: Sequence[Tensor] = whole.chunk(world, dim + leading)
    return parts[rank] if rank < len(parts) else whole.narrow(dim + leading, 0, 0)
