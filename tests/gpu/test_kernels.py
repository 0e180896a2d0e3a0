"""On the device the kernels leave the bits that plain PyTorch leaves on the CPU."""

import math
from dataclasses import replace

import pytest
import torch

from tests.gpu.training import CUDA, DEVICE
from tests.kernels.test_kernels import DTYPES, INF, NAN, RULES, again, hostile, same
from thinwire.compressors import TopK
from thinwire.core import Context
from thinwire.core.loops import Cut, Pass, smallest
from thinwire.exchange.fused import select, warm_up_kernels
from thinwire.exchange.units import Piece, Unit
from thinwire.exchange.workers import Worker
from thinwire.kernels.reference import REFERENCE
from thinwire.memories import ErrorFeedback, MomentumCorrection

KINDS = ("normal", "equal", "zero", "denormal", "not finite")
LONG = 3_000_000 if CUDA else 5_000
SIZES = [1, 63, 64, 65, 1023, 4097, LONG] if CUDA else [1, 65, LONG]
"""The interpreter is slow, and has more of them in tests/kernels."""


def on(cut: Cut) -> Cut:
    return replace(cut, threshold=cut.threshold.to(DEVICE))


def parts(rule, n, grad, state, kind, before):
    """Views that begin ``before`` elements into larger tensors, whose outputs and surroundings are NaN."""
    larger = [torch.full((n + 2 * before,), NAN, dtype=dtype) for dtype in (grad, *[state] * 4)]
    for x, filled in zip(
        larger, (hostile(n, kind), hostile(n, "normal"), None, hostile(n, "normal"), None), strict=True
    ):
        if filled is not None:
            x[before : before + n] = filled.to(x.dtype)
    return larger


def passed(rule, larger, n, before, scale, device):
    """A pass over copies of these on a device."""
    larger = [x.to(device, copy=True) for x in larger]
    g, v, new_v, u, new_u = (x[before : before + n] for x in larger)
    keeps = rule.momentum is not None
    return larger, Pass(rule, g, v, new_v, u if keeps else None, new_u if keeps else None, scale)


def thresholds(work: Pass, k: int):
    """One that passes k elements, and one so high that it is lowered."""
    other = again(replace(work, grad=work.grad.clone()))
    REFERENCE.accumulate([other], [Cut(torch.tensor(1.0, dtype=work.new_residual.dtype), 1)])
    low = smallest(work.new_residual.dtype)
    exact = REFERENCE.kth(other.new_residual.abs(), k).clamp_(min=low)
    return exact, (exact.float() * 1.7).to(exact.dtype).clamp_(min=low)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize(("rule", "grad", "state"), DTYPES, ids=str)
def test_a_pass_leaves_the_bits_of_the_reference(kernels, rule, grad, state, before):
    for n in SIZES:
        for kind in KINDS if n < LONG else KINDS[:1]:
            larger = parts(rule, n, grad, state, kind, before)
            k = -(-n // 100)
            for threshold in thresholds(passed(rule, larger, n, before, 0.125, "cpu")[1], k):
                cut = Cut(threshold, k, 0.8, 10)
                theirs, other = passed(rule, larger, n, before, 0.125, "cpu")
                mine, work = passed(rule, larger, n, before, 0.125, DEVICE)
                assert kernels.runs(work)
                right = REFERENCE.accumulate([other], [cut])[0]
                found = kernels.accumulate([work], [on(cut)])[0]
                for a, b in zip(found, right, strict=True):
                    assert same(a.cpu().double(), b.double()), (n, kind)
                for a, b in zip(mine, theirs, strict=True):
                    assert same(a.cpu().float(), b.float()), (n, kind, "wrote otherwise, or outside its range")
                assert not work.grad.any(), "the gradient is not cleared"


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_what_is_small_has_the_bits_of_the_reference(kernels, state):
    """Samples, thresholds, selections and coding, of the kernels and of plain PyTorch, on the device."""
    for mine in (kernels, REFERENCE):
        for n in SIZES[:-1]:
            for kind in KINDS:
                x = hostile(n, kind).to(state)
                for k in {1, n // 50 + 1, n}:
                    assert torch.equal(mine.kth(x.abs().to(DEVICE), k).cpu(), REFERENCE.kth(x.abs(), k))
                    chosen = REFERENCE.largest(x, k)
                    assert torch.equal(mine.largest(x.to(DEVICE), k).cpu(), chosen)
                    cut = Cut(REFERENCE.kth(x.abs(), k).clamp_(min=smallest(state)), k, 0.8, 10)
                    for a, b in zip(mine.look(x.to(DEVICE), on(cut)), REFERENCE.look(x, cut), strict=True):
                        assert same(a.cpu().double(), b.double())
                    packed = REFERENCE.encode_indices(chosen, n)
                    assert torch.equal(mine.encode_indices(chosen.to(DEVICE), n).cpu(), packed)
                    assert torch.equal(mine.decode_indices(packed.to(DEVICE), k, n).cpu(), chosen)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_sample_is_what_the_pass_will_leave(kernels, rule):
    larger = parts(rule, 1000, torch.float32, torch.float32, "not finite", 0)
    _, work = passed(rule, larger, 1000, 0, 0.125, DEVICE)
    picked = {run: kernels.sample(work, 5, 90, run).cpu() for run in (1, 16, 32, 37)}
    kernels.accumulate([work], [Cut(torch.tensor(1.0, device=DEVICE), 1000)])
    left = work.new_residual.abs().cpu()
    for run, found in picked.items():
        where = [first + i for first in range(5, 1000 - run + 1, 90) for i in range(run)]
        assert same(found.sort().values, left[where].sort().values)


@pytest.mark.parametrize("workers", [1, 2, 5, 20])
def test_what_is_merged_is_what_is_added_on_the_cpu(kernels, workers):
    """To the bit, since an element is added in the order of the workers on every device."""
    n, k = 5000, 100
    indices = [torch.randperm(n)[:k].sort().values for _ in range(workers)]
    values = [torch.randn(k) for _ in range(workers)]
    there_, total = kernels.merge([i.to(DEVICE) for i in indices], [v.to(DEVICE) for v in values], 1 / workers)
    expected = REFERENCE.merge(indices, values, 1 / workers)
    packed = [REFERENCE.encode_indices(one, n).to(DEVICE) for one in indices]
    for found in ((there_, total), kernels.gather(packed, [v.to(DEVICE) for v in values], n, 1 / workers)):
        assert torch.equal(found[0].cpu(), expected[0])
        torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-6, atol=1e-7)  # CUDA may not fuse
    dense, plain = torch.zeros(n, device=DEVICE), torch.zeros(n)
    for at, own in zip(indices, values, strict=True):
        kernels.add(dense, at.to(DEVICE), own.to(DEVICE), 1 / workers)
        REFERENCE.add(plain, at, own, 1 / workers)
    torch.testing.assert_close(dense.cpu(), plain, rtol=1e-6, atol=1e-7)
    shape = (50, 4, 25)
    assert torch.equal(kernels.coordinates(there_, shape).cpu(), REFERENCE.coordinates(expected[0], shape))
    repeats = torch.tensor([0, 3, 3, 7], device=DEVICE)
    cleared = kernels.without_repeats(repeats, torch.ones(4, device=DEVICE)).tolist()
    assert cleared == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "memory", [ErrorFeedback(), MomentumCorrection(0.9), MomentumCorrection(0.9, state_dtype="bfloat16")]
)
@pytest.mark.parametrize("values", [None, "int4", "sign"])
def test_a_message_has_the_bytes_of_the_cpu(kernels, memory, values):
    """Over several steps: the payloads, and all that is remembered."""
    sides = []
    compressor = TopK(0.01, values, selection="sampled")
    for device, own in ((DEVICE, kernels), ("cpu", REFERENCE)):
        unit = Unit("w", torch.empty(300, 400, device=device), compressor, memory, method_compressor=compressor)
        warm_up_kernels([unit], own)
        worker = Worker(0, kernels=own)
        worker.local["w"] = unit.fresh_local()
        sides.append((device, unit, worker))
    for step in range(4):
        grad, payloads = torch.randn(300, 400) * 2.0**step, []
        for device, unit, worker in sides:
            ctx = Context(0, step, "w", 0, worker.kernels)
            mine = grad.to(device, copy=True)
            chosen, found = select([unit], [Piece(0)], [mine], worker, [ctx], 1.0)[0]
            payload = compressor.encode(chosen, found, grad.numel(), ctx)
            x, local = worker.local["w"].next["residual"], worker.local["w"]
            unit.memory.sent(compressor.own(payload, chosen, x.view(-1), {}, ctx), local.next)
            local.commit()
            payloads.append(payload)
        assert 0 < sum(t.nbytes for t in payloads[0]) < 0.1 * grad.nbytes
        exact = values is None  # elsewhere the scale is a sum, whose order is the device's
        for a, b in zip(*payloads, strict=True):
            assert torch.equal(a.cpu(), b) or not exact
        for key, value in sides[1][2].local["w"].now.items():
            other = sides[0][2].local["w"].now[key].cpu()
            assert torch.equal(other, value) if exact else (other - value).norm() < 0.05 * (1 + value.norm()), key
            assert value.any()


@pytest.mark.cuda
def test_more_than_two_billion_elements(kernels):
    """Places and blocks are counted in 64 bits where they must be."""
    n = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("it needs 45 GB of free memory on the GPU")
    where = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 500, n - 1], device=DEVICE)
    grad = torch.zeros(n, device=DEVICE)
    grad[where] = torch.arange(1.0, 8.0, device=DEVICE)
    work = Pass(RULES[0], grad, torch.zeros(n, device=DEVICE), torch.full((n,), INF, device=DEVICE), None, None)
    found, values = kernels.accumulate([work], [Cut(torch.tensor(0.5, device=DEVICE), 7)])[0]
    assert torch.equal(found, where)
    assert torch.equal(values, torch.arange(1.0, 8.0, device=DEVICE))
    assert float(work.new_residual.max()) == 7.0
    assert math.isclose(float(work.new_residual.sum(dtype=torch.float64)), 28.0)
