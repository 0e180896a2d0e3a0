"""Gradient hooks of an FSDP2 model: its reduce-scatters, and the exchange of their results between replicas.

A bucket holds the parameters of one ``fully_shard`` module; the last module comes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from thinwire.comm.link import wire_bytes
from thinwire.comm.mesh import Mesh
from thinwire.comm.process_group import ProcessGroup
from thinwire.core.sharding import place, shard_dim
from thinwire.engines.fsdp2.custom_collectives import Scatter
from thinwire.engines.grad_hooks import GradHooks, Owned
from thinwire.engines.hooks import Hook
from thinwire.methods.method import Rule
from thinwire.session.backward import in_backward
from thinwire.session.session import Session


@dataclass(frozen=True, eq=False)
class OwnedShard(Owned):
    """A sharded parameter; its bucket is the number of its ``fully_shard`` module."""

    travels: torch.dtype
    """The dtype in which PyTorch's reduce-scatter sends its gradient."""

    @property
    def scattered(self) -> int:
        """Elements of the reduce-scattered buffer for one rank, padding included."""
        dim, (_, world) = cast(int, shard_dim(self.param)), place(self.param)
        return -(-self.param.shape[dim] // world) * (self.param.numel() // max(1, self.param.shape[dim]))


class Shards(GradHooks):
    """The hooks of one FSDP2 model and its ``fully_shard`` modules; ``exchanges`` is True if there are replicas."""

    def __init__(
        self, model: nn.Module, modules: Sequence[nn.Module], owned: Sequence[OwnedShard], exchanges: bool,
        shards: ProcessGroup,
    ) -> None:  # fmt: skip
        super().__init__(model, owned, "model.set_requires_gradient_sync(False)", exchanges)
        self.modules, self.shards = modules, shards
        self.scatters: list[Scatter] = []
        self.gathers = 0.0, 0.0  # bytes sent by all-gathers since the last step, and bytes in fp32

    def install(self, session: Session) -> None:
        super().install(session)
        session.on_commit.extend(scatter.commit for scatter in self.scatters)
        recomputes = cast(Any, torch.compiler.disable(self.recomputes))  # as FSDP2 does for its hooks
        for module in self.modules:
            session.cleanup.callback(module.register_forward_pre_hook(Hook(recomputes)).remove)

    def uninstall(self) -> None:
        super().uninstall()
        for scatter in self.scatters:
            scatter.worker = None  # frees the residuals

    def recomputes(self, *_: object) -> None:
        """Enter the outer backward pass when a checkpointed module is recomputed, before a nested pass may start."""
        if self.session is not None and in_backward():
            self.passes.enter()

    def begin_exchange(self, session: Session) -> None:
        for scatter in self.scatters:
            scatter.written = False  # states that no optimizer step has committed are void

    def count_arrival(self, session: Session, one: Owned) -> None:
        if not self.scatters:
            shard = cast(OwnedShard, one)
            sent = shard.scattered * shard.travels.itemsize * (self.shards.world - 1)
            numbers = shard.scattered * (2 if shard.param.is_complex() else 1)
            self.count(session, numbers * self.shards.world, sent)

    def count(self, session: Session, elements: int, sent: float) -> None:
        """Add one reduce-scatter of so many elements to the ledger."""
        cast(Mesh, session.collective).sent_across_shards += sent
        session.row.within_node_dense_bytes += wire_bytes("all_to_all", elements * 4, self.shards.world)

    def gathered(self, elements: int, sent: float, world: int) -> None:
        """Count one all-gather of so many elements a rank; the ledger gets it at the end of the next backward pass."""
        plain = wire_bytes("all_gather", elements * 4, world)
        self.gathers = self.gathers[0] + sent, self.gathers[1] + plain

    def closing(self, session: Session) -> bool | None:
        session.row.gather_bytes, session.row.gather_dense_bytes = self.gathers
        self.gathers = 0.0, 0.0
        found = [flag for scatter in self.scatters if (flag := scatter.nonfinite()) is not None]
        return cast(Mesh, session.collective).any_replica(any(found), session.timeout) if found else None

    def memory_bytes(self, rule: Rule) -> int:
        """Return the bytes of a reduce-scatter's residuals on this rank."""
        own_dtype = rule.memory.dtype(self.owned[0].param.dtype)
        elements = sum(cast(OwnedShard, one).scattered for one in self.owned)
        return 2 * elements * (self.shards.world - 1) * own_dtype.itemsize
