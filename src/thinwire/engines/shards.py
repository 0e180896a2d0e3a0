"""What passes through an FSDP2 model: its reduce-scatters, and between replicas what they leave on this rank.

A bucket is what one ``fully_shard`` module holds, the last module first. Buckets leave in this order on all ranks, each
when its gradients are there; where a module is reduced more than once in a backward pass, when that has ended.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thinwire.engines.departures import ACCUMULATED, Departures
from thinwire.engines.passes import Passes, in_backward
from thinwire.engines.scatter import Scatter
from thinwire.exchange.collectives import ProcessGroup
from thinwire.exchange.mesh import Mesh
from thinwire.link import wire_bytes
from thinwire.policy.plan import Rule
from thinwire.session import Session
from thinwire.sharding import own, place, shard_dim, wrapped
from thinwire.tensors import ThinwireError


@dataclass(frozen=True, eq=False)
class Owned:
    """A sharded parameter, where it stands in the model, and how it travels: with which ``fully_shard`` module."""

    name: str
    param: Tensor
    owner: nn.Module
    leaf: str
    module: int
    travels: torch.dtype
    """What PyTorch's own reduce-scatter sends of its gradient."""

    @property
    def scattered(self) -> int:
        """Elements of the reduce-scattered buffer that are for one rank, padding included."""
        dim, (_, world) = cast(int, shard_dim(self.param)), place(self.param)
        return -(-self.param.shape[dim] // world) * (self.param.numel() // max(1, self.param.shape[dim]))


class Shards:
    """The hooks of one FSDP2 model.

    Args:
        modules: those that went through ``fully_shard``.
        frozen: the sharded parameters that require no gradient, by name.
        exchanges: whether there are replicas.
        shards: the ranks that the model is sharded over.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        owned: Sequence[Owned],
        frozen: Mapping[str, Tensor],
        exchanges: bool,
        shards: ProcessGroup,
    ) -> None:
        self.model, self.modules, self.owned, self.frozen = model, modules, owned, frozen
        self.exchanges, self.shards = exchanges, shards
        self.session: Session | None = None
        self.scatters: list[Scatter] = []
        self.gathers = 0.0, 0.0  # bytes of all-gathers since the last step, and what fp32 would have sent
        self.by_param = {id(one.param): one for one in owned}
        numbers = sorted({one.module for one in owned}, reverse=True)
        self.buckets = [[one for one in owned if one.module == number] for number in numbers]
        self.departures = Departures()
        self.arrived: set[int] = set()
        self.passes = Passes(self.end)
        self.overlaps = False  # until one pass has shown that each parameter arrives once
        self.repeated = False
        self.left = 0  # buckets that have left
        self.made: list[tuple[Owned, Tensor]] = []  # gradients that this rank has not, but perhaps a replica
        self.exchanged_since_step = False
        self.warned = False

    def install(self, session: Session) -> None:
        """Pass this model's gradients through the session from now on."""
        arrives = WeakMethod(self.arrives)  # garbage collection does not look into this hook of a tensor

        def hook(param: Tensor) -> None:
            if (call := arrives()) is not None:
                call(param)

        for one in self.owned:
            handle = cast(Any, one.param).register_post_accumulate_grad_hook(hook)
            session.cleanup.callback(handle.remove)
        session.cleanup.callback(self.uninstall)
        session.cleanup.callback(self.model.register_forward_pre_hook(self.before_forward).remove)
        recomputes = cast(Any, torch.compiler.disable(self.recomputes))  # as all hooks of FSDP2 are
        for module in self.modules:
            session.cleanup.callback(module.register_forward_pre_hook(recomputes).remove)
        if session.optimizer is not None:
            session.cleanup.callback(session.optimizer.register_step_post_hook(self.after_optimizer).remove)
        self.session = session

    def uninstall(self) -> None:
        self.session = None
        for scatter in self.scatters:
            scatter.states.clear()

    def before_forward(self, *_: object) -> None:
        """What is wrong is said here, where it does no harm."""
        if self.session is None or not torch.is_grad_enabled() or in_backward():
            return
        self._check_frozen()
        for one in self.owned:
            now = getattr(one.owner, one.leaf)
            if isinstance(now, DTensor) and now is not one.param:
                raise ThinwireError(
                    f"parameter {one.name!r} was replaced after attach (load_state_dict(assign=True) does it), so its "
                    "gradient would not be exchanged; detach() and attach again"
                )
        self.session.check()
        accumulates = self.exchanged_since_step and self.owned[0].param.grad is not None
        if accumulates and not self.warned and not self.session.transaction.failed:
            self.warned = True
            warnings.warn(ACCUMULATED.format("model.set_requires_gradient_sync(False)"), stacklevel=2)

    def _check_frozen(self) -> None:
        if unfrozen := [name for name, param in self.frozen.items() if param.requires_grad]:
            raise ThinwireError(
                f"parameter {unfrozen[0]!r} required no gradient at attach and does now, so its gradient would not be "
                "exchanged; detach() and attach again"
            )

    def recomputes(self, *_: object) -> None:
        """A checkpointed module is run again: in the outer pass, which brings its gradients perhaps in an inner one."""
        if self.session is not None and in_backward():
            self.passes.enter()

    def after_optimizer(self, *_: object) -> None:
        self.exchanged_since_step = False

    def begin(self, session: Session) -> None:
        """The first gradient of a backward pass."""
        under_way = self.passes.enter()
        if under_way.begun:
            return
        self._check_frozen()  # a method of register_fsdp_forward_method does not come by before_forward
        under_way.begun, self.repeated, self.left = True, False, 0
        self.arrived.clear()
        self.made.clear()
        self.departures.begin()
        self.exchanged_since_step = session.optimizer is not None
        session.begin_step()
        for scatter in self.scatters:
            scatter.settle(session.step)

    @torch.no_grad()
    def arrives(self, param: Tensor) -> None:
        """FSDP2 has reduce-scattered the gradient of this parameter."""
        if (session := self.session) is None:
            return
        self.begin(session)
        one = self.by_param[id(param)]
        self.repeated |= id(param) in self.arrived
        self.arrived.add(id(param))
        if self.repeated and self.overlaps:
            raise ThinwireError(
                f"{one.name} was reduced twice in one backward pass, which it was not in the pass before; run a module "
                "as often in every step"
            )
        if not self.scatters:
            sent = one.scattered * one.travels.itemsize * (self.shards.world - 1)
            self.count(session, one.scattered * self.shards.world, sent)
        while self.overlaps and self.left < len(self.buckets) and self._is_there(self.buckets[self.left]):
            self._send(session, self.buckets[self.left])

    def count(self, session: Session, elements: int, sent: float) -> None:
        """Book one reduce-scatter of so many elements."""
        cast(Mesh, session.collective).sent_inside += sent
        session.row.inside_dense_bytes += wire_bytes("all_to_all", elements * 4, self.shards.world)

    def gathered(self, elements: int, sent: float, world: int) -> None:
        """One all-gather of so many elements of each rank; booked at the end of the next backward pass."""
        plain = wire_bytes("all_gather", elements * 4, world)
        self.gathers = self.gathers[0] + sent, self.gathers[1] + plain

    def _is_there(self, bucket: Sequence[Owned]) -> bool:
        return all(id(one.param) in self.arrived for one in bucket)

    def _send(self, session: Session, bucket: Sequence[Owned]) -> None:
        self.left += 1
        if not self.exchanges:
            return
        grads: list[Tensor] = []
        for one in bucket:
            if one.param.grad is None:
                grads.append(torch.zeros_like(own(one.param)))
                self.made.append((one, grads[-1]))
            else:
                grads.append(own(one.param.grad))
        planned = session.bucket([one.param for one in bucket])
        self.departures.send(session, planned, grads, grads[0], [id(one.param) in self.arrived for one in bucket])

    @torch.no_grad()
    def end(self) -> None:
        """The backward pass has ended."""
        session, now = self.session, self.passes.now
        self.passes.over()
        if session is None or now is None or not now.begun:  # nothing was reduced
            return
        for bucket in self.buckets[self.left :]:
            self._send(session, bucket)
        self.departures.end(session)
        for one, grad in self.made:
            if bool(grad.count_nonzero()):  # a replica has used it
                one.param.grad = cast(Any, wrapped(grad, one.param))
        self.overlaps = not self.repeated
        found = [bad for scatter in self.scatters if (bad := scatter.bad()) is not None]
        bad = cast(Mesh, session.collective).any_replica(any(found), session.timeout) if found else None
        session.row.gather_bytes, session.row.gather_dense_bytes = self.gathers
        self.gathers = 0.0, 0.0
        session.end_step(bad)

    def memory_bytes(self, rule: Rule) -> int:
        """What a reduce-scatter that remembers keeps on this rank."""
        own_dtype = rule.memory.dtype(self.owned[0].param.dtype)
        elements = sum(one.scattered for one in self.owned)
        return 2 * elements * (self.shards.world - 1) * own_dtype.itemsize
