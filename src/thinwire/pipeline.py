"""The journey of a gradient. Read this first.

    gradient -> [compensate -> compress] -> wire -> collective -> wire -> [decompress -> update] -> optimizer
                 -------- send --------      ------- route -------         ------- receive ------

``send`` and ``receive`` never communicate and ``route`` never computes. The DDP hook, the simulator and whatever
comes later call the same three functions, and only the collective between them differs. So the simulator is equal
to the real run, and bytes are counted in one place.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.core import Context, float_at_least_32, norm
from thinwire.exchange.collectives import Collective, InFlight
from thinwire.exchange.routes import Bucket
from thinwire.units import Worker


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
def send(bucket: Bucket, grads: Sequence[Tensor], worker: Worker, step: int) -> list[Tensor]:
    """The sending half: from one rank's gradients to its messages, one for each group of the bucket.

    Everything that only this rank remembers is brought up to date here. The gradients may be overwritten.
    """
    asked: list[Tensor] = []
    payloads: list[tuple[Tensor, ...]] = []
    contexts = [Context(worker.seed, step, unit.name, worker.rank) for unit in bucket.units]
    for unit, grad, ctx in zip(bucket.units, grads, contexts, strict=True):
        local = worker.local[unit.name]
        x = unit.memory.compensate(grad, unit.param, local, local)
        if (carried := local.pop("carried", None)) is not None:  # the residual that an earlier method left
            x.add_(carried)
        asked.append(x)
        payloads.append(unit.compressor.compress(x, local, ctx))
    messages = [
        # what is asked may be the residual itself, which the exchange must not overwrite; a gradient it may
        group.layout.pack([payloads[i] for i in group.units], in_place=all(asked[i] is grads[i] for i in group.units))
        for group in bucket.groups
    ]
    for unit, x, payload, ctx in zip(bucket.units, asked, payloads, contexts, strict=True):
        local = worker.local[unit.name]
        own = unit.compressor.decompress(payload, x, local, ctx)
        if worker.probe is not None and unit.compressed:
            worker.probe.look(x, own)
        unit.memory.sent(x, own, local)
    return messages


def route(bucket: Bucket, messages: Sequence[Tensor], collective: Collective) -> list[InFlight]:
    """Start the exchange of every message, and return before it has ended."""
    return [group.start(message, collective) for group, message in zip(bucket.groups, messages, strict=True)]


@torch.no_grad()
def receive(bucket: Bucket, inbox: Sequence[InFlight], outs: Sequence[Tensor], seed: int, step: int) -> None:
    """The receiving half: from what arrived to the gradients for the optimizer, written to ``outs``.

    It is the same on every rank, bit for bit: payloads are added in rank order.
    """
    for group, arrived in zip(bucket.groups, inbox, strict=True):
        senders = group.arrived(arrived.result)
        for j, i in enumerate(group.units):
            unit, out = bucket.units[i], outs[i]
            wide = float_at_least_32(out.dtype)  # short dtypes are summed in float32
            mean = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
            for rank, payloads in enumerate(senders):
                got = unit.compressor.decompress(payloads[j], mean, unit.shared, Context(seed, step, unit.name, rank))
                got.write_to(mean) if rank == 0 else got.add_to(mean)
            if len(senders) > 1:
                mean.mul_(1.0 / len(senders))
            grad = unit.memory.receive(mean, unit.param, unit.shared, unit.shared)
            if grad is not out:
                out.copy_(grad)
