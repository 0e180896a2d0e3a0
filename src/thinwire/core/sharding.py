"""Parameters of which a rank holds one shard: DTensors sharded over a mesh of one dimension, as FSDP2 makes them.

An ordinary tensor counts as its own single shard, so callers need not distinguish. A complex tensor is viewed as real
numbers with one more dimension.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def own(x: Tensor) -> Tensor:
    """Return this rank's shard of ``x``, as an ordinary tensor of real numbers in the same memory."""
    if isinstance(x, DTensor):
        with torch.no_grad():
            x = x.to_local().detach()
    return torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x


def shape_of(x: Tensor) -> torch.Size:
    """Return the shape of the whole of ``x``, in real numbers."""
    return torch.Size((*x.shape, 2)) if x.is_complex() else x.shape


def real_strides(x: Tensor, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Convert ``strides``, present or past ones of ``x``, to those of its view in real numbers."""
    return (*(2 * stride for stride in strides), 1) if x.is_complex() else strides


def wrapped(part: Tensor, like: Tensor) -> Tensor:
    """Return ``part`` as this rank's shard of a tensor that is sharded like ``like``, and complex if ``like`` is."""
    if like.is_complex():
        part = torch.view_as_complex(part)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def shard_dim(like: Tensor) -> int | None:
    """Return the dimension along which ``like`` is sharded, None if it is not."""
    if not isinstance(like, DTensor):
        return None
    return next((int(cast(Any, p).dim) for p in like.placements if isinstance(p, Shard)), None)


def place(like: Tensor) -> tuple[int, int]:
    """Return this rank's shard index in ``like`` and the number of shards."""
    return (like.device_mesh.get_local_rank(), like.device_mesh.size()) if isinstance(like, DTensor) else (0, 1)


def cut(whole: Tensor, like: Tensor, leading: int = 0) -> Tensor:
    """Return this rank's shard of ``whole``, which has the shape of ``like`` after ``leading`` further dimensions."""
    dim = shard_dim(like)
    if dim is None:
        return whole
    rank, world = place(like)
    parts: Sequence[Tensor] = whole.chunk(world, dim + leading)
    return parts[rank] if rank < len(parts) else whole.narrow(dim + leading, 0, 0)
