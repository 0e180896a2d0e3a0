"""Two-level exchange: dense within a node, where links are fast, and compressed between nodes.

A node is one worker. Its ranks average their gradients and hold the same state, so they compress to the same message.
Each rank sends its own part of it to its counterparts in the other nodes, and the ranks of a node all-gather the parts
they receive. So a message crosses each node's link once, spread over its ranks. Compression loses as much as with one
worker per node.

A message has one header, which is in the part of one rank of a node. So every part also ends with the step of the
rank that sends it. All ranks receive all parts and see if any rank is at another step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from thinwire.coding.header import CLOCK, SLOTS
from thinwire.coding.layout import ROW_ALIGNMENT
from thinwire.comm.collectives import Collective, InFlight, Wrapped, network
from thinwire.comm.emulated import Paced
from thinwire.comm.link import Link
from thinwire.comm.liveness import Lost
from thinwire.comm.process_group import ProcessGroup
from thinwire.core.errors import ThinwireError


def check_nodes(everyone: ProcessGroup, nodes: int | DeviceMesh | None) -> None:
    """Raise a ``ThinwireError`` if ``nodes`` does not divide all ranks into whole nodes, before any group is made."""
    if nodes is None:
        return
    ranks = dist.get_process_group_ranks(everyone.group)
    if not isinstance(nodes, int):
        if nodes.ndim != 2 or sorted(cast("list[int]", nodes.mesh.flatten().tolist())) != sorted(ranks):
            raise ThinwireError(
                f"ranks_per_node is a mesh of {nodes.ndim} dimensions and {nodes.size()} ranks; it must have two, "
                f"between nodes and inside, and hold the {len(ranks)} ranks of this model"
            )
        return
    if nodes < 1 or len(ranks) % nodes:
        raise ThinwireError(f"ranks_per_node is {nodes}; it is the ranks of one node, and must divide {len(ranks)}")
    if len(ranks) != dist.get_world_size():
        raise ThinwireError("ranks_per_node as a number needs a model on all ranks; give a mesh of two dimensions")


def groups_of(
    everyone: ProcessGroup, nodes: int | DeviceMesh
) -> tuple[ProcessGroup, ProcessGroup, list[dist.ProcessGroup]]:
    """Return this rank's group within the node, its group between nodes, and the new process groups to destroy later.

    ``nodes``: the number of consecutive ranks in a node, or a mesh of two dimensions (between nodes, within the node).
    """
    if not isinstance(nodes, int):
        within, between = (ProcessGroup(nodes.get_group(dim), everyone.timeout) for dim in (1, 0))
        return within, between, []
    ranks = dist.get_process_group_ranks(everyone.group)
    # every rank makes every group in one order: making only its own would find stale addresses in the store
    within = [_group(ranks[i : i + nodes], everyone.timeout) for i in range(0, len(ranks), nodes)]
    between = [_group(ranks[local::nodes], everyone.timeout) for local in range(nodes)]
    node, local_rank = divmod(everyone.rank, nodes)
    made = [within[node], between[local_rank]]
    return ProcessGroup(made[0], everyone.timeout), ProcessGroup(made[1], everyone.timeout), made


class Nodes(Wrapped):
    """A collective with one worker per node; each exchange has a stage between nodes and one within the node."""

    def __init__(
        self, everyone: ProcessGroup, within: Collective, between: Collective, made: Sequence[dist.ProcessGroup] = ()
    ) -> None:
        super().__init__(everyone, f"{between.label}, between {between.world} nodes of {within.world} ranks")
        self.within, self.between, self._made = within, between, made
        self.rank, self.world = between.rank, between.world
        self.local_ranks, self._local_rank = within.world, within.rank
        link = between.link
        self.link = link and Link(link.bandwidth * self.local_ranks, link.latency)
        self._step = 0
        self._parted: list[Tensor] = []  # for each exchange since ``at``: True if its steps differ

    @property
    def sent(self) -> float:
        return self.between.sent

    @property
    def sent_within_node(self) -> float:
        return self.within.sent

    def mean_within_node(self, gradients: Tensor, timeout: float) -> None:
        self.within.all_reduce(gradients.mul_(1.0 / self.local_ranks)).wait(timeout)

    def any_within_node(self, used: Sequence[bool], gradients: Tensor, timeout: float) -> list[bool]:
        flags = torch.tensor(used, dtype=torch.float32, device=gradients.device)
        return [bool(flag) for flag in self.within.all_reduce(flags).wait(timeout)]

    def at(self, step: int) -> None:
        self._step = step
        self._parted.clear()

    def apart(self) -> bool:
        parted, self._parted = self._parted, []
        return bool(parted) and bool(torch.stack(parted).any())

    def all_reduce(self, message: Tensor) -> InFlight:
        shape, dtype, nbytes = message.shape, message.dtype, message.nbytes
        part = self._part(message.reshape(1, -1).view(torch.uint8), SLOTS * message.itemsize).view(dtype)
        part[0, self._step % SLOTS - SLOTS] = 1
        return self._then_within_node(
            self.between.all_reduce(part),
            1,
            SLOTS * message.itemsize,
            lambda clocks: clocks.view(dtype).ne(0).flatten(0, 1).any(0).sum() > 1,
            lambda rows: rows[0, :nbytes].view(dtype).view(shape),
        )

    def all_gather(self, message: Tensor) -> InFlight:
        nbytes, part = message.numel(), self._clocked(message.view(1, -1)).view(-1)
        return self._gathered(self.between.all_gather(part), self.world, lambda rows: rows[:, :nbytes])

    def all_to_all(self, message: Tensor) -> InFlight:
        nbytes, part = message.shape[1], self._clocked(message)
        return self._gathered(self.between.all_to_all(part), self.world, lambda rows: rows[:, :nbytes])

    def broadcast(self, message: Tensor, source: int) -> InFlight:
        nbytes, part = message.numel(), self._clocked(message.view(1, -1)).view(-1)
        return self._gathered(self.between.broadcast(part, source), 1, lambda rows: rows[0, :nbytes])

    def _part(self, rows: Tensor, more: int) -> Tensor:
        """Return this rank's columns of uint8 ``[rows, nbytes]``, padded, plus ``more`` columns of zeros."""
        width = -(-rows.shape[1] // (self.local_ranks * ROW_ALIGNMENT)) * ROW_ALIGNMENT
        mine = rows[:, self._local_rank * width : (self._local_rank + 1) * width]
        return torch.nn.functional.pad(mine, (0, width - mine.shape[1] + more))

    def _clocked(self, rows: Tensor) -> Tensor:
        part = self._part(rows, ROW_ALIGNMENT)
        part[:, -1] = self._step % CLOCK
        return part

    def _gathered(self, first: InFlight, rows: int, whole: Callable[[Tensor], Tensor]) -> InFlight:
        return self._then_within_node(first, rows, ROW_ALIGNMENT, lambda clocks: (clocks != clocks[0, 0]).any(), whole)

    def _then_within_node(
        self,
        first: InFlight,
        rows: int,
        more: int,
        parted: Callable[[Tensor], Tensor],
        whole: Callable[[Tensor], Tensor],
    ) -> InFlight:
        """Add the second stage to an exchange: an all-gather within the node.

        The last ``more`` columns of a part hold the step. ``parted`` computes from them, ``[local ranks, rows, more]``,
        True if the steps differ; ``whole`` computes the answer from the rows.
        """
        local_ranks = self.local_ranks

        def arrange(parts: Tensor) -> Tensor:
            each = parts.view(local_ranks, rows, -1)
            self._parted.append(parted(each[..., -more:].contiguous()))
            return whole(each[..., :-more].transpose(0, 1).reshape(rows, -1))

        @cache
        def then() -> InFlight:
            return replace(self.within.all_gather(first.answer().reshape(-1).view(torch.uint8)), arrange=arrange)

        return replace(first, then=then)

    def lost(self) -> Lost:
        found = super().lost()
        self.hang_up()
        return found

    def leave(self, word: str) -> None:
        super().leave(word)
        self.hang_up()

    def hang_up(self) -> None:
        for part in (self.inner, self.within, self.between):
            part.hang_up()

    def close(self) -> None:
        self.between.close()
        self.within.close()
        for group in self._made:
            dist.destroy_process_group(group)


def levels(everyone: ProcessGroup, nodes: int | DeviceMesh | None, link: Link | None) -> Collective:
    """Return the collective between replicas: all ranks on one level, or nodes. A given ``link`` is emulated."""
    groups = groups_of(everyone, nodes) if nodes is not None else None
    own = everyone if groups is None else groups[1]
    collective: Collective = Paced(own, link) if link else own
    return collective if groups is None else Nodes(everyone, groups[0], collective, groups[2])


def _group(ranks: list[int], timeout: float) -> dist.ProcessGroup:
    with network(timeout):
        return cast(dist.ProcessGroup, dist.new_group(ranks, timedelta(seconds=timeout)))
