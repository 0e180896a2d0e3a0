"""The journey of a gradient. Read this first.

    gradient -> [compensate -> compress] -> wire -> collective -> wire -> [decompress -> update] -> optimizer
                 -------- send --------      ------- route -------         ------- receive ------

``send`` and ``receive`` never communicate and ``route`` never computes. The DDP hook, the simulator and whatever
comes later call the same three functions, and only the collective between them differs. So the simulator is equal
to the real run, and bytes are counted in one place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.core import Context, float_at_least_32, norm
from thinwire.exchange.collectives import Collective, InFlight
from thinwire.exchange.routes import Bucket
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


@torch.no_grad()
def clip(grads: Sequence[Tensor], threshold: float, world: int) -> None:
    """Scale one rank's gradients, in place, to a norm of at most ``threshold * sqrt(world)``.

    With independent noise, the mean of N gradients has 1 / sqrt(N) of their norm, so this is as strong as clipping
    the mean at ``threshold``. (DGC's paper has ``threshold / sqrt(N)``, for gradients that are divided by N before.)
    """
    scale = (threshold * math.sqrt(world) / (norm(grads) + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.device))


@torch.no_grad()
def send(
    bucket: Bucket, grads: Sequence[Tensor], worker: Worker, step: int, used: Sequence[bool], loss_scale: float = 1.0
) -> list[Tensor]:
    """The sending half: from one rank's gradients to its messages, one for each group of the bucket.

    Everything that only this rank remembers is prepared here, to be final once the optimizer has stepped. The
    gradients may be overwritten.
    """
    asked: list[Tensor] = []
    payloads: list[tuple[Tensor, ...]] = []
    bad: list[Tensor] = []
    contexts = [Context(worker.seed, step, unit.name, worker.rank) for unit in bucket.units]
    for unit, grad, ctx in zip(bucket.units, grads, contexts, strict=True):
        local = worker.local[unit.name]
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
    return messages


def route(bucket: Bucket, messages: Sequence[Tensor], collective: Collective) -> list[InFlight]:
    """Start the exchange of every message, and return before it has ended."""
    return [group.start(message, collective) for group, message in zip(bucket.groups, messages, strict=True)]


@torch.no_grad()
def receive(
    bucket: Bucket, inbox: Sequence[InFlight], outs: Sequence[Tensor], seed: int, step: int, loss_scale: float = 1.0
) -> list[Verdict]:
    """The receiving half: from what arrived to the gradients for the optimizer, written to ``outs``.

    It is the same on every rank, bit for bit: payloads are added in rank order. Where any rank sent what is not
    finite, every rank's gradients become NaN, so that a loss scaler skips the step on all of them.
    """
    verdicts: list[Verdict] = []
    for group, arrived in zip(bucket.groups, inbox, strict=True):
        senders = group.arrived(arrived.result)
        factor = 1.0 / len(senders)
        if group.has_head:
            heads = torch.stack([payloads[-1][0] for payloads in senders])
            used, bad, clocks = head.decode(heads, len(group.units))
            verdicts.append(Verdict(tuple(bucket.units[i] for i in group.units), used, bad, clocks))
            factor = torch.full((), factor, dtype=torch.float64, device=bad.device).masked_fill_(bad.any(), torch.nan)
        for j, i in enumerate(group.units):
            unit, out = bucket.units[i], outs[i]
            wide = float_at_least_32(out.dtype)  # short dtypes are summed in float32
            mean = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
            for rank, payloads in enumerate(senders):
                got = unit.compressor.decompress(
                    payloads[j], mean, unit.shared.now, Context(seed, step, unit.name, rank)
                )
                got.write_to(mean) if rank == 0 else got.add_to(mean)
            if group.has_head or len(senders) > 1:
                mean.mul_(factor)
            grad = unit.memory.receive(mean, unit.param, unit.shared.now, unit.shared.next)
            if unit.memory.stateful and loss_scale != 1.0:
                grad.mul_(loss_scale)
            if grad is not out:
                out.copy_(grad)
    return verdicts
