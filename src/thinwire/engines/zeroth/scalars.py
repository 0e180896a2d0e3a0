"""The exchange of a step: one float32 that all ranks sum, or 12 bytes a rank where each has a direction of its own.

With a shared direction a rank sends ``l+ - l-`` (it makes both passes) or ``+-l`` (PertP: one of them). If losses are
float32 and the two of a step are near each other, these sums are exact in float32, and so do not depend on their order.
On a mesh with several shards that takes losses whose sum needs at most 24 bits; else the last bit is rounded, alike on
all ranks. Nonfinite losses make the sum NaN or infinite on all ranks.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from thinwire.comm.collectives import Collective
from thinwire.comm.process_group import ProcessGroup
from thinwire.comm.simulated import Local
from thinwire.core.errors import ThinwireError

PAIR = struct.Struct("<Id")
"""A direction's number and the projected gradient along it: 12 bytes."""
NAMES = ('("pert",)', '("pert", "data")')


@dataclass(frozen=True)
class Layout:
    """The ranks that train together, and the passes that this one makes."""

    collective: Collective
    signs: tuple[float, ...]
    """The passes: at ``theta + eps z``, ``theta - eps z`` or both."""
    shards: int
    """Number of shards of the batch; ranks of one shard make one pass each."""
    shard: int

    def describe(self) -> str:
        if len(self.signs) == 1:
            return f"one pass each (pert 2, data {self.shards})"
        return f"both passes (data {self.shards})"


def layout_of(group: dist.ProcessGroup | None, mesh: DeviceMesh | None, timeout: float) -> Layout:
    """Find out which ranks train together.

    Raises:
        ThinwireError: the mesh is not one of perturbation and data.
    """
    both = (1.0, -1.0)
    if mesh is None:
        collective: Collective = Local.of(1)[0] if group is None else ProcessGroup(group, timeout)
        return Layout(collective, both, collective.world, collective.rank)
    names = mesh.mesh_dim_names or ()
    if names not in (("pert",), ("pert", "data")):
        raise ThinwireError(
            f"mesh has the dimensions {names or 'without names'}; they must be {' or '.join(NAMES)}, e.g. "
            'init_device_mesh("cpu", (2, 4), mesh_dim_names=("pert", "data"))'
        )
    if mesh.size(0) != 2:
        raise ThinwireError(
            f'the dimension "pert" of mesh has {mesh.size(0)} ranks; it must have 2, for theta + eps z and theta - eps '
            "z: put the other ranks into data"
        )
    where = cast("list[int]", mesh.get_coordinate())
    shards, shard = (mesh.size(1), where[1]) if len(where) > 1 else (1, 0)
    collective = ProcessGroup(_all_of(mesh), timeout)
    return Layout(collective, (both[where[0]],), shards, shard)


def _all_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    ranks = cast("list[int]", cast(Any, mesh.mesh.flatten()).tolist())
    if len(ranks) == dist.get_world_size():
        return cast(dist.ProcessGroup, dist.group.WORLD)
    if mesh.ndim == 1:
        return mesh.get_group()
    return cast(dist.ProcessGroup, dist.new_group(sorted(ranks), use_local_synchronization=True))


class ScalarExchange:
    """The sum of a scalar over all ranks, or the pairs of all ranks."""

    def __init__(self, layout: Layout, eps: float, device: torch.device, timeout: float) -> None:
        self.layout, self.eps, self.timeout = layout, eps, timeout
        group = getattr(layout.collective, "group", None)
        on_host = group is None or "cpu:" in dist.get_backend_config(group)
        self.device = torch.device("cpu") if on_host else device

    def projected(self, losses: Sequence[float]) -> float:
        """Return the projected gradient ``(l+ - l-) / (2 eps)`` of the mean loss. A collective call.

        **Wire**: an all-reduce of 4 bytes.
        """
        mine = sum(sign * loss for sign, loss in zip(self.layout.signs, losses, strict=True))
        message = torch.tensor([mine], dtype=torch.float64).to(torch.float32).to(self.device)
        total = self.layout.collective.all_reduce(message).wait(self.timeout, on_host=True)
        return total.item() / (2.0 * self.eps * self.layout.shards)

    def pairs(self, direction: int, losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
        """Return the directions of all ranks, and the projected gradient along each. A collective call.

        **Wire**: an all-gather of 12 bytes a rank.
        """
        plus, minus = losses
        mine = PAIR.pack(direction, (plus - minus) / (2.0 * self.eps))
        message = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self.device)
        rows: Tensor = self.layout.collective.all_gather(message).wait(self.timeout, on_host=True)
        return tuple(cast("tuple[int, float]", PAIR.unpack(row.tobytes())) for row in rows.cpu().numpy())
