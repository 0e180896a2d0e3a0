"""The journey of a tensor through the network. Read this first.

    gradient -> [compensate -> compress] -> wire -> collective -> wire -> [decompress -> update] -> optimizer
                 -------- send --------      ------- route -------         ------- receive ------

``send`` and ``receive`` never communicate, and ``route`` never computes. On a route of two stages, ``relay`` runs
between them: the ranks combine what has arrived, and route the result. All engines and the simulator call these four
functions, on every route; only the collective differs. So the simulator equals the real run, and bytes are counted in
one place.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor

from thinwire.coding import header
from thinwire.comm.collectives import Carrier, InFlight, RowCarrier
from thinwire.core import Context, flat
from thinwire.core.ambient import undisturbed
from thinwire.core.loops import Kernels
from thinwire.exchange.buckets import Bucket
from thinwire.exchange.fused import compress, select
from thinwire.exchange.receiving import written
from thinwire.exchange.status import StepStatus
from thinwire.exchange.workers import Worker
from thinwire.kernels.reference import REFERENCE


@dataclass(frozen=True)
class Outbox:
    """The messages that one rank sends for one bucket, one on each route."""

    messages: list[Tensor]
    cleared: frozenset[int]
    """The units whose gradients are zero now, so that the decoded values can be added to them."""


@undisturbed
def send(
    bucket: Bucket,
    grads: Sequence[Tensor],
    worker: Worker,
    step: int,
    used: Sequence[bool],
    loss_scale: float = 1.0,
    clear: bool = True,
    turn: int | None = None,
) -> Outbox:
    """Turn one rank's gradients into its messages, one for each route of the bucket.

    The next local state is written here; it is committed when the optimizer steps. Gradients may be overwritten.
    ``clear``: set them to zero after the last read, if possible in the same pass. ``turn``: see ``Context.phase``.
    """
    messages: list[Tensor] = []
    cleared: set[int] = set()
    for route in bucket.routes:
        named = [(piece, bucket.units[piece.unit], grads[piece.unit]) for piece in route.pieces]
        contexts = [
            Context(
                worker.seed, step, piece.key(unit.name), worker.rank, worker.kernels, unit.exact, unit.saturates, turn
            )
            for piece, unit, _ in named
        ]
        selected = select(bucket.units, route.pieces, grads, worker, contexts, 1.0 / loss_scale, clear)
        if clear:
            cleared |= {i for i, pieces in route.by_unit.items() if selected.keys() >= {j for j, _ in pieces}}
        compressed = [
            compress(unit, piece, grad, worker, contexts[j], selected.get(j), loss_scale)
            for j, (piece, unit, grad) in enumerate(named)
        ]
        # the compressed tensor may be the residual itself, which the exchange must not overwrite; a gradient may be
        in_place = all(x is grads[piece.unit] for piece, (x, _, _) in zip(route.pieces, compressed, strict=True))
        payloads = [payload for _, payload, _ in compressed]
        messages.append(route.pack(payloads, route.header(bucket.units, payloads, used, step), in_place=in_place))
        for piece, (x, _, own) in zip(route.pieces, compressed, strict=True):
            route.update_residual(bucket.units[piece.unit], piece, x, own, worker)
    return Outbox(messages, frozenset(cleared))


def route(
    buckets: Sequence[Bucket], messages: Sequence[Sequence[Tensor]], collective: Carrier, turn: int
) -> list[list[InFlight]]:
    """Start the exchange of every message of these buckets, and return before it has ended.

    Several buckets must have one gathered message each (``Bucket.joins``). They are sent as one to save latency.
    """
    if len(buckets) == 1:
        each = zip(buckets[0].routes, messages[0], strict=True)
        return [[route.start(message, collective, turn) for route, message in each]]
    ends = accumulate(message.numel() for [message] in messages)
    joint = collective.all_gather(torch.cat([message for [message] in messages]))
    return [[replace(joint, columns=columns)] for columns in pairwise((0, *ends))]


@undisturbed
def relay(bucket: Bucket, inbox: Sequence[InFlight], worker: Worker, step: int, collective: Carrier) -> list[InFlight]:
    """Combine what has arrived and start the second stage: owners send means, others the leader's selection."""
    each = zip(bucket.routes, inbox, strict=True)
    return [route.relay(bucket.units, arrived, worker, step, collective) for route, arrived in each]


@undisturbed
def receive(
    bucket: Bucket,
    inbox: Sequence[InFlight],
    outs: list[Tensor],
    seed: int,
    step: int,
    loss_scale: float = 1.0,
    kernels: Kernels = REFERENCE,
    cleared: Set[int] = frozenset(),
    sparse: bool = False,
    turn: int | None = None,
) -> list[StepStatus]:
    """Decode the received messages into the gradients for the optimizer, written to ``outs``.

    The result is bit-identical on every rank: payloads are added in rank order. If any rank sent a nonfinite value,
    an element of every gradient becomes NaN on every rank, so that a loss scaler skips the step on all of them.
    ``cleared``: the units whose ``outs`` are zero, so that values can be added without overwriting first. ``sparse``:
    replace the ``outs`` of a unit by a sparse tensor if few of its elements arrive.
    """
    statuses: list[StepStatus] = []
    for route, arrived in zip(bucket.routes, inbox, strict=True):
        senders, headers = route.opened(arrived)
        poison: Tensor | None = None
        if headers is not None:
            used, nonfinite, apart = header.decode(headers, len(route.units))
            statuses.append(StepStatus(tuple(bucket.units[i] for i in route.units), used, nonfinite, apart))
            if nonfinite.is_cuda or bool(nonfinite.any()):  # on CUDA without a synchronization
                poison = torch.zeros((), dtype=torch.float32, device=nonfinite.device)
                poison.masked_fill_(nonfinite.any(), torch.nan)
        for i in route.by_unit:
            unit, out = bucket.units[i], outs[i]
            ctx = Context(seed, step, unit.name, 0, kernels, turn=turn)
            mean = route.combine(unit, i, senders, out, ctx, zero=i in cleared, sparse=sparse)
            if poison is not None:
                (mean.values() if mean.is_sparse else flat(mean))[:1].add_(poison)
            grad = unit.memory.receive(mean, unit.own, unit.shared.now, unit.shared.next, ctx)
            if (pending := unit.shared.now.get("pending_residual")) is not None:  # of an earlier method
                grad.add_(pending, alpha=1.0 if unit.memory.stateful else loss_scale)
            if unit.memory.stateful and loss_scale != 1.0 and route.unscaled:
                grad.mul_(loss_scale)
            saturates = unit.feeds_back and loss_scale == 1.0 and route.unscaled
            outs[i] = written(grad, out, saturates=saturates)
    return statuses


def exchange(
    bucket: Bucket, grads: list[Tensor], outs: list[Tensor], worker: Worker, step: int, carrier: RowCarrier,
    timeout: float, loss_scale: float = 1.0,
) -> None:  # fmt: skip
    """Run the whole exchange of a bucket on a route of rows, within a forward or backward pass. Writes ``outs``."""
    collective = cast(Carrier, carrier)  # such a route needs no more of it
    outbox = send(bucket, grads, worker, step, [True] * len(grads), loss_scale, clear=False)
    [[arrived]] = route([bucket], [outbox.messages], collective, step)
    arrived.wait(timeout)
    if bucket.relays:
        [arrived] = relay(bucket, [arrived], worker, step, collective)
        arrived.wait(timeout)
    receive(bucket, [arrived], outs, worker.seed, step, loss_scale)
