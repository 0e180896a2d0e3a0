"""The exchange of one fragment: it starts after an inner step, and may arrive several steps later."""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.comm.collectives import Collective, InFlight, exchange_failed, network
from thinwire.core.errors import ThinwireError
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
        steps: the inner steps of the round, each of which would have sent a dense gradient.
        inboxes: the messages for each worker of this process.
        distances: a number of each worker that travels with the messages; None if there is none.
    """

    fragment: int
    due: int
    steps: int
    bucket: Bucket
    inboxes: list[list[InFlight]]
    distances: InFlight | None = None
    kept: list[list[Tensor]] | None = None
    """What each worker of this process has sent, before compression, if it may have to be sent again."""


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
    bucket = session.bucket([session.units[i].param for i in chosen])
    with exchanging(session, [unit.name for unit in bucket.units]):
        return _start(session, peers, Flight(fragment, due, steps, bucket, []), deltas, distances)


def _start(
    session: Session,
    peers: Sequence[Collective],
    made: Flight,
    deltas: Sequence[list[Tensor]],
    distances: Sequence[float] | None,
) -> Flight:
    bucket, row, steps = made.bucket, session.row, made.steps
    bucket.book(row, session.collective)
    row.dense_bytes *= steps
    row.compressed_dense_bytes *= steps
    for worker, peer, found in zip(session.workers, peers, deltas, strict=True):
        if session.method.clip is not None:
            clip(found, session.method.clip, peer.world, lambda norm: _whole(session, norm))
        with Stopwatch(row, "send_seconds"):
            outbox = pipeline.send(bucket, found, worker, session.step, [True] * len(found), turn=session.turn)
        made.inboxes += pipeline.route([bucket], [outbox.messages], peer, session.turn)
    for peer, distance in zip(peers, distances or (), strict=distances is not None):
        made.distances = peer.all_gather(
            torch.tensor([distance], dtype=torch.float64, device=deltas[0][0].device).view(torch.uint8)
        )
    return made


def _whole(session: Session, norm: Tensor) -> Tensor:
    return session.collective.norm_across_shards(norm, session.timeout)


def land(session: Session, peers: Sequence[Collective], flight: Flight) -> tuple[list[Tensor], float]:
    """Wait for an exchange and decode it; returns the mean of each unit, and that of the distances."""
    bucket, inboxes = flight.bucket, flight.inboxes
    with Stopwatch(session.row, "exchange_seconds"), exchanging(session, [unit.name for unit in bucket.units]):
        _arrive(inboxes, session.timeout)
        if bucket.relays:
            each = zip(session.workers, peers, inboxes, strict=True)
            inboxes = [pipeline.relay(bucket, inbox, worker, session.step, peer) for worker, peer, inbox in each]
            _arrive(inboxes, session.timeout)
        first = 0.0
        if flight.distances is not None:
            distances = flight.distances.wait(session.timeout).flatten().view(torch.float64)
            first = float(distances[distances.isfinite()].mean().nan_to_num())
    outs = [torch.empty_like(unit.own) for unit in bucket.units]
    with Stopwatch(session.row, "receive_seconds"):
        session.transaction.statuses = pipeline.receive(
            bucket, inboxes[0], outs, session.seed, session.step, kernels=session.workers[0].kernels, turn=session.turn
        )
    return outs, first


@contextlib.contextmanager
def exchanging(session: Session, names: Sequence[str]) -> Generator[None]:
    """Name the ranks that did not answer in an error."""
    try:
        with network(session.timeout):
            yield
    except Exception as error:
        if isinstance(error, ThinwireError):
            raise
        raise exchange_failed(session.collective, session.step, names, error) from error


def _arrive(inboxes: Sequence[Sequence[InFlight]], timeout: float) -> None:
    for arrived in (one for inbox in inboxes for one in inbox):
        arrived.wait(timeout)
