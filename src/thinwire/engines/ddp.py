"""DistributedDataParallel: gradients arrive in buckets, in a communication hook.

This file translates names, streams and lifetimes; it holds no maths. What was observed of DDP and shaped it:

* A hook can be registered once and never taken back, so one dispatcher is ours and sessions change inside it.
* The first backward has one bucket with all parameters; then they are rebuilt. State is keyed by name.
* Collectives are started from the hook body, in bucket order, and never from a callback.
* DDP reads a hook's signature: its parameter is named ``bucket`` and annotated with the class itself, so this file
  has no ``from __future__ import annotations``.
"""

import contextlib
import time
import warnings
from collections.abc import Generator, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from thinwire import pipeline
from thinwire.core import ThinwireError
from thinwire.exchange.collectives import Collective, Future, Paced, ProcessGroup, in_future
from thinwire.exchange.routes import Bucket
from thinwire.link import Link
from thinwire.policy.plan import Method
from thinwire.session import Session

ACCUMULATED = (
    "a backward pass is about to add to gradients that were already averaged over the ranks, with no optimizer step "
    "since: they would be exchanged twice. Accumulate under ddp.no_sync(), and leave it for the last micro-batch only."
)


def attach(
    ddp: DistributedDataParallel,
    method: Method,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    link: Link | str | None = None,
) -> Session:
    """Exchange the gradients of a DDP model by ``method``. A collective call: all ranks make it alike.

    Args:
        ddp: the wrapped model, on gloo or NCCL; before the first step or between any two.
        method: ``thinwire.dgc()``, ``thinwire.topk()``, ``thinwire.cast()``, ``thinwire.dense()`` or one of your own.
        optimizer: required by methods that own the momentum (dgc): ``momentum``, ``nesterov`` and ``weight_decay`` move
            from it into the memory, with its momentum buffers, until ``detach()``.
        seed: of all randomness; equal on all ranks.
        link: emulate a link of this speed, e.g. ``"100mbit"``; for experiments on one machine.

    Returns:
        The session: ``report()``, ``set_method()``, ``detach()``, and ``ledger``.

    Raises:
        ThinwireError: the model is no DDP, its hook slot is taken, its optimizer does not fit the method, ranks ask for
            different things, or a compressed parameter has sparse gradients. Nothing has been changed then.

    Example::

        ddp = DistributedDataParallel(model)
        wire = thinwire.attach(ddp, thinwire.dgc(density=0.001), optimizer=optimizer)
    """
    if not isinstance(ddp, DistributedDataParallel):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ThinwireError(f"attach() takes a DistributedDataParallel, not {type(ddp).__name__}; wrap the model first")
    module = cast(nn.Module, ddp.module)  # pyright: ignore[reportUnknownMemberType]
    named = [
        (name, param)
        for name, param in module.named_parameters()
        if param.requires_grad and name not in ddp.parameters_to_ignore
    ]
    _check_tracked(ddp, named)
    _check_sparse(module, method)
    dispatcher = _dispatcher(ddp)
    group = ProcessGroup(dispatcher.group)
    collective: Collective = Paced(group, Link.parse(link) if isinstance(link, str) else link) if link else group
    try:
        session = Session(named, method, collective, optimizer, seed)
    except ThinwireError:
        collective.close()
        raise
    dispatcher.install(session, ddp, _owners(module, session))
    return session


class Dispatcher:
    """The one hook of a DDP model; without a session it does what DDP does without a hook."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.session: Session | None = None
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.held: list[tuple[Bucket, list[Tensor], Tensor, Future]] = []
        self.exchanged_since_step = False
        self.warned = False

    def install(
        self, session: Session, ddp: DistributedDataParallel, owners: Sequence[tuple[nn.Module, str, Tensor]]
    ) -> None:
        def before_forward(*_: object) -> None:
            for owner, leaf, param in owners:
                if getattr(owner, leaf) is not param:
                    raise ThinwireError(
                        f"parameter {leaf!r} of {type(owner).__name__} was replaced after wrapping (load_state_dict("
                        "assign=True) does it): DDP no longer averages its gradient; wrap the model and attach again"
                    )
            first = session.units[0].param
            if self.exchanged_since_step and first.grad is not None and torch.is_grad_enabled() and not self.warned:
                self.warned = True
                warnings.warn(ACCUMULATED, stacklevel=2)

        def after_step(*_: object) -> None:
            self.exchanged_since_step = False

        self.exchanged_since_step = False
        session.cleanup.callback(ddp.register_forward_pre_hook(before_forward).remove)
        if session.optimizer is not None:
            session.cleanup.callback(session.optimizer.register_step_post_hook(after_step).remove)
        session.cleanup.callback(self.uninstall)
        self.session = session

    def uninstall(self) -> None:
        self.session = None

    def hook(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if isinstance(bucket, tuple):
            raise ThinwireError(
                "compiled autograd's python reducer hands single gradients to the hook, which thinwire can't exchange; "
                "leave torch._dynamo.config.optimize_ddp at its default, or compile the module inside DDP"
            )
        buffer, session = bucket.buffer(), self.session
        if session is None:
            return self._plain(buffer)
        if bucket.index() == 0:
            self._begin(session)
        planned = session.bucket(bucket.parameters())
        done = self._pass_sparse(planned, buffer) if buffer.is_sparse else self._pass(session, planned, bucket, buffer)
        if bucket.is_last():
            if session.method.clip is not None:
                self._exchange_held(session, session.method.clip)
            session.end_step()
        return done

    def _pass(
        self, session: Session, planned: Bucket, bucket: GradBucket, buffer: Tensor
    ) -> torch.futures.Future[torch.Tensor]:
        grads = [unit.grad_like(grad) for unit, grad in zip(planned.units, bucket.gradients(), strict=True)]
        if session.method.clip is None:
            return self._exchange(session, planned, grads, buffer)
        done = in_future(buffer)  # the norm of all gradients is known only when the last bucket is there
        self.held.append((planned, grads, buffer, done))
        return done

    def _pass_sparse(self, planned: Bucket, buffer: Tensor) -> torch.futures.Future[torch.Tensor]:
        if planned.lossy or any(unit.memory.absorbs for unit in planned.units):
            raise ThinwireError(
                f"{planned.units[0].name} has a sparse gradient, which its method can't compress; use sparse=False"
            )
        return self._plain(buffer)

    def _begin(self, session: Session) -> None:
        self.held.clear()
        self.exchanged_since_step = session.optimizer is not None
        session.begin_step()

    def _exchange(
        self, session: Session, bucket: Bucket, grads: Sequence[Tensor], buffer: Tensor
    ) -> torch.futures.Future[Tensor]:
        """The journey of one bucket; what comes after the network runs in the future's callback."""
        step = session.step
        session.count(bucket)
        with self._side_stream(buffer):
            with session.clock("send_seconds"):
                messages = pipeline.send(bucket, grads, session.workers[0], step)
            row, started = session.row, time.perf_counter()
            inbox = pipeline.route(bucket, messages, session.collective)

        def finish(_: Any) -> Tensor:
            row.exchange_seconds += time.perf_counter() - started
            with session.clock("receive_seconds", row):
                pipeline.receive(bucket, inbox, grads, session.seed, step)
            return buffer

        futures = [arrived.future for arrived in inbox]
        return (futures[0] if len(futures) == 1 else torch.futures.collect_all(futures)).then(finish)

    def _exchange_held(self, session: Session, threshold: float) -> None:
        by_name = {u.name: g for bucket, grads, _, _ in self.held for u, g in zip(bucket.units, grads, strict=True)}
        with self._side_stream(self.held[0][2]):
            pipeline.clip(
                [by_name[u.name] for u in session.units if u.name in by_name],
                threshold,
                session.collective.world,
            )
        for bucket, grads, buffer, done in self.held:
            self._exchange(session, bucket, grads, buffer).then(lambda exchanged, done=done: _settle(done, exchanged))
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
        stream = self.streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            yield


def _first(future: Future) -> Tensor:
    return future.value()[0]


def _settle(done: Future, exchanged: Future) -> None:
    try:
        done.set_result(exchanged.value())
    except Exception as error:
        done.set_exception(error)


_dispatchers: WeakKeyDictionary[DistributedDataParallel, Dispatcher] = WeakKeyDictionary()


def _dispatcher(ddp: DistributedDataParallel) -> Dispatcher:
    """The dispatcher of this model, registered at the first attach."""
    known = _dispatchers.get(ddp)
    if known is not None and known.session is not None:
        raise ThinwireError(
            f"{known.session.method.name} is attached to this model; call wire.set_method(), or wire.detach() first"
        )
    if known is None:
        known = Dispatcher(cast(dist.ProcessGroup, ddp.process_group))
        try:
            ddp.register_comm_hook(None, known.hook)
        except RuntimeError as error:
            raise ThinwireError(
                "the communication hook of this DDP model is taken, by register_comm_hook(), by mixed_precision= or "
                "by an optimizer in backward; DDP has room for one: leave that out, or wrap the model afresh "
                f"({str(error).splitlines()[0]})"
            ) from error
        _dispatchers[ddp] = known
    return known


def _check_tracked(ddp: DistributedDataParallel, named: Sequence[tuple[str, Tensor]]) -> None:
    """Parameters replaced between wrapping and attach: DDP does not follow, so their hook would never be called."""
    if not named:
        raise ThinwireError("the model has no parameter that requires a gradient; there is nothing to exchange")
    tracked: Any = getattr(ddp, "_module_parameters", None)  # no public list; where there is none, forward checks later
    known = {id(p) for p in tracked or [param for _, param in named]}
    if missing := [name for name, param in named if id(param) not in known]:
        raise ThinwireError(
            f"parameter {missing[0]!r} was replaced after the model was wrapped; DDP does not average its gradient: "
            "wrap again, then attach"
        )


def _check_sparse(model: nn.Module, method: Method) -> None:
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
    for name, module in modules:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            rule = method.rule(f"{name}.weight", module.weight.shape, module.weight.numel())
            if rule.memory.absorbs or not rule.compressor.summable:
                raise ThinwireError(
                    f"{name}.weight has sparse gradients, which {method.name} can't compress; build the embedding with "
                    f"sparse=False, or use thinwire.topk(..., keep_dense=[{name + '.weight'!r}])"
                )


def _owners(model: nn.Module, session: Session) -> list[tuple[nn.Module, str, Tensor]]:
    """The module that holds each unit's parameter, and its name there."""
    owners: list[tuple[nn.Module, str, Tensor]] = []
    for unit in session.units:
        path, _, leaf = unit.name.rpartition(".")
        owners.append((model.get_submodule(path), leaf, unit.param))
    return owners
