"""The rounds of local updates: when each fragment is exchanged, and when its outer step is made.

One exchange is in flight at a time. It is decoded where its outer step is due, or earlier, if a checkpoint is written:
the decoded mean then waits for its time, so a resumed run has the same bits.
"""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinwire.comm.collectives import Collective, InFlight, exchange_failed
from thinwire.comm.texts import known_to_all
from thinwire.core.errors import ThinwireError
from thinwire.core.tensors import norm
from thinwire.engines.outer.outer_step import fragments_of, move
from thinwire.engines.outer.replica import Replica, averaged
from thinwire.exchange import pipeline
from thinwire.exchange.buckets import Bucket
from thinwire.exchange.units import Unit
from thinwire.methods.local_settings import Local
from thinwire.report.ledger import Stopwatch
from thinwire.session.clipping import clip
from thinwire.session.session import Session


@dataclass
class Flight:
    """The exchange of one fragment."""

    fragment: int
    due: int
    """The inner step after which its outer step is made."""
    bucket: Bucket
    inboxes: list[list[InFlight]]
    firsts: InFlight | None = None
    """All workers' distances of the first inner step of the round."""


@dataclass
class Late:
    """Decoded updates of one fragment that wait for their outer step."""

    fragment: int
    due: int
    means: list[Tensor] = field(default_factory=list[Tensor])
    """One for each unit; empty if the round was skipped."""
    divisor: float = 1.0


class Rounds:
    """The rounds of one session.

    Args:
        session: its units are the anchors.
        replicas: the workers of this process.
        peers: the collective of each.
    """

    def __init__(self, session: Session, replicas: Sequence[Replica], peers: Sequence[Collective]) -> None:
        self.session, self.replicas, self.peers = session, replicas, peers
        self.fragments = fragments_of([unit.name for unit in session.units], self.local.fragments)
        self.inner = self.rounds = 0
        """The inner steps made, equal on all ranks between rounds."""
        self.exchanged_at = [0] * self.local.fragments
        """The inner step of each fragment's last exchange."""
        self.momentum: dict[str, Tensor] = {}
        self.lr = [0.0] * len(session.units)
        """The inner learning rates at the start of the round."""
        self.flight: Flight | None = None
        self.late: Late | None = None
        self.first = [0.0] * len(replicas)
        """The distance of each worker's first inner step in the round."""
        self.moved = 0.0
        """The distance of the anchor's last outer step."""

    @property
    def local(self) -> Local:
        """The settings, which ``set_method`` may change between rounds."""
        assert self.session.method.local is not None
        return self.session.method.local

    @property
    def begins(self) -> bool:
        """True if no fragment is in the middle of a round."""
        return self.flight is None and self.late is None and all(at == self.inner for at in self.exchanged_at)

    # -- the clock -------------------------------------------------------------------------------------------------

    def due(self, fragment: int) -> bool:
        """Return True if this fragment is exchanged after the present inner step."""
        local = self.local
        if self.inner <= local.start:
            return True
        offset = -(-local.every * (fragment + 1) // local.fragments)
        return (self.inner - local.start - offset) % local.every == 0 and self.inner - local.start >= offset

    @torch.no_grad()
    def stepped(self) -> None:
        """Act on an inner step that all workers of this process have just made."""
        if self.inner == self.exchanged_at[0]:
            self._begin_round()
        self.inner += 1
        if not self.local.late and self._waits_for() == self.inner:
            self.finish()
        for fragment in range(self.local.fragments):
            if self.due(fragment):
                self._exchange(fragment)

    def _begin_round(self) -> None:
        self.lr = self.replicas[0].learning_rates()
        if self.local.penalty is not None:
            for i, replica in enumerate(self.replicas):
                self.first[i] = self._norm(self._deltas(replica, range(len(replica.params))))

    def _norm(self, tensors: Sequence[Tensor]) -> float:
        return float(self.session.collective.norm_across_shards(norm(tensors), self.session.timeout))

    def _waits_for(self) -> int | None:
        waiting = self.flight or self.late
        return None if waiting is None else waiting.due

    # -- the exchange ----------------------------------------------------------------------------------------------

    def _deltas(self, replica: Replica, chosen: Sequence[int]) -> list[Tensor]:
        """Return ``anchor - parameters``; the anchor in the parameter's dtype, as the worker began with it."""
        pairs = [(self.session.units[i].own, replica.params[i]) for i in chosen]
        return [anchor.to(param.dtype).to(anchor.dtype) - param for anchor, param in pairs]

    def _exchange(self, fragment: int) -> None:
        local, chosen = self.local, self.fragments[fragment]
        deltas = [self._deltas(replica, chosen) for replica in self.replicas]
        if local.late and (self.flight is not None or self.late is not None):
            self.finish(reset=False)
        self._start(fragment, chosen, deltas)
        if local.late:
            self._give(chosen, 0.0)
        elif local.steps_late == 0 or self.inner <= local.start:
            self.finish()

    def _start(self, fragment: int, chosen: Sequence[int], deltas: list[list[Tensor]]) -> None:
        session, local = self.session, self.local
        session.begin_step()
        if fragment == 0:
            self._average()
        bucket = session.bucket([session.units[i].param for i in chosen])
        bucket.book(session.row, session.collective)
        steps = self.inner - self.exchanged_at[fragment]
        session.row.dense_bytes *= steps
        session.row.compressed_dense_bytes *= steps
        self.exchanged_at[fragment] = self.inner
        inboxes: list[list[InFlight]] = []
        for worker, peer, found in zip(session.workers, self.peers, deltas, strict=True):
            if local.per_lr:
                for i, delta in zip(chosen, found, strict=True):
                    delta.div_(self.lr[i] or 1.0)
            if session.method.clip is not None:
                clip(found, session.method.clip, peer.world)
            with Stopwatch(session.row, "send_seconds"):
                outbox = pipeline.send(bucket, found, worker, session.step, [True] * len(found), turn=session.turn)
            inboxes += pipeline.route([bucket], [outbox.messages], peer, session.turn)
        firsts = None
        if local.penalty is not None:
            for peer, first in zip(self.peers, self.first, strict=True):
                firsts = peer.all_gather(torch.tensor([first], dtype=torch.float64).view(torch.uint8))
        due = self.inner + (local.every if local.late else local.steps_late)
        self.flight = Flight(fragment, due, bucket, inboxes, firsts)

    def _average(self) -> None:
        """Average buffers and the optimizers' moments, if the method says so."""
        local, timeout = self.local, self.session.timeout
        self.rounds += 1
        if local.buffers == "average":
            averaged(self.peers, [replica.buffers for replica in self.replicas], timeout)
        if local.sync_moments is not None and self.rounds % local.sync_moments == 0:
            averaged(self.peers, [replica.moments() for replica in self.replicas], timeout)

    def land(self) -> None:
        """Wait for the exchange in flight, decode it, and commit the compressor's state. All ranks call it together."""
        session, flight = self.session, self.flight
        if flight is None:
            return
        bucket, inboxes = flight.bucket, flight.inboxes
        with self._waiting(flight):
            arrive(inboxes, session.timeout)
            if bucket.relays:
                each = zip(session.workers, self.peers, inboxes, strict=True)
                inboxes = [pipeline.relay(bucket, inbox, worker, session.step, peer) for worker, peer, inbox in each]
                arrive(inboxes, session.timeout)
        outs = [torch.empty_like(unit.own) for unit in bucket.units]
        with Stopwatch(session.row, "receive_seconds"):
            session.transaction.statuses = pipeline.receive(
                bucket, inboxes[0], outs, session.seed, session.step, kernels=session.workers[0].kernels,
                turn=session.turn,
            )  # fmt: skip
        divisor = 1.0
        if flight.firsts is not None:
            firsts = flight.firsts.wait(session.timeout).flatten().view(torch.float64)
            divisor = self.local.divisor(self.moved, float(firsts.mean()))
        session.end_step()
        self.flight = None
        self.late = Late(flight.fragment, flight.due, outs, divisor)
        if session.transaction.failed or not all(bool(out.isfinite().all()) for out in outs):
            self.late.means = []
            self._refuse()
        else:
            session.commit(bucket.units)

    def _refuse(self) -> None:
        """Take back the exchange of a nonfinite update, which all workers have seen."""
        session, transaction = self.session, self.session.transaction
        complaint = f"inner step {self.inner}: the update of a worker is not finite"
        if not transaction.failed:  # dense messages have no header
            session.ledger.skipped += 1
            session.ledger.note(f"{complaint}; the round is taken back on all workers")
        session.undo()
        if transaction.on_nonfinite == "raise":
            raise known_to_all(ThinwireError(f"{complaint}; the anchor is that of the round before"))

    @contextlib.contextmanager
    def _waiting(self, flight: Flight) -> Generator[None]:
        """Measure the time of waiting, and name the ranks that did not answer."""
        session = self.session
        with Stopwatch(session.row, "exchange_seconds"):
            try:
                yield
            except Exception as error:
                names = [unit.name for unit in flight.bucket.units]
                raise exchange_failed(session.collective, session.step, names, error) from error

    def finish(self, reset: bool = True) -> None:
        """Make the outer step of the exchange in flight. All ranks call it together.

        Args:
            reset: give the workers the new anchor.
        """
        self.land()
        late, self.late = self.late, None
        if late is None:
            return
        chosen, local = self.fragments[late.fragment], self.local
        if not late.means:
            self._skip(chosen)
            return
        before: list[Tensor] = []
        for i, mean in zip(chosen, late.means, strict=True):
            unit = self.session.units[i]
            if late.divisor != 1.0:
                mean.div_(late.divisor)
            step = move(mean, self._momentum(unit), local)
            unit.own.sub_(step, alpha=(self.lr[i] or 1.0) if local.per_lr else 1.0)
            before.append(step)
        if local.penalty is not None:
            self.moved = self._norm(before)
        if reset:
            self._give(chosen, local.mix)

    def end(self) -> None:
        """End the last round, which may be short, so that all workers hold the anchor. All ranks call it together."""
        self.finish()
        for fragment, at in enumerate(self.exchanged_at):
            if at < self.inner:
                self._exchange(fragment)
                self.finish()
        self._give(range(len(self.session.units)), 0.0)

    def _momentum(self, unit: Unit) -> Tensor | None:
        if self.local.momentum == 0.0:
            return None
        if unit.name not in self.momentum:
            self.momentum[unit.name] = torch.zeros_like(unit.own)
        return self.momentum[unit.name]

    def _give(self, chosen: Sequence[int], mix: float) -> None:
        """Set the workers' parameters to the anchor, but for the share ``mix`` of their own."""
        for replica in self.replicas:
            for i in chosen:
                anchor = self.session.units[i].own
                if mix == 0.0:
                    replica.params[i].copy_(anchor)
                else:
                    replica.params[i].lerp_(anchor.to(replica.params[i].dtype), 1.0 - mix)

    def _skip(self, chosen: Sequence[int]) -> None:
        """Take back a round with a nonfinite update: all workers begin again from the anchor."""
        for worker, replica in zip(self.session.workers, self.replicas, strict=True):
            if cleared := replica.clear_nonfinite():
                self.session.ledger.note(
                    f"inner step {self.inner}: cleared nonfinite optimizer state of {cleared} on rank {worker.rank}"
                )
        self._give(chosen, 0.0)


def arrive(inboxes: Sequence[Sequence[InFlight]], timeout: float) -> None:
    """Wait for all messages."""
    for inbox in inboxes:
        for arrived in inbox:
            arrived.wait(timeout)
