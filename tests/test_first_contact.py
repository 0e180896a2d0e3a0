"""First contact: what a newcomer hands over is accepted where it is plain, and else refused with the way out."""

from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import thinwire
from thinwire import Method, Rule, ThinwireError, Warmup
from thinwire.comm.link import Link
from thinwire.compressors import (
    CLTK,
    QSGD,
    BlockTopK,
    Cast,
    DctTopK,
    Natural,
    PowerSGD,
    Quantize,
    RandK,
    Scaled,
    SIDCo,
    Sign,
    TernGrad,
    Threshold,
    TopK,
)
from thinwire.core.capabilities import title
from thinwire.core.checks import seconds
from thinwire.core.context import Context
from thinwire.memories import EF21, EControl, ErrorFeedback, MomentumCorrection, NoMemory
from thinwire.methods.given import method_of

NAN, INF = float("nan"), float("inf")
SHARE = r"is kept/total and must be in \(0, 1\]"

REFUSED = [
    # densities
    (lambda: thinwire.dgc(1), "density is 1, which may mean 1 % or all.*write 0.01 for 1 %, 1.0 for all"),
    (lambda: thinwire.dgc(np.int64(1)), "density is 1, which may mean 1 % or all"),
    (lambda: thinwire.dgc(True), "density is True, which is no number"),
    (lambda: thinwire.dgc(np.bool_(True)), "density is True, which is no number"),
    (lambda: thinwire.dgc("0.01"), f"density is the text '0.01'; write 0.01, without quotes: it {SHARE}"),
    (lambda: thinwire.dgc("0.1%"), "write 0.001 for 0.1%, without quotes"),
    (lambda: thinwire.topk("much"), f"density is the text 'much'; it {SHARE}"),
    (lambda: thinwire.topk(None), f"density is None; it {SHARE}"),
    (lambda: thinwire.topk(5), f"density is 5; it {SHARE}.*: 5 % is 0.05"),
    (lambda: thinwire.topk(0.0), "density is 0.0"),
    (lambda: thinwire.topk(-0.1), "density is -0.1"),
    (lambda: thinwire.topk(NAN), "density is nan"),
    (lambda: thinwire.topk([0.01]), f"density is a list; it {SHARE}"),
    (lambda: thinwire.topk(0.01 + 0j), "density is a complex"),
    (lambda: thinwire.topk(torch.tensor(0.01)), r"density is a Tensor; write float\(density\)"),
    (lambda: thinwire.topk(TopK), "density is <class"),
    (lambda: thinwire.methods.randk(1), "density is 1, which may mean"),
    (lambda: thinwire.methods.sidco(True), "density is True"),
    (lambda: thinwire.scalecom("0.01"), "density is the text '0.01'"),
    (lambda: thinwire.methods.decoupled_momentum(2), "density is 2.*2 % is 0.02"),
    (lambda: thinwire.methods.ef14(1), "density is 1, which may mean"),
    (lambda: thinwire.ef21("0.01"), "density is the text"),
    (lambda: thinwire.methods.ef21_bc(0.01, 1), "density is 1, which may mean"),
    (lambda: thinwire.econtrol("0.01"), "density is the text"),
    (lambda: BlockTopK(1), "density is 1, which may mean"),
    (lambda: DctTopK(1), "density is 1, which may mean"),
    (lambda: CLTK(True), "density is True"),
    (lambda: RandK("0.5"), "density is the text"),
    (lambda: SIDCo(100), "100 % is 1"),
    (lambda: Threshold(1.0, 1), "capacity is 1, which may mean"),
    (lambda: Threshold("1.0", 0.1), "threshold is the text '1.0'; write 1.0, without quotes"),
    (lambda: thinwire.lean("0.06"), "bits_per_parameter is the text '0.06'; write 0.06"),
    (lambda: thinwire.lean(True), "bits_per_parameter is True"),
    (lambda: thinwire.lean(INF), "bits_per_parameter is inf"),
    # whole numbers
    (lambda: thinwire.powersgd(4.5), "rank is 4.5; it must be at least 1 and whole"),
    (lambda: thinwire.powersgd(0), "rank is 0"),
    (lambda: thinwire.powersgd("4"), "rank is the text '4'; write 4, without quotes"),
    (lambda: thinwire.powersgd(True), "rank is True"),
    (lambda: thinwire.powersgd(4, min_compression_rate="2"), "min_compression_rate is the text"),
    (lambda: thinwire.qsgd(2.5), "bits is 2.5; QSGD takes 2 to 8"),
    (lambda: thinwire.qsgd("4"), "bits is the text '4'"),
    (lambda: thinwire.maxmin(True), "bits is True"),
    (lambda: thinwire.maxmin(4, block=0.5), "block is 0.5; it must be a whole number, at least 1"),
    (lambda: thinwire.methods.ef_sign(block="4096"), "block is the text '4096'"),
    (lambda: thinwire.methods.decoupled_momentum(chunk=64.5), "chunk is 64.5"),
    (lambda: thinwire.compressors.SIDCo(0.1, stages=1.5), "stages is 1.5"),
    (lambda: TopK(0.1, attempts=-1), "attempts is -1"),
    # factors and probabilities
    (lambda: thinwire.signsgd("0.9"), "momentum is the text '0.9'"),
    (lambda: thinwire.signsgd(1), r"momentum is 1; it must be in \[0, 1\)"),
    (
        lambda: thinwire.methods.ef21_pp(0.1, participation=0),
        r"participation is 0; it must be in \(0, 1\]: it is a",
    ),
    (lambda: thinwire.methods.ef21_sgdm(0.1, eta=None), "eta is None"),
    (lambda: thinwire.scalecom(0.1, beta=True), "beta is True"),
    (lambda: EControl("0.1"), "eta is the text"),
    (lambda: thinwire.methods.terngrad(clip_rms=-1), "clip_rms is -1"),
    (lambda: thinwire.dgc(clip="1"), "clip is the text '1'; write 1, without quotes"),
    (lambda: thinwire.dgc(clip=INF), "clip is inf"),
    (lambda: thinwire.dgc(mask_below_density=5), "mask_below_density is 5"),
    (lambda: MomentumCorrection(momentum=0.9, weight_decay=-1e-4), "weight_decay is -0.0001"),
    (lambda: thinwire.dgc(second_stage_density_ratio=0), "second_stage_density_ratio is 0"),
    # flags and words
    (lambda: thinwire.dgc(masking="no"), "masking is 'no'; it must be True or False"),
    (lambda: thinwire.dgc(masking=1), "masking is 1; it must be True or False"),
    (lambda: thinwire.lean(momentum=0.9), "momentum is 0.9; it must be True or False"),
    (lambda: thinwire.methods.randk(0.1, feedback=None), "feedback is None; it must be True or False"),
    (lambda: thinwire.maxmin(4, feedback=1), "feedback is 1"),
    (lambda: MomentumCorrection(nesterov="yes"), "nesterov is 'yes'"),
    (lambda: thinwire.dgc(decay=0.1), "decay is 0.1; choose one of separate, local, decoupled"),
    (lambda: thinwire.dgc(selection=None), "selection is None; choose one of auto"),
    (lambda: thinwire.dgc(route=["all_gather"]), "route is .*choose one of all_gather"),
    (lambda: Sign(scale=None), "scale is None; choose one of l1, l2, none"),
    # dtypes
    (lambda: thinwire.cast("float8"), "dtype is 'float8'; choose one of float64, float32, float16, bfloat16"),
    (lambda: thinwire.cast(torch.int8), "dtype is torch.int8; choose one of float64"),
    (lambda: thinwire.cast(None), r"dtype is None; .*thinwire\.dense\(\)"),
    (lambda: thinwire.cast(16), "dtype is 16; choose one of"),
    (lambda: Cast("int4"), "dtype is 'int4'; choose one of .*None for the tensor's own"),
    (lambda: thinwire.dgc(values=4), "values is 4; choose one of sign, int2, int4, int8"),
    (lambda: thinwire.dgc(state_dtype=torch.float16), "state_dtype is torch.float16; choose one of float32, bfloat16"),
    (lambda: thinwire.methods.decoupled_momentum(values="int4"), "values is 'int4'; choose one of"),
    # warm-ups
    (lambda: thinwire.dgc(warmup="400"), "warmup is the text '400'; write 400, without quotes: give a number of steps"),
    (lambda: thinwire.dgc(warmup=True), "warmup is True, which is no number; give a number of steps"),
    (lambda: thinwire.dgc(warmup=2), r"a warm-up of 2 steps .*: thinwire\.Warmup\(2, \(0.25,\)\)"),
    (lambda: thinwire.dgc(warmup=-40), "warmup is -40"),
    (lambda: thinwire.dgc(warmup=0.05), "warmup is 0.05; give a number of steps"),
    (lambda: thinwire.dgc(warmup=(0.25, 0.06)), "warmup is a tuple; give a number of steps"),
    (lambda: Warmup("400"), "steps is the text '400'"),
    (lambda: Warmup(400.5), "steps is 400.5; it must be a whole number"),
    (lambda: Warmup(400, 0.25), "stages is 0.25; it must be a list of densities"),
    (lambda: Warmup(400, (25, 6)), "warm-up stage 25 is not a density; .*25 % is 0.25"),
    (lambda: Warmup(400, ("0.25",)), "warm-up stage '0.25' is not a density"),
    (lambda: Warmup(4, steps_per_epoch=True), "steps_per_epoch is True"),
    # names
    (lambda: thinwire.dgc(Decimal("0.01")), r"density is a Decimal; write float\(density\)"),
    (lambda: Link.parse("1gbit,1\u017f"), "is not understood; write a bandwidth"),
    (lambda: thinwire.dgc(keep_dense=b"head"), "it must be a list of texts"),
    (lambda: thinwire.dgc(keep_dense=3), r"keep_dense is 3; it must be a list of texts"),
    (lambda: thinwire.dgc(keep_dense=[torch.nn.Linear]), "keep_dense is .*it must be a list of texts"),
    # parts
    (lambda: Rule(ErrorFeedback(), TopK(0.1)), "compressor is a ErrorFeedback; a rule is Rule"),
    (lambda: Rule(TopK, ErrorFeedback()), r"compressor is the class TopK; call it: TopK\(...\)"),
    (lambda: Rule(TopK(0.1), ErrorFeedback), r"memory is the class ErrorFeedback; call it"),
    (lambda: Rule(TopK(0.1), ErrorFeedback(), match=["*"]), "match is a list"),
    (lambda: Rule(TopK(0.1), ErrorFeedback(), min_ndim=1.5), "min_ndim is 1.5"),
    (lambda: Method("mine", TopK(0.1)), "rules is .*a method has a tuple of rules"),
    (lambda: Method("mine", ()), r"rules is \(\); a method has a tuple of rules"),
    (lambda: Method(Rule(Cast(), NoMemory()), "mine"), "name is a Rule"),
    (lambda: EF21(downlink=0.05), r"downlink is a float; downlink takes a compressor, e\.g\. TopK\(0\.05\)"),
    (lambda: Scaled(QSGD), "compressor is the class QSGD; call it"),
    (lambda: TopK(0.1) >> 4, "then is a int; both sides of >>"),
    (lambda: TopK(0.1) >> Quantize, "then is the class Quantize; call it"),
    # links
    (lambda: Link.parse("fast"), "link 'fast' is not understood; write a bandwidth"),
    (lambda: Link.parse("1GBPS"), "link '1GBPS' is not understood"),
    (lambda: Link.parse("100"), "link '100' is not understood"),
    (lambda: Link.parse("1gbit,5"), "link '1gbit,5' is not understood"),
    (lambda: Link.parse("0gbit"), "link '0gbit' is not understood"),
    (lambda: Link("1gbit"), r"bandwidth is the text '1gbit'; .*Link\.parse\('1gbit'\) reads text"),
    (lambda: Link(0), "bandwidth is 0; it must be above 0"),
    (lambda: Link(1e9, -1), "latency is -1; it must be at least 0, in seconds"),
    (lambda: Link.read("link", 1e9), "link is 1000000000.0; write a bandwidth with its unit"),
    # times
    (lambda: seconds("timeout", timedelta(0)), "timeout is 0.0; it must be above 0, in seconds, or a timedelta"),
    (lambda: seconds("timeout", "300"), "timeout is the text '300'; write 300, without quotes"),
    (lambda: seconds("timeout", INF), "timeout is inf"),
    (lambda: seconds("timeout", None), "timeout is None"),
    # methods
    (lambda: method_of("dgc"), r"method is the text 'dgc'; pass thinwire\.dgc\(\), without quotes"),
    (lambda: method_of("thinwire.topk"), r"pass thinwire\.topk\(0\.01\), without quotes"),
    (lambda: method_of("zip"), r"method is the text 'zip'; pass a method, e\.g\. thinwire\.dgc\(0\.001\)"),
    (lambda: method_of(thinwire.dgc), r"method is the function thinwire\.dgc itself; call it: thinwire\.dgc\(\)"),
    (lambda: method_of(thinwire.topk), r"call it: thinwire\.topk\(0\.01\)"),
    (lambda: method_of(thinwire.methods.ef21_pp), r"call it: thinwire\.ef21_pp\(0\.01, participation=0\.5\)"),
    (lambda: method_of(TopK), r"method is the class TopK; make one of it: TopK\(\.\.\.\)"),
    (lambda: method_of(Method), "method is the class Method; pass a method"),
    (lambda: method_of(ErrorFeedback()), "method is a memory, ErrorFeedback, which is one half"),
    (lambda: method_of(0.01), r"method is the number 0\.01; say of which method it is"),
    (lambda: method_of(None), "method is None; pass a method"),
    (lambda: method_of(torch.nn.Linear(2, 2)), "method is a model, Linear; the model comes first"),
    (lambda: method_of([Rule(Cast(), NoMemory())]), "method is a list; put rules into a method"),
    (lambda: method_of(Sign(scale="none")), "may lose more than it is given"),
    (lambda: method_of(TopK(0.1) >> QSGD(2)), "TopK >> QSGD may lose more than it is given"),
]


@pytest.mark.parametrize(("make", "says"), REFUSED)
def test_what_is_refused_is_said_with_the_way_out(make, says):
    with pytest.raises(ThinwireError, match=says):
        make()


ACCEPTED = [
    (thinwire.dgc(np.float64(0.01)), thinwire.dgc(0.01)),
    (thinwire.topk(np.float32(0.25)), thinwire.topk(0.25)),
    (thinwire.topk(Fraction(1, 4)), thinwire.topk(0.25)),
    (TopK(1.0).density, 1.0),
    (thinwire.powersgd(4.0), thinwire.powersgd(4)),
    (thinwire.powersgd(np.int32(2)), thinwire.powersgd(2)),
    (thinwire.powersgd(2, warmup=40), thinwire.powersgd(2, warmup=Warmup(40, (1.0,)))),
    (thinwire.qsgd(4.0), thinwire.qsgd(4)),
    (thinwire.maxmin(np.uint8(4), block=256.0), thinwire.maxmin(4, block=256)),
    (thinwire.signsgd(0), thinwire.signsgd(0.0)),
    (thinwire.dgc(warmup=40), thinwire.dgc(warmup=Warmup(40))),
    (thinwire.dgc(warmup=40.0), thinwire.dgc(warmup=Warmup(40))),
    (thinwire.topk(0.01, warmup=np.int64(40)), thinwire.topk(0.01, warmup=Warmup(40))),
    (thinwire.dgc(warmup=0), thinwire.dgc()),
    (thinwire.ef21(0.01, warmup=40), thinwire.ef21(0.01, warmup=Warmup(40))),
    (thinwire.lean(warmup=40), thinwire.lean(warmup=Warmup(40))),
    (thinwire.methods.randk(0.1, warmup=8), thinwire.methods.randk(0.1, warmup=Warmup(8))),
    (Method("m", [Rule(Cast(), NoMemory())], warmup=8), Method("m", (Rule(Cast(), NoMemory()),), warmup=Warmup(8))),
    (Method("m", Rule(Cast(), NoMemory())), Method("m", (Rule(Cast(), NoMemory()),))),
    (Warmup(400.0, [0.5, 0.25]), Warmup(400, (0.5, 0.25))),
    (Warmup(4, steps_per_epoch=10.0), Warmup(4, steps_per_epoch=10)),
    (thinwire.cast(torch.float16), thinwire.cast("float16")),
    (thinwire.cast(torch.bfloat16), thinwire.cast("bfloat16")),
    (thinwire.cast("torch.float16"), thinwire.cast("float16")),
    (thinwire.cast("fp16"), thinwire.cast("float16")),
    (thinwire.cast("bf16"), thinwire.cast("bfloat16")),
    (thinwire.dgc(values=torch.float16), thinwire.dgc(values="float16")),
    (thinwire.dgc(state_dtype=torch.bfloat16), thinwire.dgc(state_dtype="bfloat16")),
    (thinwire.dgc(keep_dense="*.weight"), thinwire.dgc(keep_dense=["*.weight"])),
    (thinwire.dgc(keep_dense={"d.*", "a.*", "c.*", "b.*"}), thinwire.dgc(keep_dense=["a.*", "b.*", "c.*", "d.*"])),
    (thinwire.dgc(keep_dense=(name for name in ("b", "a"))), thinwire.dgc(keep_dense=["b", "a"])),
    (thinwire.dgc(keep_dense={"b": 1, "a": 2}.keys()), thinwire.dgc(keep_dense=["b", "a"])),
    (thinwire.dgc(masking=np.bool_(False)), thinwire.dgc(masking=False)),
    (seconds("timeout", timedelta(minutes=5)), 300.0),
    (seconds("timeout", np.int64(300)), 300.0),
    (method_of(thinwire.dgc()), thinwire.dgc()),
    (method_of(TopK(0.01)).rules, thinwire.topk(0.01).rules),
    (method_of(PowerSGD(4)).rules[0].memory, ErrorFeedback()),
    (method_of(QSGD(4)).rules, thinwire.qsgd(4).rules),
    (method_of(Rule(TopK(0.01), MomentumCorrection(), min_ndim=2)).rules, thinwire.dgc(0.01).rules),
    (method_of(TopK(0.01) >> Quantize(4)).name, "TopK >> Quantize"),
]


@pytest.mark.parametrize(("given", "meant"), ACCEPTED)
def test_what_is_plain_is_accepted(given, meant):
    assert given == meant
    if isinstance(given, Method):
        assert Method.from_json(given.to_json()) == meant, "and is what other ranks and checkpoints read"


GIGABIT = Link(1e9)
LINKS = {
    "1gbit": GIGABIT, "1 Gb/s": GIGABIT, "1Gbps": GIGABIT, "1 GBit/s": GIGABIT, "1 Gbits/sec": GIGABIT, "1G": GIGABIT,
    "1gbe": GIGABIT, "1 gigabit per second": GIGABIT, "1000 Mbps": GIGABIT, "1e9 bit/s": GIGABIT, "125 MB/s": GIGABIT,
    "125 megabytes/s": GIGABIT, "10GbE": Link(1e10),
    "10GigE": Link(1e10), "1 TiB/s": Link(8 * 2.0**40), "10 Gigabit Ethernet": Link(1e10), "25G": Link(2.5e10),
    "100 Mbit/s": Link(1e8), "56k": Link(56e3), "1 GB/s": Link(8e9), "1 Mibit/s": Link(2.0**20),
    "1 MiB/s": Link(2.0**23), "1gbit,0.5ms": Link(1e9, 0.0005), "1 Gb/s, 500 us": Link(1e9, 0.0005),
    "100mbit 2 ms": Link(1e8, 0.002), "1 Tb/s; 5µs": Link(1e12, 5e-6),
}  # fmt: skip


@pytest.mark.parametrize("text", LINKS)
def test_links_in_common_spellings(text):
    found, meant = Link.parse(text), LINKS[text]
    assert found.bandwidth == meant.bandwidth
    assert found.latency == pytest.approx(meant.latency)


EVERY = [
    Cast(), Cast("float16"), TopK(0.1), TopK(0.1, "int4"), TopK(0.1, "float16"), CLTK(0.1), RandK(0.1),
    RandK(0.1, scaled=False), Threshold(1.0, 0.2), SIDCo(0.1), BlockTopK(0.1, 64), DctTopK(0.1, 16), QSGD(4),
    QSGD(8, 64), Quantize(4), Quantize(8), Quantize(4, rounding="stochastic"), TernGrad(), TernGrad(None), Natural(),
    Sign(), Sign(scale="l2"), Sign(scale="none"), Scaled(QSGD(4)), Scaled(RandK(0.1)), PowerSGD(2),
    TopK(0.2) >> Cast("float16"), TopK(0.2) >> Quantize(4),
]  # fmt: skip


@pytest.mark.parametrize("first", EVERY, ids=title)
def test_every_chain_is_refused_or_loses_less_than_all(first):
    """``||x - C(x)||^2`` is below ``||x||^2``, and below what is declared, whatever stands on both sides of ``>>``."""
    torch.manual_seed(0)
    x = torch.randn(40, 50)
    accepted = 0
    for then in EVERY:
        try:
            chain = first >> then
            Rule(chain, ErrorFeedback())
        except ThinwireError:
            continue
        accepted += 1
        lost = []
        for step in range(6):
            ctx = Context(seed=1, step=step, unit="w", rank=0)
            state = chain.init(x, ctx)
            payload = chain.compress(x, state, ctx)
            chain.decompress(payload, x, state, ctx).write_to(out := torch.empty_like(x))
            lost.append(float((x - out).square().sum() / x.square().sum()))
        assert max(lost) < 1.0 + 1e-6, chain
        alpha = chain.traits.contraction(x.numel())
        assert alpha is None or sum(lost) / 6 <= 1.0 - alpha + 0.05, chain
    assert bool(accepted) == (first.traits.keeps_values and first.traits.contraction(2**20) != 0.0)


def test_a_quantiser_before_a_sparsifier_is_turned_around():
    with pytest.raises(ThinwireError, match=r"Quantize >> TopK would code the scales.*stands first: TopK >> Quantize"):
        Quantize(8) >> TopK(0.1)
    with pytest.raises(ThinwireError, match="would code the scales of TopK"):
        TopK(0.1, values="int4") >> Quantize(8)
    with pytest.raises(ThinwireError, match="CLTK sends what one rank has chosen"):
        Cast("float16") >> CLTK(0.1)
