"""The journey of a gradient. Read this first.

    gradient -> [compensate -> compress] -> wire -> collective -> wire -> [decompress -> update] -> optimizer
                 -------- send --------      ------- route -------         ------- receive ------

``send`` and ``receive`` never communicate and ``route`` never computes. On a route of two stages ``relay`` stands
between them: what has arrived is combined, and routed once more. All engines and the simulator call the same functions,
and only the collective differs. So the simulator is equal to the real run, and bytes are counted in one place.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.coding import header
from thinwire.comm.process_group import Collective, InFlight
from thinwire.core.ambient import undisturbed
from thinwire.core.context import Context
from thinwire.core.loops import Kernels
from thinwire.core.tensors import flat
from thinwire.exchange.buckets import Bucket
from thinwire.exchange.fused import ask, select
from thinwire.exchange.receiving import mean_of, written
from thinwire.exchange.units import Unit, Worker
from thinwire.kernels.reference import REFERENCE


@dataclass(frozen=True)
class Verdict:
    """What all ranks learned of one message, the same on each; a sum is one sender."""

    units: tuple[Unit, ...]
    used: Tensor  # bool [senders, units]
    bad: Tensor  # the same
    parted: Tensor  # bool []: whether they are at different steps


@dataclass(frozen=True)
class Outbox:
    """What one rank sends of one bucket: a message for each group."""

    messages: list[Tensor]
    cleared: frozenset[int]
    """The units whose gradients are zero now, so that what arrives can be added to them."""


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
    """The sending half: from one rank's gradients to its messages, one for each group of the bucket.

    What this rank alone remembers is prepared here, to be final once the optimizer has stepped. Gradients may be
    overwritten; ``clear`` asks for zeros where they were read last, to be added to. ``turn``: see ``Context.phase``.
    """
    messages: list[Tensor] = []
    cleared: set[int] = set()
    for group in bucket.groups:
        named = [(piece, bucket.units[piece.unit], grads[piece.unit]) for piece in group.pieces]
        contexts = [
            Context(
                worker.seed, step, piece.key(unit.name), worker.rank, worker.kernels, unit.exact, unit.saturates, turn
            )
            for piece, unit, _ in named
        ]
        selected = select(bucket.units, group.pieces, grads, worker, contexts, 1.0 / loss_scale, clear)
        if clear:
            cleared |= {i for i, pieces in group.by_unit.items() if selected.keys() >= {j for j, _ in pieces}}
        asked = [
            ask(unit, piece, grad, worker, contexts[j], selected.get(j), loss_scale)
            for j, (piece, unit, grad) in enumerate(named)
        ]
        # what is asked may be the residual itself, which the exchange must not overwrite; a gradient it may
        in_place = all(x is grads[piece.unit] for piece, (x, _, _) in zip(group.pieces, asked, strict=True))
        payloads = [payload for _, payload, _ in asked]
        messages.append(group.pack(payloads, group.head(bucket.units, payloads, used, step), in_place=in_place))
        for piece, (x, _, own) in zip(group.pieces, asked, strict=True):
            group.settle(bucket.units[piece.unit], piece, x, own, worker)
    return Outbox(messages, frozenset(cleared))


def route(bucket: Bucket, messages: Sequence[Tensor], collective: Collective, turn: int) -> list[InFlight]:
    """Start the exchange of every message, and return before it has ended."""
    return [group.start(message, collective, turn) for group, message in zip(bucket.groups, messages, strict=True)]


@undisturbed
def relay(
    bucket: Bucket, inbox: Sequence[InFlight], worker: Worker, step: int, collective: Collective
) -> list[InFlight]:
    """Between the halves, once the inbox has ended: owners route the mean of it, followers what their leader chose."""
    return [
        group.relay(bucket.units, arrived, worker, step, collective)
        for group, arrived in zip(bucket.groups, inbox, strict=True)
    ]


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
) -> list[Verdict]:
    """The receiving half: from what arrived to the gradients for the optimizer, written to ``outs``.

    It is the same on every rank, bit for bit: payloads are added in rank order. Where any rank sent what is not
    finite, an element of every gradient becomes NaN on every rank, so that a loss scaler skips the step on all of them.

    Args:
        cleared: the units of which ``outs`` are zero, where nothing needs to be overwritten.
        sparse: where few elements arrive of a unit, replace its ``outs`` by a sparse tensor.
    """
    verdicts: list[Verdict] = []
    for group, arrived in zip(bucket.groups, inbox, strict=True):
        senders, flags = group.opened(arrived)
        poison: Tensor | None = None
        if flags is not None:
            used, bad, parted = header.decode(flags, len(group.units))
            verdicts.append(Verdict(tuple(bucket.units[i] for i in group.units), used, bad, parted))
            if bad.is_cuda or bool(bad.any()):  # on CUDA nobody waits to see
                poison = torch.zeros((), dtype=torch.float32, device=bad.device).masked_fill_(bad.any(), torch.nan)
        for i, pieces in group.by_unit.items():
            unit, out = bucket.units[i], outs[i]
            ctx = Context(seed, step, unit.name, 0, kernels, turn=turn)
            mean = mean_of(group, unit, pieces, senders, out, ctx, i in cleared, sparse)
            if poison is not None:
                (mean.values() if mean.is_sparse else flat(mean))[:1].add_(poison)
            grad = unit.memory.receive(mean, unit.own, unit.shared.now, unit.shared.next, ctx)
            if (carried := unit.shared.now.get("carried")) is not None:  # the mean that an earlier method left
                grad.add_(carried, alpha=1.0 if unit.memory.stateful else loss_scale)
            if unit.memory.stateful and loss_scale != 1.0:
                grad.mul_(loss_scale)
            outs[i] = written(grad, out, saturates=unit.memory.feeds_back and loss_scale == 1.0)
    return verdicts
