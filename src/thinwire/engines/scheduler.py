"""The bucket scheduler: starts the exchanges of one backward pass and waits for them, in every engine.

``send`` and ``end`` start collectives in the order of the calls, never from a callback. ``end`` waits for all of them,
so an error raised there keeps its type.
"""

import contextlib
from collections.abc import Generator, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from thinwire.comm.collectives import Future, NoAnswer, exchange_failed, in_future
from thinwire.engines.inflight import BucketInFlight, resolve
from thinwire.exchange import pipeline
from thinwire.exchange.buckets import Bucket, travel_together
from thinwire.report.ledger import Stopwatch
from thinwire.session.clipping import clip
from thinwire.session.session import Session

ACCUMULATED = (
    "a backward pass is about to add to gradients that were already averaged over the ranks, with no optimizer step "
    "since: they would be exchanged twice. Accumulate under {}, and leave it for the last micro-batch only."
)

Back: TypeAlias = Sequence[tuple[Tensor, Tensor]]


class Scheduler:
    """A scheduler that holds buckets for clipping, joins small messages, and completes all buckets.

    Args:
        sparse: True to replace a gradient in ``grads`` by a sparse tensor if few of its elements arrive.
        eager: True if a callback completes each future, False if ``end`` does; see ``BucketInFlight``.
    """

    def __init__(self, sparse: bool = False, eager: bool = True) -> None:
        self.sparse, self.eager = sparse, eager
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.held: list[tuple[Bucket, list[Tensor], Tensor, Sequence[bool], Back, Future]] = []
        self.in_flight: list[BucketInFlight] = []
        self.waiting: list[BucketInFlight] = []  # buckets that are not sent yet
        self.saved = 0  # exchanges that joining has saved in the current step

    def begin(self) -> None:
        """Begin a step and forget buckets of an earlier one."""
        self.held.clear()
        self.in_flight.clear()
        self.waiting.clear()
        self.saved = 0

    def send(
        self, session: Session, bucket: Bucket, grads: list[Tensor], buffer: Tensor, used: Sequence[bool],
        back: Back = (),
    ) -> Future:  # fmt: skip
        """Take one bucket; the future completes with ``buffer`` when ``grads`` hold the result, by the end of ``end``.

        Args:
            buffer: the tensor that ``grads`` are views of, or any one of them; it gives the device.
            used: for each unit, True if this rank used it.
            back: pairs (target, copy among ``grads``) to write back at the end.
        """
        if session.method.clip is None:
            return self._exchange(session, bucket, grads, buffer, used, back)
        done = in_future(buffer)  # clipping needs the norm of all gradients, known after the last bucket
        self.held.append((bucket, grads, buffer, used, back, done))
        return done

    def end(self, session: Session) -> None:
        """Wait until all buckets are completed, after the last one was sent.

        Raises:
            ThinwireError: an exchange has failed.
        """
        if session.method.clip is not None and self.held:
            self._exchange_held(session, session.method.clip)
        self._start(session)
        for stage in (self._advance, self._wait):  # start the last stage of all buckets before waiting for any
            for sent in self.in_flight:
                try:
                    stage(session, sent)
                except Exception as error:
                    names = [unit.name for unit in sent.bucket.units]
                    failure = exchange_failed(session.collective, session.step, names, error)
                    if stage == self._advance and not isinstance(error, NoAnswer):  # others await the next stage
                        session.collective.leave(str(failure))
                    raise failure from error
        if self.saved:
            stages = sum(len(route.stages) for sent in self.in_flight for route in sent.bucket.routes)
            session.ledger.note(
                f"{stages - self.saved} exchanges a step for {len(self.in_flight)} buckets: gathered messages of less "
                f"than {session.turn_bytes:,.0f} bytes travel together"
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
        with self.side_stream(sent.buffer):
            sent.advance(session.workers[0], session.collective, session.timeout)

    def _wait(self, session: Session, sent: BucketInFlight) -> None:
        sent.wait(session.timeout)

    def _exchange(
        self, session: Session, bucket: Bucket, grads: list[Tensor], buffer: Tensor, used: Sequence[bool],
        back: Back = (),
    ) -> Future:  # fmt: skip
        """Send one bucket; a small one waits for the next, to be sent together."""
        step, row = session.step, session.row
        bucket.book(row, session.collective)
        with self.side_stream(buffer), Stopwatch(row, "send_seconds"):
            if (self.sparse or back) and buffer.is_cuda:  # they may be freed elsewhere before the exchange ends
                for grad in grads:
                    grad.record_stream(torch.cuda.current_stream(grad.device))
            outbox = pipeline.send(
                bucket, grads, session.workers[0], step, used, session.loss_scale, not self.sparse, session.turn
            )
        sent = BucketInFlight(
            bucket, outbox, grads, buffer, used, session.seed, step, session.turn, session.loss_scale, row,
            session.transaction.statuses, session.workers[0].kernels, self.sparse,
            self.eager or buffer.is_cuda, back,
        )  # fmt: skip
        self.in_flight.append(sent)
        if not bucket.joins or (self.waiting and self.waiting[0].buffer.device != buffer.device):
            self._start(session)
        self.waiting.append(sent)
        sizes = [one.outbox.messages[0].nbytes for one in self.waiting]
        if not bucket.joins or travel_together(sizes, session.turn_bytes):
            self._start(session)
        return sent.done()

    def _start(self, session: Session) -> None:
        """Start the exchange of all waiting buckets."""
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        with self.side_stream(waiting[0].buffer):
            inboxes = pipeline.route(
                [sent.bucket for sent in waiting],
                [sent.outbox.messages for sent in waiting],
                session.collective,
                session.turn,
            )
        self.saved += len(waiting) - 1
        for sent, inbox in zip(waiting, inboxes, strict=True):
            sent.started(inbox)

    def _exchange_held(self, session: Session, threshold: float) -> None:
        by_name = {u.name: g for bucket, grads, *_ in self.held for u, g in zip(bucket.units, grads, strict=True)}
        ordered = [by_name[unit.name] for unit in session.units if unit.name in by_name]
        with self.side_stream(self.held[0][2]):
            whole = partial(session.collective.norm_across_shards, timeout=session.timeout)
            clip(ordered, threshold * session.loss_scale, session.collective.world, whole)
        for bucket, grads, buffer, used, back, done in self.held:
            exchanged = self._exchange(session, bucket, grads, buffer, used, back)
            exchanged.then(lambda exchanged, done=done: resolve(done, exchanged))
        self.held.clear()
