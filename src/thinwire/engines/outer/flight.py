"""The exchange of one fragment: it starts after an inner step, and may arrive several steps later."""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.comm.collectives import Collective, InFlight, exchange_failed
from thinwire.exchange import pipeline
from thinwire.exchange.buckets import Bucket
from thinwire.report.ledger import Stopwatch
from thinwire.session.clipping import clip
from thinwire.session.session import Session


@dataclass
class Flight:
    """An exchange that has started.

    Args:
        due: the inner step after which its outer step is made.
        inboxes: the messages for each worker of this process.
        distances: a number of each worker that travels with the messages; None if there is none.
    """

    fragment: int
    due: int
    bucket: Bucket
    inboxes: list[list[InFlight]]
    distances: InFlight | None = None


def start(
    session: Session,
    peers: Sequence[Collective],
    fragment: int,
    due: int,
    chosen: Sequence[int],
    deltas: Sequence[list[Tensor]],
    steps: int,
    distances: Sequence[float] | None,
) -> Flight:
    """Compress and send one fragment of each worker of this process.

    Args:
        peers: the collective of each worker.
        chosen: the session's units in the fragment.
        deltas: what each worker has changed of them; may be overwritten.
        steps: the inner steps of the round, each of which would have sent a dense gradient.
        distances: a number of each worker to send along, or None.
    """
    bucket, row = session.bucket([session.units[i].param for i in chosen]), session.row
    bucket.book(row, session.collective)
    row.dense_bytes *= steps
    row.compressed_dense_bytes *= steps
    inboxes: list[list[InFlight]] = []
    for worker, peer, found in zip(session.workers, peers, deltas, strict=True):
        if session.method.clip is not None:
            clip(found, session.method.clip, peer.world, lambda norm: _whole(session, norm))
        with Stopwatch(row, "send_seconds"):
            outbox = pipeline.send(bucket, found, worker, session.step, [True] * len(found), turn=session.turn)
        inboxes += pipeline.route([bucket], [outbox.messages], peer, session.turn)
    told = None
    for peer, distance in zip(peers, distances or (), strict=distances is not None):
        told = peer.all_gather(
            torch.tensor([distance], dtype=torch.float64, device=deltas[0][0].device).view(torch.uint8)
        )
    return Flight(fragment, due, bucket, inboxes, told)


def _whole(session: Session, norm: Tensor) -> Tensor:
    return session.collective.norm_across_shards(norm, session.timeout)


def land(session: Session, peers: Sequence[Collective], flight: Flight) -> tuple[list[Tensor], float]:
    """Wait for an exchange and decode it; returns the mean of each unit, and that of the distances."""
    bucket, inboxes = flight.bucket, flight.inboxes
    with _waiting(session, bucket):
        _arrive(inboxes, session.timeout)
        if bucket.relays:
            each = zip(session.workers, peers, inboxes, strict=True)
            inboxes = [pipeline.relay(bucket, inbox, worker, session.step, peer) for worker, peer, inbox in each]
            _arrive(inboxes, session.timeout)
    outs = [torch.empty_like(unit.own) for unit in bucket.units]
    with Stopwatch(session.row, "receive_seconds"):
        session.transaction.statuses = pipeline.receive(
            bucket, inboxes[0], outs, session.seed, session.step, kernels=session.workers[0].kernels, turn=session.turn
        )
    if flight.distances is None:
        return outs, 0.0
    return outs, float(flight.distances.wait(session.timeout).flatten().view(torch.float64).mean())


@contextlib.contextmanager
def _waiting(session: Session, bucket: Bucket) -> Generator[None]:
    """Measure the time of waiting, and name the ranks that did not answer."""
    with Stopwatch(session.row, "exchange_seconds"):
        try:
            yield
        except Exception as error:
            names = [unit.name for unit in bucket.units]
            raise exchange_failed(session.collective, session.step, names, error) from error


def _arrive(inboxes: Sequence[Sequence[InFlight]], timeout: float) -> None:
    for arrived in (one for inbox in inboxes for one in inbox):
        arrived.wait(timeout)
