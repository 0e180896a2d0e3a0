"""What holds for every recipe: add a line to RECIPES."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import methods_page

import thinwire
from tests.compressors import test_catalogue as battery
from tests.engines.models import simulated
from tests.engines.test_ddp import _conserves, trained
from thinwire.core import NOWHERE, registry
from thinwire.core.interfaces import feeds_back, local_state
from thinwire.core.memory_capabilities import Absorbed, absorb
from thinwire.exchange.units import payload_nbytes
from thinwire.methods.method import Method, Rule

RECIPES = {
    "qsgd": thinwire.qsgd(4),
    "qsgd-gathered": thinwire.qsgd(3, block=64, norm="max", route="all_gather"),
    "maxmin": thinwire.maxmin(4),
    "maxmin-feedback": thinwire.maxmin(4, block=128, feedback=True),
    "terngrad": thinwire.methods.terngrad(),
    "natural": thinwire.methods.natural(),
    "signsgd": thinwire.signsgd(),
    "signsgd-gathered": thinwire.signsgd(0.0, route="all_gather"),
    "ef_sign": thinwire.methods.ef_sign(),
    "randk": thinwire.methods.randk(0.05),
    "randk-unbiased": thinwire.methods.randk(0.2, feedback=False),
    "randk-private": thinwire.methods.randk(0.05, shared=False),
    "sidco": thinwire.methods.sidco(0.02),
    "scalecom": thinwire.scalecom(0.05),
    "demo": thinwire.methods.decoupled_momentum(),
    "lean": thinwire.lean(0.5),
    "lean-any-optimizer": thinwire.lean(0.5, momentum=False),
}
PLAIN = {"momentum": 0.0, "lr": 0.001}
"""For what answers signs, and for noise that momentum would amplify."""


@pytest.mark.parametrize("name", RECIPES)
def test_simulator_equals_the_real_run(world2, name):
    """Bit for bit, with fewer bytes than dense and an error above zero, across DDP's bucket rebuild."""
    torch.set_num_threads(1)
    real, facts = trained(world2, RECIPES[name], 6, {}, PLAIN)
    expected, result = simulated(RECIPES[name], 2, 6, PLAIN)
    assert torch.equal(real, expected)
    assert facts["wire_bytes"] == result.ledger.wire_bytes
    assert (real - simulated(thinwire.dense(), 2, 6, PLAIN)[0]).abs().max() > 0


FED_BACK = [name for name, method in RECIPES.items() if feeds_back(method.rules[0].memory)]


@pytest.mark.parametrize("name", [name for name in FED_BACK if name != "demo"])  # whose momentum decays, see below
def test_sent_and_left_is_what_was_asked(world2, name):
    (compensated, received, left, weight, facts), other = world2.run(_conserves, RECIPES[name])
    assert torch.equal(weight, other[3])
    assert facts["wire_bytes"] < facts["dense_bytes"]
    assert facts["error"] > 0
    torch.testing.assert_close(2 * received + left + other[2], compensated + other[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", RECIPES.values(), ids=RECIPES)
def test_recipes_are_values(method):
    assert Method.from_json(method.to_json()) == method
    for rule in method.rules:
        assert absorb(rule.memory, Absorbed()) == rule.memory


def test_momentum_decouples():
    """``beta M + g = M' + sent`` at every step, and the optimizer gets signs, of which NaN stays NaN."""
    memory, compressor = thinwire.memories.DecoupledMomentum(0.9), thinwire.compressors.DctTopK(0.05)
    param = torch.zeros(64, 100, dtype=torch.float64)
    old, new = local_state(memory, param), local_state(memory, param)
    for _ in range(5):
        grad = torch.randn_like(param)
        compensated = memory.compensate(4.0 * grad, param, old, new, 0.25)
        torch.testing.assert_close(compensated, 0.9 * old["residual"] + grad)
        total = compensated.clone()
        sent = compressor.decompress(compressor.compress(compensated, {}, NOWHERE), param, {}, NOWHERE)
        memory.sent(sent, new)
        out = torch.empty_like(param)
        sent.write_to(out)
        torch.testing.assert_close(out + new["residual"], total)
        assert out.norm() > 0
        assert new["residual"].norm() > 0
        old, new = new, old
    got = memory.receive(torch.tensor([-3.0, 0.0, torch.nan, 0.1]), param, {}, {})
    assert got.isnan().tolist() == [False, False, True, False]
    assert got[[0, 1, 3]].tolist() == [-1.0, 0.0, 1.0]


def test_a_vote_counts_sides_alone():
    vote, sign = thinwire.memories.MajorityVote(), thinwire.compressors.Sign(scale="none")
    for world in (2, 3, 6, 100):
        votes = [torch.randn(50).sign() * 10.0 ** (w % 9 - 3) for w in range(world)]
        mean = torch.zeros(50)
        for x in votes:
            sign.decompress(sign.compress(x, {}, NOWHERE), x, {}, NOWHERE).add_to(mean, 1.0 / world)
        expected = sum(x.sign() for x in votes).sign()
        assert torch.equal(vote.receive(mean, mean, {}, {}), expected), "ties are 0"
    assert vote.receive(torch.tensor([torch.nan, 1.0]), mean, {}, {}).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: thinwire.qsgd(1), "bits is 1; QSGD takes 2 to 8"),
        (lambda: thinwire.qsgd(9), "bits is 9"),
        (lambda: thinwire.qsgd(4, block=0), "block is 0"),
        (lambda: thinwire.qsgd(4, norm="l3"), "norm is 'l3'"),
        (lambda: thinwire.maxmin(0), "bits is 0; Quantize takes 1 to 8"),
        (lambda: thinwire.maxmin(4, rounding="up"), "rounding is 'up'"),
        (lambda: thinwire.maxmin(2), "Quantize is biased, and NoMemory forgets"),
        (lambda: thinwire.maxmin(4, block=512, feedback=True), "smaller blocks"),
        (lambda: thinwire.methods.terngrad(clip_rms=0.0), "clip_rms is 0.0"),
        (lambda: thinwire.signsgd(1.0), "momentum is 1.0"),
        (lambda: thinwire.methods.ef_sign(block=0), "block is 0"),
        (lambda: thinwire.compressors.Sign(scale="l3"), "scale is 'l3'"),
        (lambda: thinwire.methods.randk(0.0), "density is 0.0"),
        (lambda: thinwire.scalecom(0.0), "density is 0.0"),
        (lambda: thinwire.scalecom(float("nan")), "density is nan"),
        (
            lambda: thinwire.compressors.CLTK(0.1) >> thinwire.compressors.Quantize(4),
            "CLTK needs the sum of what is sent",
        ),
        (lambda: thinwire.methods.sidco(1.5), "density is 1.5"),
        (lambda: thinwire.compressors.SIDCo(0.1, stages=0), "stages is 0"),
        (lambda: thinwire.methods.sidco(0.1, fit="normal"), "fit is 'normal'"),
        (lambda: thinwire.compressors.Threshold(0.0, 0.1), "threshold is 0.0"),
        (lambda: thinwire.compressors.Threshold(1.0, 0.0), "capacity is 0.0"),
        (lambda: thinwire.compressors.BlockTopK(0.0), "density is 0.0"),
        (lambda: thinwire.compressors.BlockTopK(0.1, block=0), "block is 0"),
        (lambda: thinwire.methods.decoupled_momentum(2.0), "density is 2.0"),
        (lambda: thinwire.methods.decoupled_momentum(chunk=0), "chunk is 0"),
        (lambda: thinwire.methods.decoupled_momentum(decay=1.0), "decay is 1.0"),
        (lambda: thinwire.compressors.Scaled(thinwire.compressors.TopK(0.1)), "TopK is biased, and so has no variance"),
        (lambda: Rule(thinwire.compressors.QSGD(2), thinwire.memories.ErrorFeedback()), "Scaled"),
        (lambda: Rule(thinwire.compressors.Sign(), thinwire.memories.NoMemory()), "Sign is biased"),
        (
            lambda: Rule(thinwire.compressors.Sign(scale="l2"), thinwire.memories.ErrorFeedback()),
            "may lose more than it is given",
        ),
    ],
)
def test_bad_hyper_parameters(make, says):
    with pytest.raises(thinwire.ThinwireError, match=says):
        make()


@pytest.mark.parametrize("budget", [0.02, 0.06, 0.3])
def test_lean_spends_its_budget(budget):
    rule = thinwire.lean(budget).rule("weight", (1024, 1024), 2**20)
    spent = 8 * payload_nbytes(rule.compressor, torch.empty(1024, 1024, device="meta")) / 2**20
    assert 0.97 * budget < spent < 1.01 * budget
    assert not rule.memory.masking
    for wrong in (0.0, -1.0, float("nan"), 40.0):
        with pytest.raises(thinwire.ThinwireError, match=f"bits_per_parameter is {wrong}"):
            thinwire.lean(wrong)


def test_an_unbiased_compressor_is_remembered_when_scaled():
    Rule(thinwire.compressors.Scaled(thinwire.compressors.QSGD(2)), thinwire.memories.ErrorFeedback())


NEW = """
from dataclasses import dataclass
from thinwire.core import Compressor, Sparse, Traits, flat, register
import torch

@register("thirds")
@dataclass(frozen=True)
class EveryThird(Compressor):
    traits = Traits(summable=True)

    def compress(self, x, state, ctx):
        return (flat(x)[::3].clone(),)

    def decompress(self, payload, like, state, ctx):
        return Sparse(torch.arange(0, like.numel(), 3), payload[0], 1 / 3)
"""


def test_adding_a_compressor_touches_one_file(tmp_path, monkeypatch):
    (tmp_path / "thirds.py").write_text(NEW)
    spec = importlib.util.spec_from_file_location("thirds", tmp_path / "thirds.py")
    monkeypatch.setitem(sys.modules, "thirds", module := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(registry, "COMPRESSORS", dict(registry.COMPRESSORS))
    spec.loader.exec_module(module)
    case = module.EveryThird()
    for dtype in (torch.float32, torch.bfloat16):
        every = battery.TestBattery()
        for name in [name for name in dir(every) if name.startswith("test")]:
            getattr(every, name)(case, dtype)
    battery.test_contracts_as_declared(case)
    battery.test_json_round_trip(case)
    method = Method("thirds", (Rule(case, thinwire.memories.ErrorFeedback()),))
    assert Method.from_json(method.to_json()) == method
    _, result = simulated(method, 2, 3)
    assert result.ledger.ratio > 2
    assert result.ledger.rows[0].error > 0


def test_the_page_of_methods_is_up_to_date():
    written = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    assert written == methods_page.page(), "python -m benchmarks.methods_page > docs/methods.md"
