"""The laws of a compressor."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thinwire.core import Compressor, Context, Memory, Payload, Sparse, flat, registry
from thinwire.core.capabilities import compress_sparse
from thinwire.core.tensors import norm

CTX = Context(seed=7, step=3, unit="w", rank=1)
REPEATS = 200
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
