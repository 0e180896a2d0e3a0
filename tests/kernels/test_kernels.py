"""Every kernel leaves the same bits as plain PyTorch, which does the same as the memory and the compressor alone."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import thinwire
from thinwire import ThinwireError
from thinwire.coding import elias_fano
from thinwire.compressors import TopK
from thinwire.core import Context
from thinwire.core.loops import Accumulation, Cut, Pass, smallest
from thinwire.core.memory_capabilities import traits_of
from thinwire.core.tensors import flat
from thinwire.exchange.fused import select
from thinwire.exchange.units import Piece, Unit
from thinwire.exchange.workers import Worker
from thinwire.kernels.reference import BLOCK, CHUNK, REFERENCE, above, at_least
from thinwire.kernels.select import choose
from thinwire.memories import ErrorFeedback, MomentumCorrection
from thinwire.session.momentum_transfer import warn_once

RULES = [Accumulation(None), Accumulation(0.9), Accumulation(0.9, nesterov=True)]
SIZES = [0, 1, 2, 63, 64, 65, BLOCK, 1000, CHUNK + 77]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["reference", "cpu", "cuda"])
def kernels(request):
    if request.param == "cpu":
        pytest.importorskip("numba", reason="the CPU kernels are in thinwire[cpu]")
    if request.param == "cuda":
        pytest.importorskip("triton", reason="the CUDA kernels need triton, which interprets them here")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET=1 is not set, and CUDA is here: tests/gpu has them")
    chosen, note = choose(request.param, torch.device("cpu"))
    assert note is None
    yield chosen
    chosen.close()


def hostile(n, kind):
    x = torch.randn(n)
    if kind == "equal":
        x = torch.sign(x)
    elif kind == "zero":
        x = torch.zeros(n)
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "not finite":
        x[::17], x[3::29] = NAN, -INF
    return x


def a_pass(rule, n, grad=torch.float32, state=torch.float32, scale=1.0, kind="normal"):
    """A pass whose outputs are poisoned."""
    g, v, u = hostile(n, kind).to(grad), hostile(n, "normal").to(state), hostile(n, "normal").to(state)
    poison = torch.full((n,), NAN, dtype=state)
    keeps = rule.momentum is not None
    return Pass(rule, g, v, poison.clone(), u if keeps else None, poison.clone() if keeps else None, scale)


def again(work):
    fresh = [None if t is None else t.clone() for t in (work.grad, work.new_residual, work.new_momentum)]
    return Pass(work.rule, fresh[0], work.old_residual, fresh[1], work.old_momentum, fresh[2], work.scale)


def level(threshold, state=torch.float32):
    return torch.tensor(threshold, dtype=state)


def every(n, threshold, state=torch.float32):
    """All that a threshold lets pass, as far as a message of n elements can say so."""
    return Cut(level(threshold, state), n)


def same(a, b):
    return torch.equal(a.nan_to_num(NAN, 1e9, -1e9).isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(rule, F32, F32) for rule in RULES] + [(RULES[1], g, s) for g in (F32, BF16, F16) for s in (F32, BF16)][1:]


@pytest.mark.parametrize(("rule", "grad", "state"), DTYPES)
def test_a_pass_leaves_what_float64_says_and_the_same_bits(kernels, rule, state, grad):
    for n in SIZES:
        work = a_pass(rule, n, grad, state, scale=2.0**-3)
        other = again(work)
        assert kernels.runs(work)
        g, v = work.grad.double() * 2.0**-3, work.old_residual.double()
        u = 0.0 if work.old_momentum is None else work.old_momentum.double()
        m = rule.momentum or 0.0
        expected = v + (g + m * (u + g) if rule.nesterov else m * u + g)
        picked = kernels.sample(work, 1, 3, 2) if n > 2 else torch.empty(0)
        cut = every(n, 0.7, state)
        found, values = kernels.accumulate([work], [cut])[0]
        assert not work.grad.any(), "the gradient is not cleared"
        torch.testing.assert_close(
            work.new_residual.double(), expected, rtol=1e-2 if state == torch.bfloat16 else 1e-6, atol=1e-6
        )
        where = [first + i for first in range(1, n - 1, 3) for i in (0, 1)]
        assert torch.equal(picked.float().sort().values, work.new_residual[where].abs().float().sort().values)
        passed = (~(work.new_residual.abs() < cut.threshold)).nonzero().flatten()
        m = passed.numel()
        assert torch.equal(found, torch.cat([passed, (passed if m else torch.zeros(1)).long()[-1:].expand(n - m)]))
        assert torch.equal(values, torch.cat([work.new_residual[passed], torch.zeros(n - m, dtype=state)]))
        assert torch.equal(found, REFERENCE.accumulate([other], [cut])[0][0])
        assert torch.equal(work.new_residual, other.new_residual)
        for a, b in zip(kernels.look(work.new_residual, cut), (found, values), strict=True):
            assert torch.equal(a, b)
        if work.new_momentum is not None:
            assert torch.equal(work.new_momentum, other.new_momentum)


@pytest.mark.parametrize(("rule", "grad", "state"), DTYPES)
def test_a_sample_is_what_the_pass_will_leave(kernels, rule, state, grad):
    """Runs of whole vectors, of less, and of both."""
    for kind in ("normal", "denormal", "not finite"):
        work = a_pass(rule, 1000, grad, state, scale=2.0**-3, kind=kind)
        picked = {run: kernels.sample(work, 5, 90, run).float() for run in (1, 16, 32, 37)}
        kernels.accumulate([work], [every(1000, 1.0, state)])
        left = work.new_residual.abs().float()
        for run, found in picked.items():
            where = [first + i for first in range(5, 1000 - run + 1, 90) for i in range(run)]
            assert same(found.sort().values, left[where].sort().values)


@pytest.mark.parametrize("kind", ["equal", "zero", "denormal", "not finite"])
@pytest.mark.parametrize("threshold", [1e-45, 1e-41, 1.0, INF])
def test_hostile_values_and_thresholds(kernels, kind, threshold):
    works = [a_pass(rule, n, kind=kind) for rule in RULES for n in SIZES[:-1]]  # more than a chunk: above
    others = [again(work) for work in works]
    cuts = [Cut(level(threshold), -(-work.grad.numel() // 10), 0.8, 3) for work in works]
    found = kernels.accumulate(works, cuts)
    for work, other, cut, mine, theirs in zip(
        works, others, cuts, found, REFERENCE.accumulate(others, cuts), strict=True
    ):
        again_found = kernels.look(work.new_residual, cut)
        for indices, values in (theirs, again_found):
            assert torch.equal(mine[0], indices)
            assert same(mine[1], values)
        assert same(work.new_residual, other.new_residual)
        assert mine[0].numel() == cut.k
        sent, there = (int(t.isfinite().logical_not().sum()) for t in (mine[1], work.new_residual))
        assert sent == min(there, cut.k), "what is not finite comes first, so that it is seen"


@pytest.mark.parametrize(
    ("held", "value", "lower"),
    [(torch.bfloat16, 0.9922, 0.999), (torch.float32, 1.4e-45, 0.8), (torch.float32, 4e-45, 0.8)],
)
def test_a_threshold_goes_on_down_where_a_level_is_rounded_to_the_one_before(kernels, held, value, lower):
    x = torch.full((640,), value, dtype=held)
    x[::100] *= 2
    cut = Cut(x[0].clone() if held == torch.float32 else torch.tensor(1.0, dtype=held), 64, lower, 10)
    indices, values = kernels.look(x, cut)
    assert values.all()
    for mine, theirs in zip((indices, values), REFERENCE.look(x, cut), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_any_size_any_number_and_any_ties(kernels, state):
    """What a kernel looks through by blocks, by chunks or at once."""
    for n in (1, 63, 64, 65, 200, 1000, 4096, 4099):
        for kind in ("normal", "equal", "zero", "denormal", "not finite"):
            x = (hostile(n, kind) * 2.0 ** torch.randint(-2, 3, (n,))).to(state)
            for k in {1, 2, n // 50 + 1, n // 3 + 1, n}:
                for place in (1, k, 2 * k):
                    threshold = REFERENCE.kth(x.abs(), min(place, n)).clamp_(min=smallest(state))
                    cut = Cut(threshold, k, 0.8, 10)
                    for mine, theirs in zip(kernels.look(x, cut), REFERENCE.look(x, cut), strict=True):
                        assert mine.numel() == k
                        assert same(mine.double(), theirs.double())


@pytest.mark.parametrize(
    ("threshold", "share", "swollen", "looks"), [(4.0, 100, 1, 0), (6.0, 1000, 10, 1), (0.01, 10**4, 1, 1)]
)
def test_many_threads_and_unaligned_parts(kernels, monkeypatch, threshold, share, swollen, looks):
    """Also where a threshold lets far more pass than was asked for, in one thread's part or in all."""
    n = 2**20 + 33
    whole, cut = a_pass(RULES[1], n + 3), Cut(level(threshold), n // share)
    whole.grad[: n // 3].mul_(swollen)
    again_looked: list[Cut] = []
    if above := getattr(kernels, "above", None):
        monkeypatch.setattr(kernels, "above", lambda *args: (again_looked.append(cut), above(*args))[1])
    parts = [whole.grad[3:], whole.old_residual[1:-2], whole.new_residual[1:-2], whole.old_momentum[2:-1]]
    work = Pass(RULES[1], *parts, whole.new_momentum[2:-1])
    other = again(work)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found, values = kernels.accumulate([work], [cut])[0]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, REFERENCE.accumulate([other], [cut])[0][0])
    assert torch.equal(values, work.new_residual[found])
    assert len(again_looked) == (looks if above else 0)
    assert torch.equal(work.new_residual, other.new_residual)
    assert torch.equal(work.new_momentum, other.new_momentum)
    assert whole.grad[:3].abs().min() > 0, "wrote outside its range"
    assert whole.new_residual[0].isnan()
    assert whole.new_residual[-2:].isnan().all()


@pytest.mark.parametrize("n", [1, 2, 63, 64, 10_000, 2**40])
def test_indices_are_the_same_bytes(kernels, n):
    for k in {0, 1, min(n, 7), min(n, 5000)}:
        indices = torch.randint(0, n, (k,)).sort().values
        packed = kernels.encode_indices(indices, n)
        assert torch.equal(packed, elias_fano.encode(indices, n))
        assert torch.equal(kernels.decode_indices(packed, k, n), indices)


@pytest.mark.parametrize("kind", ["normal", "equal", "zero", "denormal", "not finite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kth_is_what_sorting_says(kernels, kind, dtype):
    for n in (1, 2, 63, 1000):
        magnitude = hostile(n, kind).abs().to(dtype)
        ordered = magnitude.nan_to_num(INF, INF).sort(descending=True).values
        for k in {1, 2, n // 3, n} & set(range(1, n + 1)):
            assert torch.equal(kernels.kth(magnitude, k), ordered[k - 1])
    torch.set_default_dtype(torch.float64)
    try:
        assert kernels.kth(magnitude, 3).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["normal", "equal", "zero", "denormal", "not finite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_are_what_a_stable_sort_says(kernels, kind, dtype):
    for n in (0, 1, 2, 63, 1000):
        x = hostile(n, kind).to(dtype)
        order = x.abs().nan_to_num(INF, INF).sort(descending=True, stable=True).indices
        for k in (0, 1, n // 3, n, n + 1):
            assert torch.equal(kernels.largest(x, k), order[:k].sort().values)


@pytest.mark.parametrize("workers", [1, 2, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_merged_is_what_is_added(kernels, workers, dtype):
    """To the bit: every element is added in the order of the workers. Indices need not ascend, and may repeat."""
    for ascends in (True, False):
        indices = [torch.randint(0, 500, (100,)) for _ in range(workers)]
        indices = [one.sort().values for one in indices] if ascends else indices
        values = [torch.randn(100).to(dtype) for _ in range(workers)]
        expected = torch.zeros(500, dtype=dtype)
        for at, own in zip(indices, values, strict=True):
            kernels.add(expected, at, own, 1 / workers)
        there, total = kernels.merge(indices, values, 1 / workers)
        assert torch.equal(there, torch.cat(indices).unique())
        assert torch.equal(total, expected[there])


@pytest.mark.parametrize("workers", [1, 2, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_gathered_is_what_is_decoded_one_by_one_and_added(kernels, workers, dtype):
    for n, k in ((500, 100), (1, 1), (64, 64), (2**31, 7)):
        indices = [torch.randint(0, n, (k,)).sort().values for _ in range(workers)]
        values = [torch.randn(k).to(dtype) for _ in range(workers)]
        packed = [REFERENCE.encode_indices(one, n) for one in indices]
        read = [REFERENCE.without_repeats(*one) for one in zip(indices, values, strict=True)]
        there, total = kernels.gather(packed, values, n, 1 / workers)
        expected = REFERENCE.merge(indices, read, 1 / workers)
        assert torch.equal(there, expected[0])
        assert torch.equal(total, expected[1])


def test_damaged_bytes_are_read_alike(kernels):
    """Low bits may descend within an upper part, and upper parts be missing or reach too far; none is below 0."""
    n, k = 1000, 50
    size, low = sum(elias_fano.sizes(k, n)), elias_fano.sizes(k, n)[0]
    for missing in (False, True):
        packed = [torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in range(3)]
        if missing:
            packed[1][low:] &= 1
        values = [torch.randn(k) for _ in range(3)]
        indices = [kernels.decode_indices(one, k, n) for one in packed]
        assert all(map(torch.equal, indices, (REFERENCE.decode_indices(one, k, n) for one in packed)))
        expected = REFERENCE.merge(indices, list(map(REFERENCE.without_repeats, indices, values)), 1.0)
        found = kernels.gather(packed, values, n, 1.0)
        assert all(map(torch.equal, found, expected))
        assert found[0][0] >= 0
        assert any((own.diff() < 0).any() for own in indices)


@pytest.mark.parametrize("shape", [(600,), (20, 30), (5, 1, 12, 10)])
def test_coordinates_are_those_of_torch(kernels, shape):
    indices = torch.randperm(600)[:100].sort().values
    assert torch.equal(kernels.coordinates(indices, shape), torch.stack(torch.unravel_index(indices, shape)))
    assert kernels.coordinates(indices[:0], shape).shape == (len(shape), 0)
    assert kernels.coordinates(indices[:0], (*shape, 0)).shape == (len(shape) + 1, 0)


def test_a_gradient_may_be_left(kernels):
    works = [a_pass(rule, 1000) for rule in RULES]
    others = [replace(again(work), clear=False) for work in works]
    kernels.accumulate(works, [every(1000, 1.0)] * 3)
    kernels.accumulate(others, [every(1000, 1.0)] * 3)
    for work, other in zip(works, others, strict=True):
        assert torch.equal(work.new_residual, other.new_residual)
        assert other.grad.any()
        assert not work.grad.any()


def test_repeats_are_zero(kernels):
    indices, values = torch.tensor([0, 3, 3, 7, 7, 7]), torch.randn(6)
    for dtype in (torch.float32, torch.float16):
        cleared = kernels.without_repeats(indices, values.to(dtype))
        assert torch.equal(cleared != 0, torch.tensor([True, True, False, True, False, False]))
        assert torch.equal(kernels.without_repeats(indices[:1], values[:1]), values[:1])


@pytest.mark.parametrize("alpha", [1.0, -1.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adding_is_index_add(kernels, alpha, dtype):
    out, values = torch.randn(1000).to(dtype), torch.randn(300).to(dtype)
    indices = torch.randint(0, 1000, (300,)).sort().values
    expected = out.clone().index_add_(0, indices, values, alpha=alpha)
    kernels.add(out, indices, values, alpha)
    assert torch.equal(out, expected)
    with pytest.raises(IndexError):
        kernels.add(out, torch.tensor([1000]), values[:1], alpha)


MEMORIES = [ErrorFeedback(), MomentumCorrection(0.9), MomentumCorrection(0.9, nesterov=True)]


@pytest.mark.parametrize("memory", [*MEMORIES, MomentumCorrection(0.9, state_dtype="bfloat16")])
@pytest.mark.parametrize("shape", [(100, 300), (60, 50, 3, 3)])
@pytest.mark.parametrize("values", [None, "int4", "sign"])
def test_select_is_compensate_and_compress(kernels, memory, shape, values):
    """Over several steps: one pass does what the memory, the sample and the selection do one after the other.

    The last sample sees nothing but what is large, so that its threshold must be lowered.
    """
    param = torch.empty(shape)
    if len(shape) == 4:
        param = param.to(memory_format=torch.channels_last)
    compressor = TopK(0.01, values, selection="sampled")
    unit = Unit("w", param, compressor, memory, method_compressor=compressor)
    worker = Worker(0, kernels=kernels)
    worker.local["w"] = unit.fresh_local()
    plain = unit.fresh_local()
    for step in range(4):
        grad = torch.empty_like(param).normal_()
        ctx = Context(0, step, "w", 0, kernels)
        if step == 3:
            plan = compressor.sampling(shape, ctx)
            flat(grad)[plan.start :: plan.stride][:110] = 50.0
        x = memory.compensate(grad.clone(), param, plain.now, plain.next)
        expected = compressor.compress(x, {}, ctx)
        assert 0 < sum(t.nbytes for t in expected) < 0.1 * grad.nbytes
        chosen, there = select([unit], [Piece(0)], [grad], worker, [ctx], 1.0)[0]
        assert chosen.numel() == compressor.k(grad.numel())
        assert torch.equal(there, kernels.without_repeats(chosen, flat(worker.local["w"].next["residual"])[chosen]))
        payload = compressor.encode(chosen, there, grad.numel(), ctx)
        by_hand = compressor.compress(x, {}, replace(ctx, kernels=REFERENCE))
        assert all(torch.equal(a, b) for a, b in zip(by_hand, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(payload, expected, strict=True))
        for local in (plain, worker.local["w"]):
            memory.sent(compressor.decompress(payload, x, {}, ctx), local.next)
            local.commit()
        for key, value in plain.now.items():
            assert torch.equal(value, worker.local["w"].now[key]), key
        assert plain.now["residual"].any()


def test_a_threshold_has_the_dtype_of_the_residual(kernels, monkeypatch):
    unit = Unit(
        "w", torch.empty(400, 500), TopK(0.01), ErrorFeedback(state_dtype="bfloat16"), method_compressor=TopK(0.01)
    )
    worker = Worker(0, kernels=kernels)
    worker.local["w"] = unit.fresh_local()
    kth = kernels.kth
    monkeypatch.setattr(kernels, "kth", lambda *args: kth(*args).float())
    with pytest.raises(ThinwireError, match=r"threshold is torch\.float32, and the residual torch\.bfloat16"):
        select([unit], [Piece(0)], [torch.randn(400, 500)], worker, [Context(0, 0, "w", 0)], 1.0)


def test_what_a_kernel_cannot_do_is_left_to_the_memory(kernels):
    param = torch.empty(400, 500)
    for memory in (MomentumCorrection(0.9, weight_decay=0.1, decay="local"), ErrorFeedback()):
        unit = Unit("w", param, TopK(0.01), memory, method_compressor=TopK(0.01))
        worker = Worker(0, kernels=kernels)
        worker.local["w"] = unit.fresh_local()
        if traits_of(memory).accumulation is not None:
            worker.local["w"].now["pending_residual"] = torch.ones(400, 500)
        assert not select([unit], [Piece(0)], [torch.randn(400, 500)], worker, [Context(0, 0, "w", 0)], 1.0)


def test_kernels_that_are_not_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ThinwireError, match=r"kernels='cuda' can't run: the parameters are on cpu"):
        choose("cuda", torch.device("cpu"))
    with pytest.raises(ThinwireError, match="kernels is 'fast'"):
        choose("fast", torch.device("cpu"))
    kernels, note = choose("auto", torch.device("meta"))
    assert kernels is REFERENCE
    assert "none for meta tensors" in note


def test_without_numba_the_ledger_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kernels, note = choose("auto", torch.device("cpu"))
    assert kernels is REFERENCE
    assert "pip install 'thinwire[cpu]'" in note
    with pytest.raises(ThinwireError, match="need numba"):
        choose("cpu", torch.device("cpu"))


def test_plain_kernels_are_said_once(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    warn_once.cache_clear()
    caplog.set_level("WARNING", logger="thinwire")
    for _ in range(2):
        model = torch.nn.Linear(4, 4)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        thinwire.simulate(
            model, thinwire.dense(), optimizer=sgd, batches=lambda w, s: torch.ones(1, 4), loss=lambda m, x: m(x).sum(),
            workers=1, steps=1, kernels="auto",
        )  # fmt: skip
    assert sum("plain PyTorch, which is slower" in text for text in caplog.messages) == 1


def test_kernels_that_are_warmed_up_are_all_that_run():
    """A fresh process: nothing that is compiled is first compiled in a step."""
    code = """
import torch
from numba.core.dispatcher import Dispatcher
import thinwire
from thinwire.kernels import cpu_bits as bits
model = torch.nn.Linear(512, 512)
compiled = lambda: {name: len(f.signatures) for name, f in vars(bits).items()
                    if isinstance(f, Dispatcher) and name[0] != "_"}
counts = []
def loss(model, x):
    counts.append(compiled())
    return model(x).square().mean()
sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
method = thinwire.dgc(0.001, warmup=thinwire.Warmup(4))
batches = lambda w, s: torch.randn(4, 512)
thinwire.simulate(model, method, optimizer=sgd, batches=batches, loss=loss, workers=2, steps=6, kernels="cpu")
assert counts[0] and all(counts[0].values()), counts[0]
assert counts[0] == compiled(), (counts[0], compiled())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_below_a_threshold(dtype, threads):
    torch.set_num_threads(threads)  # on several, another library compares
    for n in (1, 40_001, 2**19 + 77):
        x = hostile(n, "not finite").to(dtype)
        threshold = torch.tensor(1.5, dtype=dtype)
        expected = x.abs().lt(threshold).logical_not().nonzero().view(-1)
        assert torch.equal(at_least(x.abs(), threshold), expected)
        assert torch.equal(above(x, threshold)[0], expected)
