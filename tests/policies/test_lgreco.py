"""L-GreCo: plans of all ranks alike, at the uniform plan's error and fewer bytes; residuals are kept."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import batch, build, flat_parameters, loss_of
from thinwire import ThinwireError, Warmup, maxmin, powersgd, qsgd, topk
from thinwire.compressors import QSGD, PowerSGD, Quantize, TopK
from thinwire.core import Context
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.policies import LGreCo
from thinwire.policies.lgreco import Snapshot, digest, family, losses, tried

MIXED = [*family(TopK(0.05)), *family(PowerSGD(2)), TopK(0.1, values="int4")]


def _planned(rank, method, options):
    model, optimizer = build()
    policy = LGreCo(every=6, looks=3, **options)
    wire = thinwire.attach(ddp := DistributedDataParallel(model), method, optimizer=optimizer, policy=policy)
    kept = True
    for step in range(14):
        before = {name: two.next["residual"] for name, two in wire.workers[0].local.items() if "residual" in two.next}
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
        kept &= all(torch.equal(wire.workers[0].local[name].now["residual"], r) for name, r in before.items())
    facts = digest(wire.method), wire.ledger.notes, [row.wire_bytes for row in wire.ledger.rows], kept
    wire.detach()
    return flat_parameters(model), facts


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (topk(0.05), {}),
        (powersgd(2), {"error": "l2sq"}),
        (topk(0.05), {"candidates": MIXED}),
        (qsgd(4), {}),
        (topk(0.05, route="two_phase"), {}),
    ],
    ids=["topk", "powersgd", "mixed", "qsgd", "two_phase"],
)
def test_ranks_plan_alike(world2, method, options):
    (a, (plan, notes, sent, kept)), (b, (other, *_)) = world2.run(_planned, method, options)
    assert torch.equal(a, b)
    assert plan == other != digest(method)
    assert kept
    planned = [note for note in notes if "L-GreCo plans" in note]
    assert len(planned) == 2
    assert "first.weight" in planned[0]
    torch.set_num_threads(1)
    model, optimizer = build()
    result = thinwire.simulate(
        model, method, optimizer=optimizer, batches=batch, loss=loss_of, workers=2, steps=14,
        policy=LGreCo(every=6, looks=3, **options),
    )  # fmt: skip
    assert torch.equal(flat_parameters(model), a), "simulator = real run"
    assert result.ledger.dense_bytes > result.ledger.wire_bytes
    assert result.ledger.rows[0].error > 0
    assert max(sent[8:]) < max(sent[:6])


def test_one_candidate_changes_nothing():
    ends = []
    for policy in (None, LGreCo([TopK(0.05)], every=5, looks=2)):
        model, optimizer = build()
        options = {"batches": batch, "loss": loss_of, "workers": 2, "steps": 12, "policy": policy}
        thinwire.simulate(model, topk(0.05, warmup=Warmup(3, (0.5,))), optimizer=optimizer, **options)
        ends.append(flat_parameters(model))
    assert torch.equal(*ends)
    assert set(policy.plan.values()) == {TopK(0.05)}


def test_only_what_the_memory_may_stand_beside_is_chosen():
    """Two bits may lose more than they are given, which a residual could not bear."""
    method = maxmin(4, block=256, feedback=True)
    model, optimizer = build()
    policy = LGreCo(every=6, looks=3, slack=1e6)
    options = {"batches": batch, "loss": loss_of, "workers": 2, "steps": 7, "policy": policy}
    thinwire.simulate(model, method, optimizer=optimizer, **options)
    assert {one.bits for one in policy.plan.values()} == {4}


def test_looking_at_pieces_is_looking_at_the_whole():
    x, like = torch.randn(2, 6, 5), torch.empty(6, 5, device="meta")
    whole, pieces = Snapshot({"w": like}), Snapshot({"w": like})
    for one in x:
        whole.look("w", one, None)
        for run in ((0, 7), (7, 30)):
            pieces.look("w", one.view(-1)[slice(*run)], run)
    pieces.look("not looked at", x, None)
    assert torch.equal(whole.mean("w"), pieces.mean("w"))
    torch.testing.assert_close(whole.mean("w"), x.mean(0))


def test_shortcuts_are_what_trying_tells():
    x, ctx = torch.randn(40, 30).pow(3), Context(0, 0, "w", 0)
    for options in (family(TopK(0.03)), [TopK(0.1, values="int4"), TopK(1.0), TopK(0.01)], [TopK(0.5), TopK(1.0)]):
        assert losses(x, options, ctx) == pytest.approx([tried(one, x, ctx) for one in options], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("one", [Quantize(4), Quantize(4, 60, "stochastic"), QSGD(4, 64), QSGD(4, 100, "max")])
def test_shortcuts_of_quantisers(one):
    """In the mean over many roundings; exactly, where it is to the nearest."""
    x, options = torch.randn(40, 31).pow(3), family(one)
    tries = [[tried(option, x, Context(0, step, "w", 0)) for option in options] for step in range(40)]
    means = torch.tensor(tries, dtype=torch.float64).mean(0).tolist()
    assert losses(x, options, Context(0, 0, "w", 0)) == pytest.approx(means, rel=0.05)
    assert losses(torch.zeros(7, 3), options, Context(0, 0, "w", 0)) == [0.0] * len(options)


def test_families():
    assert [one.rank for one in family(PowerSGD(1))] == [1, 2]
    densities = [one.density for one in family(TopK(0.01))]
    assert (min(densities), max(densities)) == pytest.approx((0.001, 0.1))
    assert len(family(TopK(0.5) >> thinwire.compressors.Cast("float16"))) == 21
    assert family(thinwire.compressors.Cast("float16")) == [thinwire.compressors.Cast("float16")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "joules"}, "objective is 'joules'"),
        ({"error": "l3"}, "error is 'l3'"),
        ({"every": 10}, "looks is 10 and every 10"),
        ({"looks": 0}, "looks is 0"),
        ({"slack": 0.0}, "slack is 0.0"),
        ({"resolution": 0}, "resolution 0"),
        ({"candidates": []}, r"candidates \[\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ThinwireError, match=message):
        LGreCo(**options)


def test_a_method_that_somebody_chooses_is_planned_from_then_on():
    model, optimizer = build()
    policy = LGreCo(every=4, looks=2)
    sim = SimulatedWorkers(model, topk(0.2), optimizer, 2, policy=policy)

    def run(first, last):
        for step in range(first, last):
            sim.step(lambda worker, step=step: loss_of(model, batch(worker, step)))

    run(0, 5)
    assert policy.plan
    sim.session.set_method(topk(0.01))
    run(5, 9)
    bytes_now = sim.session.ledger.rows[-1].wire_bytes
    assert bytes_now < 0.3 * sim.session.ledger.rows[0].wire_bytes
    assert max(one.density for one in policy.plan.values() if isinstance(one, TopK)) <= 0.1


def test_only_what_the_route_can_send_is_chosen():
    """A leader selects elements, which a quantiser does not send."""
    policy = LGreCo([Quantize(4), Quantize(3), TopK(0.1)], every=5, looks=2, slack=1e6)
    model, optimizer = build()
    options = {"batches": batch, "loss": loss_of, "workers": 2, "steps": 7, "policy": policy}
    result = thinwire.simulate(model, topk(0.3, route="leader"), optimizer=optimizer, **options)
    assert {type(one) for one in policy.plan.values()} <= {TopK}
    assert result.ledger.wire_bytes < result.ledger.dense_bytes
    assert result.ledger.rows[0].error > 0
