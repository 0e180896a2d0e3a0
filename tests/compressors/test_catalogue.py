"""One battery over the whole catalogue: a new compressor is one row of CASES."""

from dataclasses import dataclass, replace

import pytest
import torch

from thinwire.compressors.block_topk import BlockTopK, DctTopK
from thinwire.compressors.cast import Cast
from thinwire.compressors.powersgd import PowerSGD
from thinwire.compressors.quantize import QSGD, Quantize
from thinwire.compressors.randk import RandK
from thinwire.compressors.rounding import Natural, TernGrad
from thinwire.compressors.scaled import Scaled
from thinwire.compressors.sign import Sign
from thinwire.compressors.sparse import CLTK, TopK
from thinwire.compressors.threshold import SIDCo, Threshold
from thinwire.core import Compressor, Context, Traits, registry
from thinwire.core.capabilities import WarmStarted, compress_sparse
from thinwire.core.errors import ThinwireError
from thinwire.core.tensors import Sparse, flat
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.exchange.units import payload_nbytes
from thinwire.memories.compressed_momentum import CompressedMomentum, SteadyFeedback
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory
from thinwire.memories.momentum import Momentum, MomentumCorrection
from thinwire.memories.shifted import EF21, EControl
from thinwire.memories.sign_descent import DecoupledMomentum, MajorityVote
from thinwire.methods.method import Method, Rule

CASES = [
    Cast(),
    Cast("float16"),
    Cast("bfloat16"),
    TopK(0.01),
    TopK(0.1, values="float16"),
    TopK(0.03, selection="sampled"),
    TopK(0.03, values="int4", selection="sampled"),
    TopK(0.1, values="sign"),
    TopK(0.1, values="int2"),
    TopK(0.1, values="int4"),
    TopK(1.0, values="int8"),
    TopK(1.0),
    TopK(0.1) >> Cast("float16"),
    TopK(0.03, selection="sampled") >> Quantize(4),
    CLTK(0.05),
    CLTK(0.1) >> Cast("float16"),
    RandK(0.05),
    RandK(0.3, scaled=False),
    RandK(0.4, shared=False),
    RandK(0.2) >> Natural(),
    Threshold(2.0, 0.03),
    Threshold(1e-3, 0.02, values="sign"),
    SIDCo(0.01),
    SIDCo(0.03, stages=2, fit="gamma", values="int4"),
    SIDCo(0.1, fit="pareto"),
    BlockTopK(0.0005),
    BlockTopK(0.05, block=64),
    DctTopK(),
    DctTopK(0.05, chunk=30) >> Cast("bfloat16"),
    QSGD(2),
    QSGD(4),
    QSGD(7, block=100, norm="max"),
    Quantize(1, rounding="stochastic"),
    Quantize(3, block=50),
    Quantize(4, block=128, rounding="stochastic"),
    Quantize(8),
    TernGrad(),
    TernGrad(clip_rms=None),
    Natural(),
    Sign(),
    Sign(block=100, scale="l2"),
    Sign(scale="none"),
    Scaled(QSGD(3)),
    Scaled(RandK(0.1)),
    Sign(64),
    PowerSGD(1),
    PowerSGD(4),
    PowerSGD(2) >> Cast("float16"),
]
LOSSLESS = {Cast(), TopK(1.0)}
CTX = Context(seed=3, step=5, unit="layer.weight", rank=1)


def shapes(compressor):
    big = 120_000 if "sampled" in str(compressor) else 40_000
    return [(0,), (1,), (2, 1), (3, 7), (63,), (16, 5, 3, 3), (big // 100, 100)]


def restored(compressor, x, ctx=CTX):
    state = compressor.init(x, replace(CTX, step=0, rank=0))
    payload = compressor.compress(x, state, ctx)
    out = torch.full_like(x, torch.nan)
    compressor.decompress(payload, x, state, ctx).write_to(out)
    return payload, out


def deterministic(compressor):
    x = torch.randn(500)
    one, other = (compressor.compress(x, {}, replace(CTX, step=step)) for step in (1, 2))
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def losses(compressor, x, repeats):
    """``||x - C(x)||^2 / ||x||^2`` of some encodings that differ by their randomness alone, and their mean."""
    lost, total = [], torch.zeros_like(x, dtype=torch.float64)
    for step in range(repeats):
        ctx = replace(CTX, step=step)
        compressor.decompress(compressor.compress(x, {}, ctx), x, {}, ctx).write_to(out := torch.empty_like(x))
        total += out
        lost.append((out - x).double().square().sum() / x.double().square().sum())
    return torch.stack(lost), total / repeats


def bound(lost):
    """Five standard errors of their mean, and what float32 rounds."""
    return 5 * lost.std(correction=0) / len(lost) ** 0.5 + 1e-5


DISTRIBUTIONS = {
    "normal": lambda n: torch.randn(n),
    "laplace": lambda n: torch.empty(n).exponential_() * torch.randn(n).sign(),
    "student-3": lambda n: torch.distributions.StudentT(3.0).sample((n,)),
    "one-hot": lambda n: torch.nn.functional.one_hot(torch.tensor(n // 3), n).float(),
    "constant": lambda n: torch.full((n,), 0.7),
}


@pytest.mark.parametrize("compressor", CASES, ids=str)
def test_contracts_as_declared(compressor):
    for make in DISTRIBUTIONS.values():
        for n, repeats in ((1, 3), (40, 1 if deterministic(compressor) else 60), (700, 1)):
            alpha = compressor.traits.contraction(n)
            if alpha and (repeats > 1 or deterministic(compressor)):
                lost, _ = losses(compressor, make(n), repeats)
                assert lost.mean() <= 1.0 - alpha + bound(lost), make


@pytest.mark.parametrize("compressor", [case for case in CASES if case.traits.variance(40) is not None], ids=str)
def test_unbiased_as_declared(compressor):
    repeats, n = 400, 40
    x = DISTRIBUTIONS["student-3"](n)
    omega = compressor.traits.variance(n)
    lost, mean = losses(compressor, x, repeats)
    assert (mean - x).norm() <= (5 * (omega / repeats) ** 0.5 + 1e-6) * x.norm()
    assert lost.mean() <= omega + bound(lost)


@pytest.mark.parametrize("compressor", CASES, ids=str)
def test_what_is_not_finite_is_seen(compressor):
    for nonfinite in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(60, 70)
        x[torch.randint(60, ()), torch.randint(70, ())] = nonfinite
        assert not restored(compressor, x)[0][0].sum().isfinite()


@pytest.mark.parametrize("compressor", [case for case in CASES if case.traits.splittable], ids=str)
def test_a_sum_is_compressed_once_more(compressor):
    for shape in ((1,), (50, 8), (8, 4, 3, 3)):
        like = torch.empty(shape, device="meta")
        n = like.numel()
        indices = torch.arange(0, n, 3)
        for values in (torch.randn(len(indices)), torch.zeros(len(indices))):
            payload = compress_sparse(compressor, Sparse(indices, values, 0.3), like, {}, CTX)
            expected = compressor.compress(like, {}, CTX)
            assert [(t.shape, t.dtype) for t in payload] == [(t.shape, t.dtype) for t in expected]
            compressor.decompress(payload, like, {}, CTX).write_to(out := torch.empty(shape))
            assert out.isfinite().all()
            assert values.any() or not out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compressor", CASES, ids=str)
class TestBattery:
    def test_static_payload(self, compressor, dtype):
        for shape in shapes(compressor):
            x = torch.randn(shape).to(dtype)
            before = x.clone()
            payload, out = restored(compressor, x)
            assert torch.equal(x, before), "compress must only read"
            like = compressor.compress(x.to("meta"), {}, CTX)
            assert [(t.shape, t.dtype) for t in payload] == [(t.shape, t.dtype) for t in like]
            steps = [restored(compressor, x, replace(CTX, step=step))[0] for step in range(compressor.traits.period)]
            total = sum(t.nbytes for payload in steps for t in payload)
            assert -(-total // len(steps)) == payload_nbytes(compressor, x.to("meta"))
            assert all(t.is_contiguous() for t in payload)
            assert out.isfinite().all()
            lost = (x.double() - out.double()).square().sum()
            if deterministic(compressor) and compressor.traits.contraction(max(x.numel(), 1)):
                assert lost <= x.double().square().sum()
            exact = compressor in LOSSLESS or (type(compressor) is Cast and dtype.itemsize == 2)  # bf16 fits in fp16
            if x.numel() > 100 and not exact:
                assert lost > 0, "a test that never compresses proves nothing"
                assert sum(t.nbytes for t in payload) < 4 * x.numel()

    def test_zero_and_channels_last(self, compressor, dtype):
        _, out = restored(compressor, torch.zeros(50, 20, dtype=dtype))
        assert torch.equal(out, torch.zeros_like(out))
        x = torch.randn(8, 4, 3, 3).to(dtype).to(memory_format=torch.channels_last)
        _, out = restored(compressor, x)
        assert out.stride() == x.stride()
        in_order = flat(x).clone().view((8, -1) if compressor.traits.min_ndim == 2 else (-1,))
        contiguous = restored(compressor, in_order)[1]
        assert torch.equal(flat(out), flat(contiguous)), "in the order of memory, whatever the layout"

    def test_decompressed_adds_and_clears(self, compressor, dtype):
        x = torch.randn(60, 50).to(dtype)
        state = compressor.init(x, CTX)
        got = compressor.decompress(compressor.compress(x, state, CTX), x, state, CTX)
        out = torch.empty(60, 50, dtype=torch.float64)
        got.write_to(out)
        base = torch.randn(60, 50, dtype=torch.float64)
        total = base.clone()
        got.add_to(total, alpha=-2.0)
        torch.testing.assert_close(total, base - 2.0 * out)
        got.clear(total)
        assert torch.equal(total == 0, (out != 0) | (total == 0))

    def test_deterministic(self, compressor, dtype):
        x = torch.randn(200, 100).to(dtype)
        again = [restored(compressor, x.clone())[0] for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))

    def test_summable_is_linear(self, compressor, dtype):
        if not compressor.traits.summable:
            return
        x, y = torch.randn(2, 30, 10).to(dtype)
        summed = tuple(a + b for a, b in zip(restored(compressor, x)[0], restored(compressor, y)[0], strict=True))
        out = torch.empty_like(x)
        state = compressor.init(x, replace(CTX, step=0, rank=0))
        compressor.decompress(summed, x, state, CTX).write_to(out)
        torch.testing.assert_close(out, restored(compressor, x)[1] + restored(compressor, y)[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "part",
    [
        *CASES,
        NoMemory(),
        ErrorFeedback(),
        MomentumCorrection(0.9, True, 0.1),
        Momentum(),
        MajorityVote(0.5),
        DecoupledMomentum(0.9, sign=False),
        ErrorFeedback(decay=0.9),
        ErrorFeedback(beta=0.1),
        EControl(0.1),
        EF21(0.1, 0.5),
        EF21(downlink=TopK(0.1) >> Cast("float16")),
        CompressedMomentum(0.95),
        SteadyFeedback(),
    ],
    ids=str,
)
def test_json_round_trip(part):
    rows = registry.COMPRESSORS | registry.MEMORIES
    assert registry.from_json(registry.to_json(part), rows) == part


def test_every_row_is_in_the_battery():
    ours = {row for row in registry.COMPRESSORS.values() if row.__module__.startswith("thinwire.")}
    assert {type(case) for case in CASES} >= ours


def test_unknown_rows():
    with pytest.raises(ThinwireError, match="kind 'nonsense' is not registered"):
        registry.from_json({"kind": "nonsense"}, registry.COMPRESSORS)
    with pytest.raises(ThinwireError, match="unexpected keyword"):
        registry.from_json({"kind": "topk", "density": 0.1, "colour": 1}, registry.COMPRESSORS)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_density_outside_its_range(density):
    with pytest.raises(ThinwireError, match=r"density is .*\(0, 1\]"):
        TopK(density)


@pytest.mark.parametrize(
    "options", [{"values": "int3"}, {"selection": "guess"}, {"sample_ratio": 0.0}, {"lower": 1.0}, {"attempts": -1}]
)
def test_other_bad_options(options):
    with pytest.raises(ThinwireError, match=str(next(iter(options.values())))):
        TopK(0.1, **options)


def test_a_cast_saturates_instead_of_sending_infinity():
    x = torch.tensor([1e6, 1.0, -1e6])
    _, out = restored(TopK(0.5, values="float16"), x)
    assert out.isfinite().all()
    assert out[0] == torch.finfo(torch.float16).max


def nasty(k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    tiny, huge = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.finfo(dtype).max
    return [
        torch.full((k,), -3.0, dtype=dtype),
        torch.randint(-3, 4, (k,)).to(dtype) * tiny,  # denormal
        torch.randn(k).sign().to(dtype) * huge,
        torch.rand(k).to(dtype) * huge,
        torch.nn.functional.one_hot(torch.tensor(k - 1), k).to(dtype),
        torch.randn(k).pow(9).to(dtype),
    ]


@pytest.mark.parametrize("values", ["sign", "int2", "int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_codes_contract_what_is_nasty(values, dtype):
    """Nearer than nothing at all; and an element that is 0 stays 0."""
    for n in (1, 2, 7, 64, 1000):
        for x in nasty(n, dtype):
            for density in (0.1, 1.0):
                payload, out = restored(TopK(density, values=values), x)
                assert payload[0].isfinite().all()
                assert out[x == 0].count_nonzero() == 0
                lost, total = (x.double() - out.double()).abs(), x.double().abs()
                lost, total = (t.div(total.max().clamp(min=1e-300)).square().sum() for t in (lost, total))
                assert lost <= total * (1 + 1e-12)


@pytest.mark.parametrize("values", [None, "float16", "sign", "int2", "int4", "int8"])
@pytest.mark.parametrize("nonfinite", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_the_first_tensor(values, nonfinite):
    x = torch.randn(500, dtype=torch.float64)
    x[torch.randint(500, ())] = nonfinite
    payload, _ = restored(TopK(0.02, values=values), x)
    assert not payload[0].sum().isfinite()


@pytest.mark.parametrize("values", ["sign", "int4"])
def test_fewer_than_k_are_filled_up_with_nothing(values):
    compressor = TopK(0.5, values=values)
    for chosen in ([], [0], [3, 9], [19]):
        at = torch.tensor(chosen, dtype=torch.int64)
        payload = compressor.encode(at, 1.0 + torch.rand(len(chosen)), 20, CTX)
        like = compressor.compress(torch.empty(20, device="meta"), {}, CTX)
        assert [(t.shape, t.dtype) for t in payload] == [(t.shape, t.dtype) for t in like]
        compressor.decompress(payload, torch.empty(20), {}, CTX).write_to(out := torch.empty(20))
        assert out.nonzero().view(-1).tolist() == chosen


def test_a_chain_codes_the_values():
    chain, x = TopK(0.1) >> Cast("float16"), torch.randn(50, 20)
    plain, coded = TopK(0.1).compress(x, {}, CTX), chain.compress(x, {}, CTX)
    assert sum(t.nbytes for t in plain) - sum(t.nbytes for t in coded) == 2 * 100
    out = restored(chain, x)[1]
    assert torch.equal(out, restored(TopK(0.1), x)[1].half().float())
    assert chain.scaled_density(2.0) == TopK(0.2) >> Cast("float16")
    with pytest.raises(ThinwireError, match="codes a vector"):
        Cast() >> Halves()


def test_a_biased_compressor_needs_a_memory():
    with pytest.raises(ThinwireError, match="TopK is biased, and NoMemory forgets"):
        Rule(TopK(0.1), NoMemory())


@dataclass(frozen=True)
class Halves(Compressor, WarmStarted):
    """Sends the first half at even steps and the second at odd ones, and remembers the last mean that it was told."""

    traits = Traits(summable=True, period=2, warm_started=True)

    def init(self, like, ctx):
        return {"last": like.new_zeros(7)}

    def compress(self, x, state, ctx):
        n = x.numel()
        return (flat(x)[n // 2 :].clone() if ctx.step % 2 else flat(x)[: n // 2].clone(),)

    def decompress(self, payload, like, state, ctx):
        n = like.numel()
        start = n // 2 if ctx.step % 2 else 0
        at = torch.arange(start, start + payload[0].numel())
        return Sparse(at, payload[0], 0.5)

    def commit(self, payload, like, old, new, ctx):
        new["last"].copy_(old["last"] + payload[0][:1])


def halves():
    return Method("halves", (Rule(Halves(), ErrorFeedback()),))


def test_a_state_follows_the_mean_and_shapes_may_alternate(monkeypatch):
    monkeypatch.setitem(registry.COMPRESSORS, "halves", Halves)
    param = torch.nn.Parameter(torch.zeros(5, 5))
    optimizer = torch.optim.SGD([param], lr=1.0)
    sim = SimulatedWorkers(torch.nn.ParameterList([param]), halves(), optimizer, 2)
    sent, firsts = [], 0.0
    for step in range(4):
        before = param.detach().clone()
        sim.step(lambda worker, step=step: (param * (1.0 + worker + step)).sum())
        sent.append(sim.session.ledger.rows[-1].wire_bytes)
        firsts += (before - param.detach()).flatten()[12 * (step % 2)].item()
    assert sent == [sent[0], sent[1]] * 2
    assert sent[0] != sent[1]
    assert sim.session.units[0].shared.now["last"].tolist() == [firsts] * 7
    total = sum(1.5 + step for step in range(4))
    pending = torch.stack([worker.local["0"].now["residual"] for worker in sim.session.workers]).mean(0)
    torch.testing.assert_close(pending - param.detach(), torch.full((5, 5), total))
