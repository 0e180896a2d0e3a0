"""The communication hook of a DDP model, and the exchange of its buckets.

The last bucket's hook waits for all exchanges: DDP would wait right after it anyway, and an error raised here keeps
its type.

DDP checks a hook's signature: its parameter must be named ``bucket`` and annotated with the class itself, so this file
has no ``from __future__ import annotations``.
"""

import contextlib
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from thinwire.coding import header
from thinwire.comm.collectives import Future
from thinwire.core.ambient import undisturbed
from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import own
from thinwire.engines.ddp_join import Joined
from thinwire.engines.ddp_layout import Bucketed
from thinwire.engines.hooks import ModelHooks
from thinwire.engines.inflight import Gradients
from thinwire.engines.scheduler import Scheduler
from thinwire.engines.stepped import inside
from thinwire.exchange.buckets import Bucket
from thinwire.exchange.status import StepStatus
from thinwire.session.session import Session

WAY_OUT = (
    "Call ddp(x), not ddp.module(x); accumulate under ddp.no_sync() in all micro-batches of a step but the last; where "
    "a parameter may get no gradient, wrap with find_unused_parameters=True; and parametrize before wrapping"
)


class Dispatcher(ModelHooks):
    """The only hook of a DDP model; without a session it averages buckets as DDP does without a hook."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(Scheduler(), "ddp.no_sync()", WAY_OUT)
        self.group = group
        self.bucketed = Bucketed(False)
        self.planned: list[Bucket] | None = None  # the buckets of the current exchange
        self.absent: list[str] = []  # parameters in no bucket of the last exchange
        self.added: list[Tensor] = []  # parameters whose gradients were added to after their exchange
        self.watches = contextlib.ExitStack()  # the hooks that find them
        self.sparse: list[Future] = []  # all-reduces of sparse gradients, as DDP does them
        self.used: set[int] | None = None  # parameters that this backward reached, if DDP allows unused ones
        self.missing = 0  # parameters that no bucket of the current pass has held yet
        self.first: Tensor | None = None  # the first parameter of its first bucket
        self.watching = False
        self.joined: Joined | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a dispatcher without a session: a copied or pickled DDP model has lost its hook."""
        return Dispatcher, (None,)

    def install(self, session: Session, ddp: DistributedDataParallel) -> None:
        """Exchange this model's gradients through the session from now on."""
        self.bucketed, self.planned, self.absent = Bucketed(ddp.gradient_as_bucket_view), None, []
        self.follow(session, ddp, inside(ddp), "wrapping", "wrap the model and attach again")
        if ddp.find_unused_parameters or ddp.static_graph:
            self.used = set()
            self.hook_gradients(self.reached, session.cleanup)
        self.joined = Joined(ddp, session)

    def uninstall(self) -> None:
        super().uninstall()
        self.used = self.joined = None
        self.params.clear()
        self._watch_no_more()

    def before_forward(self, called: DistributedDataParallel, *_: object) -> None:
        if self.session is None:
            return
        self.session.check()
        if self.joined is not None:
            self.joined.check(self.session)
        if not torch.is_grad_enabled():
            return
        if self.parameters.check(self.session):
            self.bucketed.changed()
        self.bucketed.check()
        self._check_waits(called)
        self.notice_cleared()
        if called.require_backward_grad_sync:
            self.warn_of_old(self.session)
        elif self.exchanged_since_step and not self.watching:  # allowed if no optimizer steps on the sum, as in a GAN
            self.watching = True  # until the next exchange or the optimizer's step
            self.hook_gradients(self.added.append, self.watches)

    def _check_waits(self, ddp: DistributedDataParallel) -> None:
        """Raise an error if a parameter is frozen or gone, because DDP would wait for its gradient forever."""
        if not ddp.require_backward_grad_sync or (ddp.find_unused_parameters and not ddp.static_graph):
            return
        idle = {name for name, param in self.parameters.exchanged.items() if not param.requires_grad}
        if len(idle) < len(self.params) and (idle := idle | self.parameters.gone):
            raise ThinwireError(
                f"parameter {min(idle)!r} was frozen or taken out of the model after wrapping, and DDP waits for its "
                "gradient; wrap the model with find_unused_parameters=True, or wrap and attach again"
            )

    def _watch_no_more(self) -> None:
        self.watching = False
        self.watches.close()
        self.added.clear()

    def late(self) -> list[Tensor]:
        return self.added

    def unfinished(self) -> list[str]:
        """Return the parameters that DDP waits for, those without a gradient first."""
        if self.planned is None or self.session is None:
            return self.absent
        there = {unit.name for bucket in self.planned for unit in bucket.units}
        missing = [unit for unit in self.session.units if unit.name not in there]
        return [unit.name for unit in sorted(missing, key=lambda unit: unit.param.grad is not None)]

    def after_optimizer(self, *_: object) -> None:
        super().after_optimizer()
        self._watch_no_more()

    def reached(self, param: Tensor) -> None:
        """Note that the backward pass has added to the gradient of this parameter."""
        if self.used is not None:
            self.used.add(id(param))

    @undisturbed
    def hook(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if isinstance(bucket, tuple):
            raise ThinwireError(
                "compiled autograd's python reducer hands single gradients to the hook, which thinwire can't exchange; "
                "leave torch._dynamo.config.optimize_ddp at its default, or compile the module inside DDP"
            )
        buffer, session = bucket.buffer(), self.session
        if session is None or self.group is None:
            return self._plain(buffer)
        shadowed = self.joined if self.joined is not None and self.joined.shadows else None
        params = bucket.parameters()
        if self._begins(bucket, params):
            if shadowed is not None:
                shadowed.check(session)
            self.bucketed.begin()
            self.planned = []
            self.added.clear()
            self.sparse.clear()
            self.begin_step(session)
        planned = session.bucket(params)
        if self.planned is not None:
            self.planned.append(planned)
        if not buffer.is_sparse and shadowed is None:  # a joined rank's bucket does not hold its gradients
            self.bucketed.look(params, _gradients(planned, bucket))
        done = self._pass_sparse(planned, buffer) if buffer.is_sparse else self._pass(session, planned, bucket, buffer)
        if shadowed is not None:
            each = zip(params, bucket.gradients(), strict=True)
            shadowed.exchanged.append(([(p, self.bucketed.answered(p, grad)) for p, grad in each], done))
        self.missing -= len(params)
        if bucket.is_last() or self.missing == 0:
            self._end(session)
            if shadowed is not None:
                shadowed.follow(session)
        return done

    def _begins(self, bucket: GradBucket, params: list[Tensor]) -> bool:
        """Return True if a pass begins. In a static graph's first pass, DDP marks all buckets first, none last."""
        if bucket.index() != 0 or (self.missing > 0 and params[0] is not self.first):
            return False
        self.missing, self.first = len(self.params), params[0]
        return True

    def _end(self, session: Session) -> None:
        self.scheduler.end(session)
        for done in self.sparse:
            done.wait()
        self.sparse.clear()
        self.missing, self.first = 0, None
        if self.used is not None:
            self.used.clear()
        if sum(len(bucket.units) for bucket in self.planned or ()) < len(session.units):
            self.absent = self.unfinished()
        self.planned = None
        if self.joined is not None and session.replicas is not None:
            session.replicas.aside = self.joined.shadows
        self.end_step(session)
        if self.joined is not None:
            self.joined.warn_of_strays(session)

    def _pass(
        self, session: Session, planned: Bucket, bucket: GradBucket, buffer: Tensor
    ) -> torch.futures.Future[torch.Tensor]:
        params = [unit.param for unit in planned.units]
        session.collective.mean_within_node(buffer, session.timeout)
        grads, back = self.bucketed.laid(params, _gradients(planned, bucket))
        used = [self.used is None or id(unit.param) in self.used for unit in planned.units]
        if self.used is not None:
            used = session.collective.any_within_node(used, buffer, session.timeout)
        return self.scheduler.send(session, Gradients(planned, grads, buffer, used, back))

    def _pass_sparse(self, planned: Bucket, buffer: Tensor) -> torch.futures.Future[torch.Tensor]:
        name, session = planned.units[0].name, cast(Session, self.session)
        if planned.lossy or session.method.clip is not None or any(unit.memory.stateful for unit in planned.units):
            raise ThinwireError(
                f"{name} has a sparse gradient, which its method can't compress, remember or clip; use sparse=False"
            )
        session.ledger.note(f"{name} has a sparse gradient; DDP's own all-reduce exchanges it, and it is not counted")
        statuses = session.transaction.statuses

        def look(summed: Future) -> Tensor:  # all ranks have the same sum, so they agree
            found = header.is_nonfinite(summed.value().coalesce().values()).view(1, 1)
            statuses.append(StepStatus(planned.units, torch.ones_like(found), found, found.new_zeros(())))
            return summed.value()

        done = self._plain(buffer)
        if not planned.units[0].guarded:
            return done
        done = done.then(look)
        self.sparse.append(done)
        return done

    def _plain(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        buffer = buffer.mul_(1.0 / dist.get_world_size(self.group))
        done: Future = cast(Any, dist.all_reduce(buffer, group=self.group, async_op=True)).get_future()
        return done.then(lambda summed: summed.value()[0])


def _gradients(planned: Bucket, bucket: GradBucket) -> list[Tensor]:
    """Return the gradients as views of the bucket, in real numbers.

    ``bucket.gradients()`` fails for complex parameters: it counts complex numbers in a buffer of real ones.
    """
    if not planned.units[0].param.is_complex():  # a bucket has one dtype
        return bucket.gradients()
    mine = [unit.own for unit in planned.units]
    runs = cast("tuple[Tensor, ...]", cast(Any, own(bucket.buffer()).view(-1)).split([x.numel() for x in mine]))
    return [run.view(x.shape) for run, x in zip(runs, mine, strict=True)]
