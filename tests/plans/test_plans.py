"""Random plans on real processes; ``python -m tests.plans`` runs more of them."""

from dataclasses import replace

import pytest
import torch

from tests.plans import laws, methods
from tests.plans.fleet import Fleet
from tests.plans.generator import draw
from tests.plans.packing import pack, unpack
from tests.plans.plan import Layer, Plan

PLANS, TOGETHER = 200, 20
MOST_REFUSED = 0.15


@pytest.fixture(scope="module")
def fleet(world2, world4):
    fleet = Fleet({2: world2, 4: world4})
    yield fleet
    fleet.stop(world2, world4)


@pytest.mark.parametrize("first", range(0, PLANS, TOGETHER))
def test_every_law_holds(fleet, first):
    outcomes = [fleet.run(draw(seed)) for seed in range(first, first + TOGETHER)]
    for one in outcomes:
        assert not one.faults, f"python -m tests.plans --only {one.plan.seed}: {one.faults}\n{one.plan.to_json()}"
    assert sum(bool(one.refused) for one in outcomes) <= 2 * MOST_REFUSED * TOGETHER


def test_a_plan_follows_from_its_seed_and_goes_to_json():
    for seed in range(300):
        plan = draw(seed)
        assert Plan.from_json(plan.to_json()) == plan == draw(seed)
    assert len({draw(seed).to_json() for seed in range(300)}) == 300


def test_plans_have_all_there_is_to_draw():
    """So that no narrowing goes unseen."""
    plans = [draw(seed) for seed in range(PLANS)]
    assert {plan.world for plan in plans} == {2, 3, 4, 5}
    assert {plan.engine for plan in plans} == {"ddp", "bare", "fsdp2"}
    recipes = {spec["recipe"] for plan in plans for spec in (plan.method, plan.then) if spec}
    assert recipes == {*methods.RECIPES, *methods.LINKED}
    layers = [layer for plan in plans for layer in plan.layers]
    assert {"embedding", "empty", "scalar", "tied", "turned", "conv2d", "conv3d", "one"} <= {one.kind for one in layers}
    assert {"never", "even ranks", "last rank", "even steps", "last part", "zero"} <= {one.used for one in layers}
    assert {one.dtype for one in layers} == {"float16", "bfloat16", "float32", "float64"}
    assert any(one.frozen for one in layers)
    assert any(one.channels_last for one in layers)
    assert any(one.sparse for one in layers)
    assert any(len({layer.dtype for layer in plan.layers}) > 2 for plan in plans)


PLAIN = Plan(
    0, "bare", 2, (Layer("linear", "float32", (24, 16)), Layer("scalar", "float32", ())),
    methods.recipe("topk", 0.1), {"kind": "SGD", "options": {"lr": 0.05, "momentum": 0.9}, "groups": 1},
    steps=3, checkpoint=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def reports(world2, tmp_path_factory):
    from tests.plans.running import run

    return pack([unpack(one) for one in world2.run(run, PLAIN.to_json(), str(tmp_path_factory.mktemp("plan")))])


def test_laws_hold_of_a_plain_plan(reports):
    outcome = laws.judge(PLAIN, unpack(reports))
    assert outcome.faults == []
    assert {"replicas", "conserved", "void", "simulated", "resumed", "bytes_count", "quiet"} <= set(outcome.held)


def _weight(reports, rank=1):
    return reports[rank].steps[1]


BREAKS = {
    "replicas": lambda reports: _weight(reports).digests.update({"layers.0.weight: itself": "another"}),
    "conserved": lambda reports: _weight(reports).after["layers.0.weight"]["residual"].mul_(1.01),
    "simulated": lambda reports: reports[0].steps[1].params_after["layers.0.weight"].add_(1e-7),
    "resumed": lambda reports: reports[1].resumed["layers.0.weight"].mul_(1.0 + 1e-6),
    "bytes_count": lambda reports: setattr(_weight(reports), "counted", 1.0),
    "void": lambda reports: setattr(_weight(reports), "skipped", True),
    "quiet": lambda reports: reports[0].warned.append("something"),
    "given_back": lambda reports: reports[0].left[0].update(momentum=0.0),
}


@pytest.mark.parametrize("law", BREAKS)
def test_laws_have_teeth(reports, law):
    found = unpack(reports)
    BREAKS[law](found)
    assert law in {said.split(":")[0] for said in laws.judge(PLAIN, found).faults}


def test_what_is_refused_or_raised_by_some_ranks_alone_is_a_fault(reports):
    found = unpack(reports)
    found[1].refused = "no"
    assert "all ranks or none" in laws.judge(PLAIN, found).faults[0]
    found[0].refused = "no"
    assert laws.judge(PLAIN, found).refused == "no"
    found[1].raised = "Traceback"
    assert "no other error" in laws.judge(PLAIN, found).faults[0]


def test_tensors_are_packed_as_they_are():
    for x in (torch.randn(3, 4).t(), torch.zeros(0, 2), torch.tensor(1.5, dtype=torch.bfloat16), torch.arange(3)):
        again = unpack(pack(x))
        assert torch.equal(x, again)
        assert x.dtype == again.dtype
    assert unpack(pack(replace(PLAIN, seed=1))).seed == 1
