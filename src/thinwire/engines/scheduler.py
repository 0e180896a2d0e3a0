"""The bucket scheduler: starts the exchanges of one backward pass and waits for them, in every engine.

``send`` and ``end`` start collectives in the order of the calls, never from a callback. ``end`` waits for all of them,
so an error raised there keeps its type.
"""

import contextlib
from collections.abc import Generator
from functools import partial

import torch
from torch import Tensor

from thinwire.comm.collectives import Future, NoAnswer, exchange_failed, in_future
from thinwire.engines.inflight import BucketInFlight, Gradients, resolve
from thinwire.exchange import pipeline
from thinwire.exchange.buckets import travel_together
from thinwire.report.ledger import Stopwatch
from thinwire.session.clipping import clip
from thinwire.session.session import Session


class Scheduler:
    """A scheduler that holds buckets for clipping, joins small messages, and completes all buckets.

    If ``sparse``, a gradient in ``grads`` of which few elements arrive is replaced by a sparse tensor. If ``eager``, a
    callback completes each future, otherwise ``end`` does; see ``BucketInFlight``.
    """

    def __init__(self, sparse: bool = False, eager: bool = True) -> None:
        self.sparse, self.eager = sparse, eager
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.held: list[tuple[Gradients, Future]] = []
        self.in_flight: list[BucketInFlight] = []
        self.waiting: list[BucketInFlight] = []  # buckets that are not sent yet
        self.saved = 0  # exchanges that joining has saved in the current step

    def begin(self) -> None:
        """Begin a step and forget buckets of an earlier one."""
        self.held.clear()
        self.in_flight.clear()
        self.waiting.clear()
        self.saved = 0

    def send(self, session: Session, ready: Gradients) -> Future:
        """Take one bucket; the future completes with its buffer when it holds the result, by the end of ``end``."""
        if session.method.clip is None:
            return self._exchange(session, ready)
        done = in_future(ready.buffer)  # clipping needs the norm of all gradients, known after the last bucket
        self.held.append((ready, done))
        return done

    def end(self, session: Session) -> None:
        """Wait until all buckets are completed, after the last one was sent; raises if an exchange has failed."""
        if session.method.clip is not None and self.held:
            self._exchange_held(session, session.method.clip)
        self._start(session)
        for stage in (self._advance, self._wait):  # start the last stage of all buckets before waiting for any
            for sent in self.in_flight:
                try:
                    stage(session, sent)
                except Exception as error:
                    names = [unit.name for unit in sent.gradients.bucket.units]
                    failure = exchange_failed(session.collective, session.step, names, error)
                    if stage == self._advance and not isinstance(error, NoAnswer):  # others await the next stage
                        session.collective.leave(str(failure))
                    raise failure from error
        if self.saved:
            stages = sum(len(route.stages) for sent in self.in_flight for route in sent.gradients.bucket.routes)
            session.ledger.note(
                f"{stages - self.saved} exchanges a step for {len(self.in_flight)} buckets: gathered messages of less "
                f"than {session.stages.turn_bytes:,.0f} bytes travel together"
            )
        self.in_flight.clear()

    @contextlib.contextmanager
    def side_stream(self, tensor: Tensor) -> Generator[None]:
        """Run the body on a side stream on CUDA, parallel to the backward pass and after the work queued so far."""
        if not tensor.is_cuda:
            yield
            return
        if tensor.device not in self.streams:
            self.streams[tensor.device] = torch.cuda.Stream(tensor.device)
        stream = self.streams[tensor.device]
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            yield

    def _advance(self, session: Session, sent: BucketInFlight) -> None:
        with self.side_stream(sent.gradients.buffer):
            sent.advance(session.workers[0], session.step, session.collective, session.timeout)

    def _wait(self, session: Session, sent: BucketInFlight) -> None:
        sent.wait(session.timeout)

    def _exchange(self, session: Session, ready: Gradients) -> Future:
        """Send one bucket; a small one waits for the next, to be sent together."""
        bucket, buffer, row, worker = ready.bucket, ready.buffer, session.row, session.workers[0]
        bucket.book(row, session.collective)
        with self.side_stream(buffer), Stopwatch(row, "send_seconds"):
            if (self.sparse or ready.back) and buffer.is_cuda:  # they may be freed elsewhere before the exchange ends
                for grad in ready.grads:
                    grad.record_stream(torch.cuda.current_stream(grad.device))
            outbox = pipeline.send(
                bucket, ready.grads, worker, session.step, ready.used, session.loss_scale, not self.sparse, session.turn
            )
        decode = partial(
            pipeline.receive, bucket, outs=ready.grads, seed=session.seed, step=session.step,
            loss_scale=session.loss_scale, kernels=worker.kernels, cleared=outbox.cleared, sparse=self.sparse,
            turn=session.turn,
        )  # fmt: skip
        eager = self.eager or buffer.is_cuda
        sent = BucketInFlight(ready, outbox, decode, row, session.transaction.statuses, eager)
        self.in_flight.append(sent)
        if not bucket.joins or (self.waiting and self.waiting[0].gradients.buffer.device != buffer.device):
            self._start(session)
        self.waiting.append(sent)
        sizes = (one.outbox.messages[0].nbytes for one in self.waiting)
        if not bucket.joins or travel_together(sizes, session.stages.turn_bytes):
            self._start(session)
        return sent.done()

    def _start(self, session: Session) -> None:
        """Start the exchange of all waiting buckets."""
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        with self.side_stream(waiting[0].gradients.buffer):
            inboxes = pipeline.route(
                [sent.gradients.bucket for sent in waiting],
                [sent.outbox.messages for sent in waiting],
                session.collective,
                session.turn,
            )
        self.saved += len(waiting) - 1
        for sent, inbox in zip(waiting, inboxes, strict=True):
            sent.started(inbox)

    def _exchange_held(self, session: Session, threshold: float) -> None:
        each = [pair for held, _ in self.held for pair in zip(held.bucket.units, held.grads, strict=True)]
        by_name = {unit.name: grad for unit, grad in each}
        ordered = [by_name[unit.name] for unit in session.units if unit.name in by_name]
        with self.side_stream(self.held[0][0].buffer):
            whole = partial(session.collective.norm_across_shards, timeout=session.timeout)
            clip(ordered, threshold * session.loss_scale, session.collective.world, whole)
        for ready, done in self.held:
            exchanged = self._exchange(session, ready)
            exchanged.then(lambda exchanged, done=done: resolve(done, exchanged))
        self.held.clear()
