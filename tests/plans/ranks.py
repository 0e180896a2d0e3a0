"""What one rank keeps between plans: process groups and meshes, which all ranks of its world make alike."""

from functools import cache

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@cache
def group_of(size: int) -> dist.ProcessGroup | None:
    """The group of the first ``size`` ranks; every rank of the world must ask for it."""
    if size == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(list(range(size)))


@cache
def mesh_of(replicas: int, shards: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
