"""In-flight buckets.

The engine starts every stage of an exchange. ``wait`` decodes the result; if eager, a callback of the last stage does.
An in-flight bucket must not hold the session: a callback runs on a thread of the process group. If it held the last
reference, the process group would be destroyed on its own thread.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinwire.comm.collectives import Collective, Future, InFlight, in_future
from thinwire.exchange import pipeline
from thinwire.exchange.buckets import Bucket
from thinwire.exchange.pipeline import Outbox
from thinwire.exchange.status import StepStatus, unused
from thinwire.exchange.workers import Worker
from thinwire.report.ledger import StepRow, Stopwatch


@dataclass(frozen=True)
class Gradients:
    """The gradients of one bucket."""

    bucket: Bucket
    grads: list[Tensor]
    buffer: Tensor  # of which ``grads`` are views, or any one of them; it gives the device
    used: Sequence[bool]  # for each unit, True if this rank used it
    back: Sequence[tuple[Tensor, Tensor]] = ()
    """Pairs (target, copy among ``grads``) to write back at the end, if strides in DDP's bucket are others."""


@dataclass
class BucketInFlight:
    """One bucket between ``send`` and ``receive``.

    If ``eager``, it receives as soon as the exchange has ended, without a ``wait``; on CUDA that only queues work. On
    CPUs, a second thread would take a core away from the backward pass, with a cold instruction cache.
    """

    gradients: Gradients
    outbox: Outbox  # the messages, until their exchange is started
    decode: Callable[[Sequence[InFlight]], list[StepStatus]]  # writes what has arrived to the gradients
    row: StepRow
    statuses: list[StepStatus]  # to which those of this bucket are added
    eager: bool
    inbox: list[InFlight] = field(default_factory=list[InFlight])
    promise: Future | None = None
    """Future returned to DDP before the last collective started, or if ``wait`` receives the result."""
    completed: Future | None = None
    """If ``eager``, completes with the buffer once the gradients are in it."""

    def done(self) -> Future:
        """Return a future that completes with the buffer; it never does if ``wait`` raises."""
        if self.completed is not None:
            return self.completed
        if self.promise is None:
            self.promise = in_future(self.gradients.buffer)
        return self.promise

    def started(self, inbox: list[InFlight]) -> None:
        """Take the started exchange; an eager exchange of one stage then completes by itself."""
        self.outbox.messages.clear()
        self.inbox, self.since = inbox, time.perf_counter()
        if self.eager and not self.gradients.bucket.relays and not any(arrived.then for arrived in inbox):
            self._complete()

    def advance(self, worker: Worker, step: int, collective: Collective, timeout: float) -> None:
        """Wait for all stages but the last, and start the stage after each."""
        if self.completed is not None:
            return
        bucket = self.gradients.bucket
        with self._waiting():
            self.inbox = [arrived.advance(timeout) for arrived in self.inbox]
            if bucket.relays:
                self._await(timeout)
        if bucket.relays:
            with Stopwatch(self.row, "send_seconds"):
                self.inbox = pipeline.relay(bucket, self.inbox, worker, step, collective)
            with self._waiting():
                self.inbox = [arrived.advance(timeout) for arrived in self.inbox]
        if self.eager:
            self._complete()

    def wait(self, timeout: float) -> None:
        """Wait until the gradients hold the result."""
        with self._waiting():
            self._await(timeout)
        if self.eager:
            self.done().wait()
        else:
            self.done().set_result(self._receive())

    def _await(self, timeout: float) -> None:
        for arrived in self.inbox:
            arrived.wait(timeout)

    def _waiting(self) -> contextlib.AbstractContextManager[object]:
        """Measure the time of waiting; an eager exchange measures its own."""
        return contextlib.nullcontext() if self.eager else Stopwatch(self.row, "exchange_seconds")

    def _complete(self) -> None:
        futures = [arrived.future for arrived in self.inbox]
        # A future made by collect_all knows no device; on CUDA the first one's callback waits for the others' streams.
        alone = len(futures) == 1 or self.gradients.buffer.is_cuda
        self.completed = (futures[0] if alone else torch.futures.collect_all(futures)).then(self._finish)
        if (promise := self.promise) is not None:
            self.completed.then(lambda exchanged: resolve(promise, exchanged))

    def _finish(self, _: Future) -> Tensor:
        for arrived in self.inbox:
            arrived.future.wait()  # raises the exchange's error; all have ended, or are enqueued on CUDA
        self.row.exchange_seconds += time.perf_counter() - self.since
        return self._receive()

    def _receive(self) -> Tensor:
        for arrived in self.inbox:
            for tensor in (arrived.result, arrived.side_data):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        with Stopwatch(self.row, "receive_seconds"):
            found = self.decode(self.inbox)
        self.statuses.extend(found)
        mine = self.gradients
        if not all(mine.used) and (idle := unused(found)):  # DDP does not clear a bucket view itself
            for unit, grad in zip(mine.bucket.units, mine.grads, strict=True):
                if unit.name in idle:
                    grad.zero_()
        for grad, copy in mine.back:
            grad.copy_(copy)
        return mine.buffer


def resolve(promise: Future, exchanged: Future) -> None:
    """Pass on the result of a future, or its error."""
    try:
        promise.set_result(exchanged.value())
    except Exception as error:
        promise.set_exception(error)
