"""Per-parameter gradient hooks: they bucket gradients and detect the end of the backward pass.

A bucket is sent when its gradients are complete, in one order on all ranks; if a parameter's hook fires more than once
in a backward pass, at the end of it. On CPUs, buckets with small messages wait for each other. DDP does this in its
reducer; all other engines use this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from thinwire.core import ThinwireError, flat
from thinwire.core.ambient import undisturbed
from thinwire.core.sharding import own, wrapped
from thinwire.engines.hooks import ModelHooks
from thinwire.engines.inflight import Gradients
from thinwire.engines.passes import Passes
from thinwire.engines.scheduler import Scheduler
from thinwire.engines.stepped import weak
from thinwire.exchange.buckets import USUAL, Routing, start_bytes, travel_together
from thinwire.exchange.status import used
from thinwire.exchange.units import bytes_alone
from thinwire.session.backward import in_backward
from thinwire.session.session import Session


@dataclass(frozen=True, eq=False)
class Owned:
    """A parameter, and the number of its bucket."""

    name: str
    param: Tensor
    bucket: int


class GradHooks(ModelHooks):
    """The gradient hooks of one model, whose gradients are exchanged where autograd has left them.

    Args:
        exchanges: True if there are other ranks to exchange with.
        sparse: True if the optimizer gets sparse gradients for parameters of which few elements arrive.
    """

    def __init__(
        self, model: nn.Module, owned: Sequence[Owned], accumulating: str, exchanges: bool = True, sparse: bool = False
    ) -> None:
        way_out = f"Accumulate under {accumulating} in all micro-batches of a step but the last"
        super().__init__(Scheduler(sparse, eager=False), accumulating, way_out)
        self.model, self.owned, self.exchanges, self.sparse = model, owned, exchanges, sparse
        self.by_param = {id(one.param): one for one in owned}
        numbers = sorted({one.bucket for one in owned}, reverse=True)
        self.parts = [[one for one in owned if one.bucket == number] for number in numbers]
        self.buckets = self.parts  # ``parts``, joined where several are sent together
        self.routing: Routing | None = None  # for which ``buckets`` was decided
        self.arrived: set[int] = set()
        self.before: set[int] = set()  # parameters that got gradients in passes without an exchange
        self.passes = Passes(self.end)
        self.paused = False
        self.overlaps = False  # True after a pass in which each hook fired at most once
        self.repeated = False
        self.left: list[tuple[list[Owned], list[Tensor], list[bool]]] = []
        """The sent buckets: parameters, gradients, and True for each gradient that this rank lacks (zeros)."""
        self.checked = False  # True if the model was checked since the last backward pass
        self.ended = True  # True if the last exchange has ended
        self.laid: list[tuple[Owned, Tensor]] = []  # copies of gradients that have other strides than the parameter
        self.copied: list[tuple[Owned, Tensor]] = []  # copies of gradients that share memory with other tensors

    def install(self, session: Session) -> None:
        """Exchange this model's gradients through the session from now on."""
        self.follow(session, self.model, self.model)
        self.hook_gradients(weak(self.arrives), session.cleanup)
        if self.exchanges:
            session.expect_unused()

    # -- what an engine adds ---------------------------------------------------------------------------------------

    def check_same(self, session: Session) -> None:
        """Raise a ``ThinwireError`` if the parameters are no longer those of ``attach``."""
        self.parameters.check(session)

    def unfinished(self) -> list[str]:
        return [] if self.ended else [one.name for one in self.owned if id(one.param) not in self.arrived]

    def late(self) -> list[Tensor]:
        return [param for param in self.params if id(param) in self.before]

    def begin_exchange(self, session: Session) -> None:
        """Begin a new exchange."""

    def count_arrival(self, session: Session, one: Owned) -> None:
        """Add the bytes of the reduce-scatter that produced this gradient to the ledger."""

    def shares(self, grad: Tensor) -> bool:
        """Return True if another tensor may use the memory of a gradient."""
        return False

    def closing(self, session: Session) -> bool | None:
        """Finish an exchange; returns True if the engine's own state was nonfinite, None if it has no state."""
        return None

    # -- the passes ------------------------------------------------------------------------------------------------

    def before_forward(self, called: object, *_: object) -> None:
        if self.session is None or not torch.is_grad_enabled() or in_backward():
            return
        self.check_same(self.session)
        self.checked = True
        self.session.check()
        self.notice_cleared()
        if not self.paused:  # allowed if no optimizer steps on the sum, as in a GAN
            self.warn_of_old(self.session)

    def begin(self, session: Session) -> None:
        """Begin an exchange at the first gradient of a backward pass."""
        under_way = self.passes.enter()
        if under_way.begun:
            return
        try:
            if not self.checked:  # a backward pass can run without a call of before_forward
                self.check_same(session)
            self.checked = False
            self.warn_of_old(session, 1)
            under_way.begun, self.repeated, self.ended = True, False, False
            for earlier in (self.arrived, self.left, self.laid, self.copied):
                earlier.clear()
            self.begin_step(session)
            if self.routing is not session.stages.routing:  # each stage has its own routing
                self._join(session)
            self.begin_exchange(session)
        except Exception:
            self.passes.over()  # explicitly, because the error's traceback keeps the pass alive
            raise

    def arrives(self, param: Tensor) -> None:
        """Handle the gradient of this parameter, which autograd has just accumulated."""
        if (session := self.session) is None:
            return
        if self.paused:
            self.before.add(id(param))
            return
        self.begin(session)
        one = self.by_param[id(param)]
        self.repeated |= id(param) in self.arrived
        self.arrived.add(id(param))
        if param.grad is None:
            raise ThinwireError(
                f"the gradient of {one.name} is gone before it was exchanged; leave out the hook that steps in backward"
            )
        if self.repeated and self.overlaps:
            self.overlaps = False  # the next pass sends at its end
            raise ThinwireError(
                f"{one.name} was reduced twice in one backward pass, which it was not in the pass before; run a module "
                "as often in every step"
            )
        self.count_arrival(session, one)
        while self.overlaps and len(self.left) < len(self.buckets) and self._is_there(self.buckets[len(self.left)]):
            self._send(session, self.buckets[len(self.left)])

    def _join(self, session: Session) -> None:
        """Decide which buckets are sent together; the same on all ranks."""
        routing, world = session.stages.routing, session.collective.world
        enough = start_bytes(routing.link)
        # not on CUDA, where starting costs no CPU time, nor on other routes, where joining changes the result's bits
        joins = routing.route == "all_gather" and not any(one.param.is_cuda for one in self.owned)
        units = [[session.stages.by_param[id(one.param)] for one in part] for part in self.parts]
        nbytes = [
            sum(bytes_alone(u.compressor, u.like, world, routing.route, routing.second) for u in p) for p in units
        ]
        joined: list[list[Owned]] = []
        start = 0
        while start < len(self.parts):
            end = start + ((travel_together(nbytes[start:], enough) or len(self.parts)) if joins else 1)
            joined.append([one for part in self.parts[start:end] for one in part])
            start = end
        self.routing, self.buckets = routing, joined
        if len(joined) < len(self.parts) and world > 1:
            session.ledger.note(
                f"{len(self.parts)} buckets are sent as {len(joined)}: on a CPU, starting an exchange takes as long as "
                f"sending {enough:,.0f} bytes on a link of {routing.link or f'{USUAL}, which is assumed'}"
            )

    def _is_there(self, bucket: Sequence[Owned]) -> bool:
        return all(id(one.param) in self.arrived for one in bucket)

    @undisturbed
    def _send(self, session: Session, bucket: list[Owned]) -> None:
        for one in bucket:
            if (grad := one.param.grad) is not None and (grad.is_conj() or grad.is_neg()):
                one.param.grad = grad.resolve_conj().resolve_neg()  # raw memory must hold the gradient's values
        found = [one.param.grad for one in bucket]
        grads = [self._overwritable(one, grad) for one, grad in zip(bucket, found, strict=True)]
        self.left.append((bucket, grads, [grad is None for grad in found]))
        if not self.exchanges:
            return
        here = [id(one.param) in self.arrived or id(one.param) in self.before for one in bucket]
        if session.collective.local_ranks > 1:
            for grad in grads:
                session.collective.mean_within_node(flat(grad), session.timeout)
            here = session.collective.any_within_node(here, grads[0], session.timeout)
        planned = session.bucket([one.param for one in bucket])
        if self.sparse:  # frees the memory once the result has arrived
            for one in bucket:
                one.param.grad = None
        self.scheduler.send(session, Gradients(planned, grads, grads[0], here))

    def _overwritable(self, one: Owned, grad: Tensor | None) -> Tensor:
        """Return the gradient, or a copy that is dense, not shared and laid out as the parameter: it is overwritten."""
        if grad is None:
            return torch.zeros_like(own(one.param))
        found = own(grad.to_dense() if grad.is_sparse else grad)
        if grad.is_sparse or grad.stride() != one.param.stride():
            copy = torch.empty_like(own(one.param), dtype=found.dtype).copy_(found)
            self.laid.append((one, copy))
        elif self.shares(found):
            copy = found.clone()
            self.copied.append((one, copy))
        else:
            copy = found
        return copy

    def _write_back(self) -> None:
        """Copy results to the gradients' own memory at the end of backward; of overlapping ones only to the first."""
        for one, grad in self.laid:
            one.param.grad = cast(Any, wrapped(grad, one.param))
        end, each = 0, [(own(cast(Tensor, one.param.grad)), one, copy) for one, copy in self.copied]
        for grad, one, copy in sorted(each, key=lambda found: found[0].data_ptr()):
            if grad.data_ptr() < end:
                one.param.grad = cast(Any, wrapped(copy, one.param))
            else:
                grad.copy_(copy)
            end = max(end, grad.data_ptr() + grad.nbytes)

    @undisturbed
    def end(self) -> None:
        """Send the remaining buckets at the end of the backward pass, and wait for all."""
        session, now = self.session, self.passes.now
        self.passes.over()
        if session is None or now is None or not now.begun:  # no gradients to exchange
            return
        for bucket in self.buckets[len(self.left) :]:
            self._send(session, bucket)
        self.scheduler.end(session)
        each = [one for bucket in self.left for one in zip(*bucket, strict=True)]
        reached = used(session.transaction.statuses) if any(made for _, _, made in each) else set[str]()
        for one, grad, made in each:
            if made:
                if session.stages.by_param[id(one.param)].name in reached:  # another rank has a gradient
                    one.param.grad = cast(Any, wrapped(grad, one.param))
            elif self.sparse:
                one.param.grad = grad
        if not self.sparse:
            self._write_back()
        nonfinite = self.closing(session)
        for done in (self.left, self.laid, self.copied, self.before):
            done.clear()
        self.overlaps = not self.repeated
        self.ended = True
        self.end_step(session, nonfinite)
