"""A leader-selected route: turns, conservation, the step status, bytes for N workers; one worker is Top-k."""

import re

import pytest
import torch

from tests.engines.models import simulated
from tests.exchange.test_two_phase import journey, units_of
from thinwire import Method, Rule, ThinwireError, scalecom
from thinwire.compressors import CLTK, BlockTopK, Cast, DctTopK, PowerSGD, Quantize, RandK, SIDCo
from thinwire.compressors.sparse import TopK
from thinwire.core import Chain
from thinwire.core.capabilities import title
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.exchange.buckets import plan_bucket
from thinwire.memories import EF21, ErrorFeedback, Momentum, MomentumCorrection
from thinwire.methods import ef14


def model(rows, columns=8):
    param = torch.nn.Parameter(torch.zeros(rows, columns))
    return torch.nn.ParameterList([param]), param, torch.optim.SGD([param], lr=1.0)


@pytest.mark.parametrize("memory", [ErrorFeedback(), ErrorFeedback("bfloat16")], ids=str)
def test_every_worker_leads_once_in_n_steps(memory):
    """Worker w sends row w alone, so what is applied says who was the leader."""
    n = 4
    modules, param, optimizer = model(n)
    sim = SimulatedWorkers(modules, Method("leader", (Rule(CLTK(1 / n), memory),)), optimizer, n)
    for step in range(2 * n):
        before = param.detach().clone()
        sim.step(lambda worker: param[worker].sum())
        moved = (before - param.detach()).abs().sum(1)
        assert moved.nonzero().flatten().tolist() == [step % n]
    assert not sim.session.workers[0].held
    assert (-param.detach()).sum(1).tolist() == [8.0 * (n + 1 + w) / n for w in range(n)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("compressor", [CLTK(0.1), CLTK(0.1) >> Cast("float16")], ids=str)
def test_nothing_is_lost(world, compressor):
    """The mean of what was applied, times N, and all residuals, are what was compensated; replicas are bit-equal."""
    method = Method("leader", (Rule(compressor, ErrorFeedback(), min_ndim=2), Rule(Cast(), ErrorFeedback())))
    bucket, workers, compensated, got = journey(method, world, 12, heads=1)
    assert bucket.relays
    for unit in bucket.units:
        left = sum(worker.local[unit.name].now["residual"] for worker in workers)
        tolerance = 1e-11 if compressor == CLTK(0.1) else 0.02 * world
        torch.testing.assert_close(world * got[unit.name] + left, compensated[unit.name], rtol=0, atol=tolerance)
        if unit.name in ("w", "v"):
            assert left.abs().sum() > 0


def test_masked_momentum_follows_too():
    """What is masked is what was sent, not what a follower would have chosen."""
    method = Method("leader", (Rule(CLTK(0.04), MomentumCorrection(0.9), min_ndim=2), Rule(Cast(), Momentum())))
    _, workers, _, _ = journey(method, 2, 1, heads=1)
    for name, k in {"w": 9, "v": 6}.items():
        masked = [worker.local[name].now["momentum"] == 0 for worker in workers]
        assert torch.equal(*masked)
        assert int(masked[0].sum()) == k


def test_what_all_estimate_follows_too():
    """EF21: the shared estimate is the mean of those that the workers keep, whose ``sent`` waited for the leader."""
    modules, param, optimizer = model(6)
    sim = SimulatedWorkers(modules, Method("leader", (Rule(CLTK(0.2), EF21()),)), optimizer, 3)
    torch.manual_seed(1)
    targets = torch.randn(3, 6, 8)
    for _ in range(7):
        sim.step(lambda worker: (param * targets[worker]).sum())
    mean = torch.stack([worker.local["0"].now["estimate"] for worker in sim.session.workers]).mean(0)
    torch.testing.assert_close(sim.session.units[0].shared.now["estimate"], mean)
    assert mean.abs().sum() > 0


def test_one_worker_is_topk():
    for steps in (1, 8):
        selected, one = simulated(scalecom(0.05), 1, steps)[0], simulated(ef14(TopK(0.05)), 1, steps)[0]
        assert torch.equal(selected, one)


def test_bytes_do_not_grow_with_the_world():
    shapes = {"w": (300, 70), "v": (64, 64), "b": (300,)}

    def planned(world):
        return plan_bucket(units_of(scalecom(0.02), world, shapes, torch.float32, "meta"), world)

    few, many = planned(4), planned(16)
    assert [group.stages for group in few.routes] == [group.stages for group in many.routes]
    for bucket, world in ((few, 4), (many, 16)):
        sent, (_, compressed) = (group.wire_bytes(world, bucket.lossy) for group in bucket.routes)
        (_, chosen), (_, summed) = bucket.routes[1].stages
        assert compressed == pytest.approx((world - 1) / world * (chosen + 2 * summed))
        assert bucket.wire_bytes(world)[1] == compressed
        assert sent[1] == 0.0, "biases are sent dense"
    assert (
        simulated(scalecom(0.05), 16, 2)[1].ledger.wire_bytes
        <= simulated(scalecom(0.05), 4, 2)[1].ledger.wire_bytes / 0.8
    )


def test_a_follower_that_is_not_finite_stops_all():
    modules, param, optimizer = model(4)
    sim = SimulatedWorkers(modules, scalecom(0.25), optimizer, 3)
    sim.step(lambda worker: (param * (1.0 + worker)).sum())
    before = param.detach().clone()
    held = [worker.local["0"].now["residual"].clone() for worker in sim.session.workers]
    sim.step(lambda worker: (param * (torch.nan if worker == 2 else 1.0)).sum())  # worker 1 leads
    assert torch.equal(param.detach(), before)
    for worker, residual in zip(sim.session.workers, held, strict=True):
        assert torch.equal(worker.local["0"].now["residual"], residual)
    assert "not finite on some rank" in str(sim.session.ledger.notes)


@pytest.mark.parametrize("compressor", [SIDCo(0.1), BlockTopK(0.1, block=64), TopK(0.1) >> Cast("float16")], ids=str)
def test_any_sparsifier_can_be_led(compressor):
    """Sent and what is left are what was asked, and fewer bytes than dense are sent, with an error."""
    rules = (Rule(compressor, ErrorFeedback(), min_ndim=2), Rule(Cast(), ErrorFeedback()))
    method = Method("led", rules, route="leader")
    assert Method.from_json(method.to_json()) == method
    bucket, workers, asked, got = journey(method, 3, 12, heads=1)
    assert [type(route).__name__ for route in bucket.routes] == ["Whole", "LeaderRoute"]
    for unit in bucket.units:
        left = sum(worker.local[unit.name].now["residual"] for worker in workers)
        tolerance = 0.06 if isinstance(compressor, Chain) else 1e-11
        torch.testing.assert_close(3 * got[unit.name] + left, asked[unit.name], rtol=0, atol=tolerance)
        if unit.name in ("w", "v"):
            assert left.abs().sum() > 0
    ledger = simulated(method, 3, 5)[1].ledger
    assert 0 < ledger.wire_bytes < ledger.dense_bytes
    assert all(row.error > 0 for row in ledger.rows if row.error is not None)
    assert any(row.error is not None for row in ledger.rows)


def test_led_topk_is_cltk():
    rest = Rule(Cast(), ErrorFeedback())
    led = Method("led", (Rule(TopK(0.05), ErrorFeedback(), min_ndim=2), rest), route="leader")
    always = Method("always", (Rule(CLTK(0.05), ErrorFeedback(), min_ndim=2), rest))
    assert torch.equal(simulated(led, 3, 6)[0], simulated(always, 3, 6)[0])


@pytest.mark.parametrize(
    "compressor",
    [Quantize(8), RandK(0.1, scaled=False), DctTopK(), TopK(0.1, "int4"), TopK(0.1) >> Quantize(4), PowerSGD(2)],
    ids=str,
)
def test_what_no_leader_can_select_is_refused(compressor):
    with pytest.raises(ThinwireError, match=f"route 'leader' .* which {re.escape(title(compressor))} does not send"):
        Method("led", (Rule(compressor, ErrorFeedback()),), route="leader")


def test_a_second_stage_that_is_not_there_is_noted():
    method = Method("led", (Rule(TopK(0.1), ErrorFeedback()),), route="leader", second_stage_density_ratio=2.0)
    model = torch.nn.Linear(32, 32, bias=False)
    session = SimulatedWorkers(model, method, torch.optim.SGD(model.parameters(), lr=0.1), 2).session
    assert "second_stage_density_ratio has no effect: route='leader' has one stage" in session.ledger.notes
    session.detach()
