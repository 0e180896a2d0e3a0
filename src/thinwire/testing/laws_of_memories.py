"""The laws of a memory."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from thinwire import simulate
from thinwire.compressors import Cast, TopK
from thinwire.core import NOWHERE, Compressor, Memory, Role, registry
from thinwire.core.interfaces import local_state, named, shared_state
from thinwire.core.tensors import norm
from thinwire.methods.method import Method, Rule
from thinwire.testing.laws_of_compressors import check_json, check_near

STEPS = 6


def check_memory(memory: Memory, compressor: Compressor | None = None) -> None:
    """Check the laws that a memory must keep, with random inputs.

    It is registered and equal after a round trip through JSON. Its slots and ``dtype`` agree. ``compensate`` and
    ``sent`` write every element of the next local state and nothing of the last one; ``receive`` does so with the
    shared state. If it has one pending slot and no other, what is pending and what was sent add up to all gradients.
    A scale is applied, and what comes back unsent is taken in. It trains a model with two simulated workers on both
    routes, with fewer bytes than dense.

    Args:
        compressor: one that fits it; None for ``TopK(0.1)``.

    Raises:
        AssertionError: a law is broken; the message names it.

    Example:
        >>> check_memory(thinwire.memories.ErrorFeedback())
    """
    compressor = compressor or TopK(0.1)
    check_json(memory, registry.MEMORIES)
    _check_states(memory, compressor)
    if [slot.role for slot in memory.slots.values()] == [Role.PENDING]:
        _check_conservation(memory, compressor)
    _check_training(memory, compressor)


def _check_states(memory: Memory, compressor: Compressor) -> None:
    param, grad = torch.randn(2, 30, 20)
    like = torch.empty(30, 20, dtype=memory.dtype(torch.float32))
    local, shared = local_state(memory, like), shared_state(memory, like)
    old = {key: torch.randn(30, 20).to(x.dtype) for key, x in (shared | local).items()}
    kept = {key: x.clone() for key, x in old.items()}
    new = {key: torch.full_like(x, torch.nan) for key, x in local.items()}
    x = memory.compensate(grad, param, old, new, 1.0, NOWHERE)
    assert x.shape == grad.shape, f"compensate() returns a tensor of shape {tuple(x.shape)} for {tuple(grad.shape)}"
    assert x.dtype == memory.dtype(torch.float32), f"compensate() returns {x.dtype}, and dtype() says {like.dtype}"
    if memory.stateful:
        other = {key: torch.full_like(value, torch.nan) for key, value in old.items()}
        scaled = memory.compensate(8.0 * grad, param, old, other, 0.125, NOWHERE)
        assert torch.equal(scaled, x), "compensate() does not multiply the gradient by scale (1 / loss scale)"
    x = x.clone()  # it may be a slot
    decoded = compressor.decompress(compressor.compress(x, {}, NOWHERE), x, {}, NOWHERE)
    before = {key: value.clone() for key, value in new.items()}
    memory.sent(decoded, new)
    again = {key: value.clone() for key, value in new.items()}
    memory.sent(decoded, again, sign=1.0)
    for key in (*named(memory, Role.PENDING), *named(memory, Role.ESTIMATE)):
        if key in new:
            check_near(again[key], before[key], msg=f"sent() with sign=1.0 does not give back slot {key!r}")
    received = {key: torch.full_like(x, torch.nan) for key, x in shared.items()}
    out = memory.receive(torch.randn(30, 20), param, {key: old[key] for key in shared}, received, NOWHERE)
    for key, value in (new | received).items():
        assert not bool(value.isnan().any()), f"slot {key!r} of the next state is not written in every element"
    assert not bool(out.isnan().any()), "receive() reads what is not written yet"
    for key, value in old.items():
        assert torch.equal(value, kept[key]), f"slot {key!r} of the last state is written to; only the next one may be"


def _check_conservation(memory: Memory, compressor: Compressor) -> None:
    like = torch.empty(40, 30, dtype=memory.dtype(torch.float64))
    old, (total, sent) = local_state(memory, like), torch.zeros(2, 40, 30, dtype=torch.float64)
    for step in range(STEPS):
        grad, new = torch.randn(40, 30, dtype=torch.float64), {key: torch.empty_like(x) for key, x in old.items()}
        ctx = replace(NOWHERE, step=step)
        x = memory.compensate(grad, torch.zeros(40, 30), old, new, 1.0, ctx)
        decoded = compressor.decompress(compressor.compress(x, {}, ctx), x, {}, ctx)
        memory.sent(decoded, new)
        decoded.add_to(sent)
        total, old = total + grad, new
    [pending] = old.values()
    assert float(norm([total - sent])) > 0.0, "nothing is pending: the compressor loses nothing here"
    torch.testing.assert_close(
        sent + pending.double(), total, rtol=1e-5, atol=1e-5, msg="sent + pending is not the sum of the gradients"
    )


def _check_training(memory: Memory, compressor: Compressor) -> None:
    torch.manual_seed(0)
    model, target = nn.Linear(32, 24), torch.randn(32, 24)

    def batches(worker: int, step: int) -> Tensor:
        return torch.randn(16, 32, generator=torch.Generator().manual_seed(100 * step + worker))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x @ target).square().mean()

    for route in ("all_gather", "two_phase"):
        method = Method("checked", (Rule(compressor, memory, min_ndim=2), Rule(Cast(), memory)), route=route)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        result = simulate(model, method, optimizer=optimizer, batches=batches, loss=loss, workers=2, steps=STEPS)
        assert all(value == value for value in result.losses), "the loss is not finite"
        assert result.ledger.ratio > 1.0, f"it sends {1 / result.ledger.ratio:.2f} times the bytes of dense"
