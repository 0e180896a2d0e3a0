"""The one communication hook of a DDP model, and what passes through it.

Collectives are started from the hook body, in bucket order, and never from a callback. The last bucket's hook waits
for all exchanges: DDP would wait right after it anyway, and an error raised here keeps its type.

DDP reads a hook's signature: its parameter is named ``bucket`` and annotated with the class itself, so this file
has no ``from __future__ import annotations``.
"""

import contextlib
import warnings
from collections.abc import Generator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from thinwire import pipeline
from thinwire.clipping import clip
from thinwire.engines.flight import Flight, settle
from thinwire.exchange.collectives import Future, exchange_failed, in_future
from thinwire.exchange.routes import Bucket, route_together
from thinwire.pipeline import Verdict
from thinwire.report.ledger import Stopwatch
from thinwire.session import Session
from thinwire.tensors import ThinwireError
from thinwire.wire import head

ACCUMULATED = (
    "a backward pass is about to add to gradients that were already averaged over the ranks, with no optimizer step "
    "since: they would be exchanged twice. Accumulate under ddp.no_sync(), and leave it for the last micro-batch only."
)


class Dispatcher:
    """The one hook of a DDP model; without a session it does what DDP does without a hook."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.session: Session | None = None
        self.owners: list[tuple[nn.Module, str, Tensor]] = []
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.held: list[tuple[Bucket, list[Tensor], Tensor, Future]] = []
        self.flights: list[Flight] = []
        self.sparse: list[Future] = []  # exchanges of sparse gradients, which are DDP's own
        self.waiting: list[Flight] = []  # those that have not departed
        self.joined = 0  # exchanges that this saved in the step under way
        self.used: set[int] | None = None  # parameters that this backward reached, where DDP looks for unused ones
        self.exchanged_since_step = False
        self.warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled DDP has lost its hook; so what it holds of ours does nothing."""
        return Dispatcher, (None,)

    def install(self, session: Session, ddp: DistributedDataParallel) -> None:
        """Pass this model's gradients through the session from now on."""
        module = cast(nn.Module, ddp.module)  # pyright: ignore[reportUnknownMemberType]
        for unit in session.units:
            path, _, leaf = unit.name.rpartition(".")
            self.owners.append((module.get_submodule(path), leaf, unit.param))
        session.cleanup.callback(self.uninstall)
        session.cleanup.callback(ddp.register_forward_pre_hook(self.before_forward).remove)
        if session.optimizer is not None:
            session.cleanup.callback(session.optimizer.register_step_post_hook(self.after_optimizer).remove)
        if ddp.find_unused_parameters or ddp.static_graph:
            self.used = set()
            for _, _, param in self.owners:
                handle = cast(Any, param).register_post_accumulate_grad_hook(self.reached)
                session.cleanup.callback(handle.remove)
        self.exchanged_since_step = False
        self.session = session

    def uninstall(self) -> None:
        self.session = self.used = None
        self.owners.clear()

    def before_forward(self, *_: object) -> None:
        """What is wrong is said here, where it does no harm: DDP does not survive an error in its hook."""
        if self.session is None:
            return
        for owner, leaf, param in self.owners:
            if getattr(owner, leaf) is not param:
                raise ThinwireError(
                    f"parameter {leaf!r} of {type(owner).__name__} was replaced after wrapping (load_state_dict("
                    "assign=True) does it): DDP no longer averages its gradient; wrap the model and attach again"
                )
        self.session.check()
        accumulates = self.exchanged_since_step and self.owners[0][2].grad is not None and torch.is_grad_enabled()
        if accumulates and not self.warned and not self.session.transaction.failed:
            self.warned = True
            warnings.warn(ACCUMULATED, stacklevel=2)

    def after_optimizer(self, *_: object) -> None:
        self.exchanged_since_step = False

    def reached(self, param: Tensor) -> None:
        """Backward has added to the gradient of this parameter."""
        if self.used is not None:
            self.used.add(id(param))

    def hook(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if isinstance(bucket, tuple):
            raise ThinwireError(
                "compiled autograd's python reducer hands single gradients to the hook, which thinwire can't exchange; "
                "leave torch._dynamo.config.optimize_ddp at its default, or compile the module inside DDP"
            )
        buffer, session = bucket.buffer(), self.session
        if session is None or self.group is None:
            return self._plain(buffer)
        if bucket.index() == 0:
            self._begin(session)
        planned = session.bucket(bucket.parameters())
        done = self._pass_sparse(planned, buffer) if buffer.is_sparse else self._pass(session, planned, bucket, buffer)
        if bucket.is_last():
            self._end(session)
        return done

    def _begin(self, session: Session) -> None:
        self.held.clear()
        self.flights.clear()
        self.waiting.clear()
        self.joined = 0
        self.sparse.clear()
        self.exchanged_since_step = session.optimizer is not None
        session.begin_step()

    def _end(self, session: Session) -> None:
        if session.method.clip is not None and self.held:
            self._exchange_held(session, session.method.clip)
        self._depart(session)
        for stage in (self._go_on, self._wait):  # the last stage of every bucket is on its way before any is awaited
            for flight in self.flights:
                try:
                    stage(session, flight)
                except Exception as error:
                    names = [unit.name for unit in flight.bucket.units]
                    raise exchange_failed(session.collective, session.step, names, error) from error
        if self.joined:
            stages = sum(len(group.stages) for flight in self.flights for group in flight.bucket.groups)
            session.ledger.note(
                f"{stages - self.joined} exchanges a step for {len(self.flights)} buckets: gathered messages of less "
                f"than {session.join_bytes:,.0f} bytes travel together"
            )
        for done in self.sparse:
            done.wait()
        self.sparse.clear()
        self.flights.clear()
        if self.used is not None:
            self.used.clear()
        session.end_step()

    def _go_on(self, session: Session, flight: Flight) -> None:
        with self._side_stream(flight.buffer):
            flight.go_on(session.workers[0], session.collective, session.timeout)

    def _wait(self, session: Session, flight: Flight) -> None:
        flight.wait(session.timeout)

    def _pass(
        self, session: Session, planned: Bucket, bucket: GradBucket, buffer: Tensor
    ) -> torch.futures.Future[torch.Tensor]:
        session.collective.mean_inside(buffer, session.timeout)
        grads = [unit.grad_like(grad) for unit, grad in zip(planned.units, bucket.gradients(), strict=True)]
        if session.method.clip is None:
            return self._exchange(session, planned, grads, buffer)
        done = in_future(buffer)  # the norm of all gradients is known only when the last bucket is there
        self.held.append((planned, grads, buffer, done))
        return done

    def _pass_sparse(self, planned: Bucket, buffer: Tensor) -> torch.futures.Future[torch.Tensor]:
        name, session = planned.units[0].name, cast(Session, self.session)
        if planned.lossy or session.method.clip is not None or any(unit.memory.stateful for unit in planned.units):
            raise ThinwireError(
                f"{name} has a sparse gradient, which its method can't compress, remember or clip; use sparse=False"
            )
        session.ledger.note(f"{name} has a sparse gradient; DDP's own all-reduce exchanges it, and it is not counted")
        verdicts = session.transaction.verdicts

        def look(summed: Future) -> Tensor:  # the sum is the same on all ranks, and so is what they find in it
            bad = head.is_bad(summed.value().coalesce().values()).view(1, 1)
            verdicts.append(Verdict(planned.units, torch.ones_like(bad), bad, bad.new_zeros(1, dtype=torch.uint8)))
            return summed.value()

        done = self._plain(buffer)
        if not planned.units[0].guarded:
            return done
        done = done.then(look)
        self.sparse.append(done)
        return done

    def _exchange(
        self, session: Session, bucket: Bucket, grads: Sequence[Tensor], buffer: Tensor
    ) -> torch.futures.Future[Tensor]:
        """Send one bucket; small ones wait for the next, to travel together."""
        step, row = session.step, session.row
        session.count(bucket)
        used = [self.used is None or id(unit.param) in self.used for unit in bucket.units]
        if self.used is not None:
            used = session.collective.any_inside(used, buffer, session.timeout)
        with self._side_stream(buffer), Stopwatch(row, "send_seconds"):
            outbox = pipeline.send(bucket, grads, session.workers[0], step, used, session.loss_scale)
        flight = Flight(
            bucket, outbox, grads, buffer, used, session.seed, step, session.loss_scale, row,
            session.transaction.verdicts, session.workers[0].kernels,
        )  # fmt: skip
        self.flights.append(flight)
        if not bucket.joins or (self.waiting and self.waiting[0].buffer.device != buffer.device):
            self._depart(session)
        self.waiting.append(flight)
        if not bucket.joins or sum(one.outbox.messages[0].nbytes for one in self.waiting) >= session.join_bytes:
            self._depart(session)
        return flight.done()

    def _depart(self, session: Session) -> None:
        """Start the exchange of all that wait."""
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        with self._side_stream(waiting[0].buffer):
            inboxes = route_together(
                [flight.bucket for flight in waiting],
                [flight.outbox.messages for flight in waiting],
                session.collective,
                session.step,
            )
        self.joined += len(waiting) - 1
        for flight, inbox in zip(waiting, inboxes, strict=True):
            flight.departed(inbox)

    def _exchange_held(self, session: Session, threshold: float) -> None:
        by_name = {u.name: g for bucket, grads, _, _ in self.held for u, g in zip(bucket.units, grads, strict=True)}
        ordered = [by_name[unit.name] for unit in session.units if unit.name in by_name]
        with self._side_stream(self.held[0][2]):
            clip(ordered, threshold * session.loss_scale, session.collective.world)
        for bucket, grads, buffer, done in self.held:
            self._exchange(session, bucket, grads, buffer).then(lambda exchanged, done=done: settle(done, exchanged))
        self.held.clear()

    def _plain(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        buffer = buffer.mul_(1.0 / dist.get_world_size(self.group))
        work = cast(Any, dist.all_reduce(buffer, group=self.group, async_op=True))
        return work.get_future().then(_first)

    @contextlib.contextmanager
    def _side_stream(self, tensor: Tensor) -> Generator[None]:
        """On CUDA, work beside the backward pass, after what has been queued so far."""
        if not tensor.is_cuda:
            yield
            return
        if tensor.device not in self.streams:
            self.streams[tensor.device] = torch.cuda.Stream(tensor.device)
        stream = self.streams[tensor.device]
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            yield


def _first(future: Future) -> Tensor:
    return future.value()[0]
