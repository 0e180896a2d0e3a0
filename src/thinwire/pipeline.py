"""The journey of a gradient. Read this first.

    gradient -> [compensate -> compress] -> wire -> collective -> wire -> [decompress -> update] -> optimizer
                 -------- send --------      ------- route -------         ------- receive ------

``send`` and ``receive`` never communicate and ``route`` never computes. The DDP hook, the simulator and whatever
comes later call the same three functions, and only the collective between them differs. So the simulator is equal
to the real run, and bytes are counted in one place.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.core import Context, Kernels, flat, float_at_least_32
from thinwire.exchange.collectives import Collective, InFlight
from thinwire.exchange.routes import Bucket
from thinwire.kernels.reference import REFERENCE
from thinwire.selecting import select
from thinwire.units import Unit, Worker
from thinwire.wire import head

ALL_RIGHT = torch.zeros((), dtype=torch.bool)


def is_bad(values: Tensor) -> Tensor:
    """Whether anything is not finite; a sum finds it in one read, without a temporary."""
    return values.sum(dtype=float_at_least_32(values.dtype)).isfinite().logical_not()


@dataclass(frozen=True)
class Verdict:
    """What all ranks learned of one message, the same on each; a sum is one sender."""

    units: tuple[Unit, ...]
    used: Tensor  # bool [senders, units]
    bad: Tensor  # the same
    clocks: Tensor  # uint8 [senders]: the step each of them is at, modulo head.CLOCK


@dataclass(frozen=True)
class Outbox:
    """What one rank sends of one bucket: a message for each group."""

    messages: list[Tensor]
    cleared: frozenset[int]
    """The units whose gradients are zero now, so that what arrives can be added to them."""


@torch.no_grad()
def send(
    bucket: Bucket, grads: Sequence[Tensor], worker: Worker, step: int, used: Sequence[bool], loss_scale: float = 1.0
) -> Outbox:
    """The sending half: from one rank's gradients to its messages, one for each group of the bucket.

    Everything that only this rank remembers is prepared here, to be final once the optimizer has stepped. The
    gradients may be overwritten.
    """
    asked: list[Tensor] = []
    payloads: list[tuple[Tensor, ...]] = []
    bad: list[Tensor] = []
    contexts = [Context(worker.seed, step, unit.name, worker.rank, worker.kernels) for unit in bucket.units]
    selected = select(bucket.units, grads, worker, contexts, 1.0 / loss_scale)
    for i, (unit, grad, ctx) in enumerate(zip(bucket.units, grads, contexts, strict=True)):
        local = worker.local[unit.name]
        if i in selected:
            x, chosen = local.next["residual"], selected[i]
            payload = unit.compressor.encode(chosen, flat(x)[chosen], x.numel(), ctx)
        else:
            x = unit.memory.compensate(grad, unit.param, local.now, local.next, 1.0 / loss_scale)
            if (carried := local.now.get("carried")) is not None:  # the residual that an earlier method left
                x.add_(carried, alpha=1.0 if unit.memory.stateful else loss_scale)
            payload = unit.compressor.compress(x, local.now, ctx)
        asked.append(x)
        payloads.append(payload)
        bad.append(is_bad(payload[0]) if unit.guarded else ALL_RIGHT.to(x.device))
    messages: list[Tensor] = []
    for group in bucket.groups:
        parts = [payloads[i] for i in group.units]
        if group.has_head:
            found = torch.stack([bad[i] for i in group.units])
            parts.append((head.encode([used[i] for i in group.units], found, group.dtype, step),))
        # what is asked may be the residual itself, which the exchange must not overwrite; a gradient it may
        messages.append(group.layout.pack(parts, in_place=all(asked[i] is grads[i] for i in group.units)))
    for unit, x, payload, ctx in zip(bucket.units, asked, payloads, contexts, strict=True):
        local = worker.local[unit.name]
        own = unit.compressor.decompress(payload, x, local.now, ctx)
        if worker.probe is not None and unit.compressed:
            worker.probe.look(x, own)
        unit.memory.sent(x, own, local.next)
    return Outbox(messages, frozenset(selected))


def route(bucket: Bucket, messages: Sequence[Tensor], collective: Collective) -> list[InFlight]:
    """Start the exchange of every message, and return before it has ended."""
    return [group.start(message, collective) for group, message in zip(bucket.groups, messages, strict=True)]


@torch.no_grad()
def receive(
    bucket: Bucket,
    inbox: Sequence[InFlight],
    outs: Sequence[Tensor],
    seed: int,
    step: int,
    loss_scale: float = 1.0,
    kernels: Kernels = REFERENCE,
    cleared: Set[int] = frozenset(),
) -> list[Verdict]:
    """The receiving half: from what arrived to the gradients for the optimizer, written to ``outs``.

    It is the same on every rank, bit for bit: payloads are added in rank order. Where any rank sent what is not
    finite, an element of every gradient becomes NaN on every rank, so that a loss scaler skips the step on all of them.

    Args:
        cleared: the units of which ``outs`` are zero, where nothing needs to be overwritten.
    """
    verdicts: list[Verdict] = []
    for group, arrived in zip(bucket.groups, inbox, strict=True):
        senders = group.arrived(arrived.result)
        share = 1.0 / len(senders)
        poison: Tensor | None = None
        if group.has_head:
            heads = torch.stack([payloads[-1][0] for payloads in senders])
            used, bad, clocks = head.decode(heads, len(group.units))
            verdicts.append(Verdict(tuple(bucket.units[i] for i in group.units), used, bad, clocks))
            poison = torch.zeros((), device=bad.device).masked_fill_(bad.any(), torch.nan)
        for j, i in enumerate(group.units):
            unit, out = bucket.units[i], outs[i]
            wide = float_at_least_32(out.dtype)  # short dtypes are summed in float32
            mean = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
            for rank, payloads in enumerate(senders):
                ctx = Context(seed, step, unit.name, rank, kernels)
                got = unit.compressor.decompress(payloads[j], mean, unit.shared.now, ctx)
                if rank == 0 and (i not in cleared or mean is not out):
                    got.write_to(mean, share)
                else:
                    got.add_to(mean, share)
            if poison is not None and mean.numel():
                flat(mean)[:1].add_(poison)
            grad = unit.memory.receive(mean, unit.param, unit.shared.now, unit.shared.next)
            if unit.memory.stateful and loss_scale != 1.0:
                grad.mul_(loss_scale)
            if grad is not out:
                out.copy_(grad)
    return verdicts
