"""A mesh of two axes: the model is sharded along one, and every shard has replicas along the other.

The replicas of a shard exchange the gradients of that shard only. Step status and norms, which concern the whole model,
also go across shards. Texts on the control channel go over all ranks.
"""

import json
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from thinwire.comm.collectives import Collective, ControlChannel, NoAnswer, Wrapped, failed
from thinwire.comm.liveness import Lost
from thinwire.comm.process_group import ProcessGroup
from thinwire.comm.texts import heard
from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import shape_of, shard_dim

OTHER_SHARDS = "the word of the ranks that hold the other shards"


class BothAxes(ControlChannel):
    """The control channel of all ranks of the mesh; a rank is its replica times the number of shards plus its shard."""

    def __init__(self, replicas: ControlChannel, shards: ControlChannel) -> None:
        self.replicas, self.shards = replicas, shards
        self.rank = replicas.rank * shards.world + shards.rank
        self.world = replicas.world * shards.world

    def exchange_text(self, text: str, timeout: float | None = None) -> list[str]:
        said = self.shards.exchange_text(json.dumps(self.replicas.exchange_text(text, timeout)), timeout)
        columns = heard(said, self._read_column, "list of texts")
        return [column[replica] for replica in range(self.replicas.world) for column in columns]

    def _read_column(self, said: str) -> list[str]:
        column = json.loads(said)
        if not isinstance(column, list) or [*map(type, cast("list[object]", column))] != [str] * self.replicas.world:
            raise ValueError(f"{said:.40}")
        return cast("list[str]", column)

    def lost(self) -> Lost:
        self.here()  # on both axes first, since peers along the other axis may be looking already
        along, across = self.replicas.lost(), self.shards.lost()
        first, width = self.replicas.rank * self.shards.world, self.shards.world

        def both(replicas: Sequence[int], shards: Sequence[int]) -> list[int]:
            return sorted({r * width + self.shards.rank for r in replicas} | {first + shard for shard in shards})

        gone, silent = both(along.gone, across.gone), both(along.silent, across.silent)
        return Lost(gone, silent, along.raised or across.raised)

    def here(self) -> None:
        self.replicas.status = self.shards.status = self.status
        self.replicas.here()
        self.shards.here()

    def leave(self, word: str) -> None:
        self.replicas.leave(word)
        self.shards.leave(word)


def columns_of(shards: ProcessGroup, group: dist.ProcessGroup | None) -> list[list[int]]:
    """Return the ranks of each shard's replicas; ``group`` has those of this shard. A collective call of ``shards``."""
    column = dist.get_process_group_ranks(group) if group is not None else [dist.get_rank()]
    return heard(shards.exchange_text(json.dumps(column)), _read_ranks, "list of ranks")


def _read_ranks(said: str) -> list[int]:
    ranks = json.loads(said)
    if not isinstance(ranks, list) or not all(isinstance(rank, int) for rank in cast("list[object]", ranks)):
        raise ValueError(f"{said:.40}")
    return [rank % 2**31 for rank in cast("list[int]", ranks)]


class Mesh(Wrapped):
    """A collective between the replicas of this rank's shard.

    ``replicas`` may be an emulated link over ``group``, the process group of the replicas, if there are any. ``shards``
    are the ranks that hold one replica, ``device`` is that of messages between them, ``columns`` from ``columns_of``.
    """

    sent_across_shards = 0.0
    """Bytes that this rank has sent along the shard axis; the sender adds them."""

    def __init__(
        self,
        replicas: Collective,
        shards: ProcessGroup,
        group: dist.ProcessGroup | None,
        device: torch.device,
        columns: Sequence[Sequence[int]],
    ) -> None:
        super().__init__(replicas, f"{replicas.label}, {replicas.world} replicas of {shards.world} shards")
        self.shards, self.device = shards, device
        self._both = BothAxes(replicas, shards)
        whole = len({len(c) for c in columns}) == 1
        ranks = torch.tensor(columns if whole else [], dtype=torch.int64, device="cpu").t()
        if ranks.unique().numel() != self.everyone.world:
            raise ThinwireError(
                f"replicas are on ranks {columns}, one list for each shard, which do not make a mesh: replicate= and "
                'the mesh of fully_shard must be the two dimensions of one, e.g. mesh["replicate"] and mesh["shard"]'
            )
        self._groups = [*([group] if group is not None else []), shards.group]
        self._ranks = ranks if group is not None else ranks[0]
        self._mesh: DeviceMesh | None = None

    @property
    def sent_within_node(self) -> float:
        return self.sent_across_shards

    @property
    def everyone(self) -> BothAxes:
        return self._both

    @property
    def checkpoint_group(self) -> Collective:
        return self

    def any_across_shards(self, flags: Sequence[bool], timeout: float) -> list[bool]:
        x = torch.tensor(flags, dtype=torch.float32, device=self.device)
        return [bool(flag) for flag in self._sum(x, self.shards, timeout, OTHER_SHARDS)]

    def any_replica(self, flag: bool, timeout: float) -> bool:
        """Return True if the flag is set on any replica of this shard; blocks."""
        found = torch.tensor([float(flag)], dtype=torch.float32, device=self.device)
        return bool(self._sum(found, self.inner, timeout, "the word of the replicas on a step", on_host=True))

    def norm_across_shards(self, norm: Tensor, timeout: float) -> Tensor:
        return self._sum(norm.square(), self.shards, timeout, OTHER_SHARDS).sqrt()

    def _sum(self, x: Tensor, along: Collective, timeout: float, what: str, on_host: bool = False) -> Tensor:
        try:
            return along.all_reduce(x).wait(timeout, on_host=on_host)
        except NoAnswer as error:
            raise failed(self, what, error, "Restart from the last checkpoint") from error

    def rows(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        dim = None if like is None else shard_dim(like)
        placement = Replicate() if like is None or dim is None else Shard(dim + 1)
        whole = tensor.shape if like is None else shape_of(like)
        shape = torch.Size((self.world, *whole))
        return self._as_dtensor(tensor.unsqueeze(0), Shard(0), placement, shape)

    def shared(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        if like is None or (dim := shard_dim(like)) is None:
            whole = torch.Size((self.shards.world, *tensor.shape))
            return self._as_dtensor(tensor.unsqueeze(0), Replicate(), Shard(0), whole)
        return self._as_dtensor(tensor, Replicate(), Shard(dim), shape_of(like))

    def _as_dtensor(
        self, part: Tensor, by_replica: Shard | Replicate, by_shard: Shard | Replicate, shape: torch.Size
    ) -> Tensor:
        if self._mesh is None:
            names = ("replicate", "shard")[-len(self._groups) :]
            groups = self._groups if len(self._groups) > 1 else self._groups[0]
            self._mesh = DeviceMesh.from_group(groups, self.device.type, self._ranks, mesh_dim_names=names)
        placements = [by_replica, by_shard][-len(self._groups) :]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part.contiguous(), self._mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def hang_up(self) -> None:
        super().hang_up()
        self.shards.hang_up()

    def close(self) -> None:
        super().close()
        self.shards.close()
