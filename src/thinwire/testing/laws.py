"""The laws of compressors and memories."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thinwire import simulate
from thinwire.compressors import Cast, TopK
from thinwire.core import NOWHERE, Compressor, Context, Memory, Payload, Role, Sparse, flat, registry
from thinwire.core.capabilities import compress_sparse
from thinwire.core.interfaces import local_state, named, shared_state
from thinwire.core.tensors import norm
from thinwire.methods.method import Method, Rule

CTX = Context(seed=7, step=3, unit="w", rank=1)
REPEATS = 200
STEPS = 6
check_near = partial(torch.testing.assert_close, rtol=0.02, atol=0.02)


def check_compressor(
    compressor: Compressor,
    *,
    shapes: Sequence[tuple[int, ...]] = ((60, 50), (8, 4, 3, 3), (500, 1)),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    lossless: bool = False,
) -> None:
    """Check the laws that a compressor must keep, with random inputs.

    It is registered and equal after a round trip through JSON. ``compress`` only reads, and a payload has the shapes
    of that of a meta tensor. Equal contexts give equal bits. ``decompress`` reads no values of ``like``. What is not
    finite is seen in the first tensor of the payload. It contracts, is unbiased, sums and splits as its ``traits``
    say. It sends fewer bytes than float32 and loses something.

    Args:
        shapes: of the tensors to try; those of fewer dimensions than ``min_ndim`` are left out.
        dtypes: of the tensors to try.
        lossless: the compressor loses nothing, by design.

    Raises:
        AssertionError: a law is broken; the message names it.

    Example:
        >>> check_compressor(TopK(0.1))
    """
    check_json(compressor, registry.COMPRESSORS)
    for shape in (shape for shape in shapes if len(shape) >= compressor.traits.min_ndim):
        for dtype in dtypes:
            _check_payload(compressor, torch.randn(shape).to(dtype), lossless)
        _check_nonfinite(compressor, shape)
    _check_bounds(compressor)
    _check_sums(compressor)


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


def _decoded(compressor: Compressor, x: Tensor, ctx: Context = CTX) -> tuple[Payload, Tensor]:
    state = compressor.init(x, replace(ctx, step=0, rank=0))
    payload = compressor.compress(x, state, ctx)
    out = torch.full_like(x, torch.nan)
    compressor.decompress(payload, torch.full_like(x, torch.nan), state, ctx).write_to(out)
    return payload, out


def check_json(part: Compressor | Memory, rows: Mapping[str, Any]) -> None:
    row = json.loads(json.dumps(registry.to_json(part)))
    kind = "compressor" if isinstance(part, Compressor) else "memory"
    assert registry.from_json(row, rows) == part, f"JSON gives another {kind} back: {row}"


def _check_payload(compressor: Compressor, x: Tensor, lossless: bool) -> None:
    before = x.clone()
    payload, out = _decoded(compressor, x)
    assert torch.equal(x, before), "compress() changes its input"
    like = compressor.compress(x.to("meta"), {}, CTX)
    shapes = [[(tuple(t.shape), t.dtype) for t in one] for one in (payload, like)]
    assert shapes[0] == shapes[1], f"a payload is {shapes[0]}, that of a meta tensor {shapes[1]}"
    assert all(t.is_contiguous() for t in payload), "a tensor of the payload is not contiguous"
    assert out.isfinite().all(), "decompress() leaves elements unwritten, or reads the values of like"
    again, _ = _decoded(compressor, before)
    assert all(torch.equal(a, b) for a, b in zip(payload, again, strict=True)), "equal contexts give other bits"
    state = compressor.init(x, replace(CTX, step=0, rank=0))
    base = torch.randn(x.shape, dtype=torch.float64)
    total, wide = base.clone(), torch.empty_like(base)
    got = compressor.decompress(payload, x, state, CTX)
    got.add_to(total, alpha=-2.0)
    got.write_to(wide)
    torch.testing.assert_close(total, base - 2.0 * wide, msg="add_to() and write_to() of the decoded differ")
    lost, nbytes = float((x.double() - out.double()).square().sum()), sum(t.nbytes for t in payload)
    if lossless:
        assert lost == 0.0, f"it loses {lost:.3g} and is said to lose nothing"
    else:
        assert lost > 0.0, "it loses nothing of a random tensor: pass lossless=True if that is meant"
        assert nbytes < 4 * x.numel(), f"a payload of {nbytes} bytes for {x.numel()} elements is no less than float32"


def _check_nonfinite(compressor: Compressor, shape: tuple[int, ...]) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(shape)
        flat(x)[int(torch.randint(x.numel(), ()))] = value
        first = _decoded(compressor, x)[0][0]
        assert not bool(first.sum().isfinite()), (
            f"{value} in the input is not seen in the first tensor of the payload, by which ranks agree to skip"
        )


def _check_bounds(compressor: Compressor) -> None:
    """Contraction and variance, from the mean over random encodings of one tensor, within five standard errors."""
    shape = (10, 8) if compressor.traits.min_ndim > 1 else (80,)
    x = torch.distributions.StudentT(3.0).sample(shape)
    if compressor.init(x, CTX):
        return
    size = float(x.double().square().sum())
    outs = torch.stack([_decoded(compressor, x, replace(CTX, step=step))[1].double() for step in range(REPEATS)])
    lost = (outs - x).square().flatten(1).sum(1) / size
    slack = 5 * float(lost.std(correction=0)) / REPEATS**0.5 + 1e-5
    alpha, omega = (bound(x.numel()) for bound in (compressor.traits.contraction, compressor.traits.variance))
    if alpha:
        assert float(lost.mean()) <= 1.0 - alpha + slack, (
            f"it loses {float(lost.mean()):.3g}, more than 1 - {alpha:.3g}"
        )
    if omega is not None:
        assert float(lost.mean()) <= omega + slack, f"its variance is {float(lost.mean()):.3g}, more than {omega:.3g}"
        bias = float(norm([outs.mean(0) - x])) / size**0.5
        assert bias <= 5 * (omega / REPEATS) ** 0.5 + 1e-6, f"it is said to be unbiased; its mean is off by {bias:.3g}"


def _check_sums(compressor: Compressor) -> None:
    x, y = torch.randn(2, 30, 20)
    if compressor.traits.summable:
        both = zip(_decoded(compressor, x)[0], _decoded(compressor, y)[0], strict=True)
        state, out = compressor.init(x, replace(CTX, step=0, rank=0)), torch.empty_like(x)
        compressor.decompress(tuple(a + b for a, b in both), x, state, CTX).write_to(out)
        expected = _decoded(compressor, x)[1] + _decoded(compressor, y)[1]
        check_near(out, expected, msg="payloads don't sum as tensors do")
    if compressor.traits.splittable:
        like, indices = torch.empty(600, device="meta"), torch.arange(0, 600, 3)
        payload = compress_sparse(compressor, Sparse(indices, torch.randn(200), 1 / 3), like, {}, CTX)
        shapes = [[(tuple(t.shape), t.dtype) for t in one] for one in (payload, compressor.compress(like, {}, CTX))]
        assert shapes[0] == shapes[1], "a sum that is compressed once more has another payload"


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
