"""Error feedback and its relatives: equalities between them, what they conserve, and real runs."""

import math
from dataclasses import replace
from functools import cached_property

import pytest
import torch

import thinwire
from tests.engines.models import build, simulated, train_ddp
from thinwire import ThinwireError
from thinwire.compressors import TopK
from thinwire.compressors.cast import Cast
from thinwire.core import NOWHERE, Context
from thinwire.core.interfaces import local_state, shared_state
from thinwire.core.memory_capabilities import traits_of
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.exchange.states import TwoCopies
from thinwire.memories import EF21, EControl, ErrorFeedback, MomentumCorrection
from thinwire.methods import econtrol, ef14, ef21, ef21_bc, ef21_pp, ef21_sgdm, ef21_w, theory
from thinwire.methods.method import Method, Rule, Warmup
from thinwire.session.checkpoint import restore, save

WORKERS, D, K = 3, 24, 4
EXACT = {"rtol": 0.0, "atol": 1e-12}
TOP = TopK(K / D)
RECIPES = {
    "ef14": ef14(0.1),
    "ef14-decay": ef14(0.1, decay=0.9),
    "ef21": ef21(0.1, warmup=thinwire.Warmup(1, (1.0,))),
    "ef21_sgdm": ef21_sgdm(0.1),
    "ef21_w": ef21_w(0.1),
    "ef21_pp": ef21_pp(0.1, participation=0.5),
    "ef21_bc": ef21_bc(0.1, 0.3),
    "econtrol": econtrol(0.1),
    "econtrol-two-phase": econtrol(0.1, route="two_phase"),
    "ef21-two-phase": ef21(0.1, route="two_phase"),
}


class Quadratic:
    """Workers that pull towards different points, in float64, with noise; memories and compressor by hand."""

    def __init__(self, memory, compressor=TOP, lr=0.05, noise=0.3):
        self.memory, self.compressor, self.lr, self.noise = memory, compressor, lr, noise
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.randn(WORKERS, D, generator=generator, dtype=torch.float64)
        self.x = torch.zeros(D, dtype=torch.float64)
        self.local = [TwoCopies.of(local_state(memory, self.x)) for _ in range(WORKERS)]
        self.shared = TwoCopies.of(shared_state(memory, self.x))
        self.compensated = torch.zeros_like(self.x)  # sum over steps of lr * mean gradient
        self.step = 0

    def gradient(self, worker):
        generator = torch.Generator().manual_seed(100 * self.step + worker)
        return self.x - self.targets[worker] + self.noise * torch.randn(D, generator=generator, dtype=torch.float64)

    def run(self, steps, look=lambda *_: None):
        xs = []
        for _ in range(steps):
            mean = torch.zeros_like(self.x)
            for i, state in enumerate(self.local):
                ctx, g = Context(0, self.step, "w", i), self.gradient(i)
                self.compensated += self.lr / WORKERS * g
                x = self.memory.compensate(g, self.x, state.now, state.next, ctx=ctx)
                own = self.compressor.decompress(self.compressor.compress(x, {}, ctx), x, {}, ctx)
                before = x.clone()
                self.memory.sent(own, state.next)
                own.add_to(mean, 1.0 / WORKERS)
                look(i, g, before, own, state)
            h = self.memory.receive(mean, self.x, self.shared.now, self.shared.next, Context(0, self.step, "w", 0))
            for state in (*self.local, self.shared):
                state.commit()
            self.x = self.x - self.lr * h
            self.step += 1
            xs.append(self.x)
        return torch.stack(xs)

    def mean(self, key):
        return torch.stack([state.now[key] for state in self.local]).mean(0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (EControl(0.0), EF21()),
        (EF21(1.0), EF21()),
        (EF21(participation=1.0), EF21()),
        (EF21(downlink=Cast()), EF21()),
        (MomentumCorrection(masking=False), ErrorFeedback()),
        (MomentumCorrection(), ErrorFeedback()),
    ],
    ids=["econtrol", "sgdm", "pp", "bc", "dgc", "dgc-masking"],
)
def test_special_cases_are_equal(one, other):
    torch.testing.assert_close(Quadratic(one).run(60), Quadratic(other).run(60), **EXACT)


def test_a_weighted_ef21_is_ef21():
    """EF21-W by its definition, with weights of any size; equal ones give the same bits."""
    for weights, tolerance in ((torch.ones(WORKERS) / WORKERS, 0.0), (torch.tensor([0.2, 0.5, 0.3]), 1e-12)):
        plain, x = Quadratic(EF21()), torch.zeros(D, dtype=torch.float64)
        scale = (weights.double() * WORKERS)[:, None]
        h = torch.zeros(WORKERS, D, dtype=torch.float64)
        weighted = Quadratic(EF21())
        for _ in range(60):
            weighted.x = x
            wanted = torch.stack([weighted.gradient(i) for i in range(WORKERS)]) / scale - h
            for i, row in enumerate(wanted):
                TOP.decompress(TOP.compress(row, {}, NOWHERE), row, {}, NOWHERE).add_to(h[i])
            x = x - 0.05 * (scale * h).mean(0)
            weighted.step += 1
            torch.testing.assert_close(plain.run(1)[0], x, rtol=0.0, atol=max(tolerance, 1e-14))


@pytest.mark.parametrize(
    "memory", [ErrorFeedback(), EF21(), EF21(downlink=TopK(1.0)), EControl(0.0)], ids=["ef14", "ef21", "bc", "econtrol"]
)
def test_without_loss_it_is_sgd(memory):
    run = Quadratic(memory, TopK(1.0))
    run.run(40)
    torch.testing.assert_close(run.x, -run.compensated, **EXACT)


def test_without_loss_sgdm_is_momentum_sgd():
    run, velocity = Quadratic(EF21(0.1), TopK(1.0)), torch.zeros(D, dtype=torch.float64)
    for _ in range(40):
        g = torch.stack([run.gradient(i) for i in range(WORKERS)]).mean(0)
        velocity = 0.9 * velocity + g
        expected = run.x - 0.1 * run.lr * velocity
        torch.testing.assert_close(run.run(1)[0], expected, **EXACT)


@pytest.mark.parametrize("memory", [ErrorFeedback(), EControl(K / D), EControl(0.5 * K / D)], ids=str)
def test_the_virtual_iterate_is_sgd(memory):
    run = Quadratic(memory)
    run.run(80)
    pending = run.mean("residual")
    assert pending.abs().max() > 0
    torch.testing.assert_close(run.x - run.lr * pending, -run.compensated, **EXACT)


@pytest.mark.parametrize(
    "memory", [EF21(), EF21(0.2), EF21(0.5, 0.5), EF21(downlink=TopK(0.3)), EControl(K / D)], ids=str
)
def test_estimates_telescope_and_their_mean_is_shared(memory):
    total = torch.zeros(WORKERS, D, dtype=torch.float64)
    run = Quadratic(memory)
    run.run(80, lambda i, g, x, own, state: own.add_to(total[i]))
    torch.testing.assert_close(torch.stack([s.now["estimate"] for s in run.local]), total, **EXACT)
    torch.testing.assert_close(run.shared.now["estimate"], run.mean("estimate"), **EXACT)


def test_every_step_contracts_and_frozen_parameters_are_reached():
    def contracts(i, g, x, own, state):
        left = (state.next["estimate"] - g).square().sum()
        assert left <= (1 - K / D) * x.square().sum() * (1 + 1e-12)

    Quadratic(EF21()).run(30, contracts)
    still = Quadratic(EF21(), lr=0.0, noise=0.0)
    still.run(math.ceil(D / K))
    torch.testing.assert_close(still.shared.now["estimate"], -still.targets.mean(0), **EXACT)


def test_the_worked_example_of_econtrol():
    memory, g = EControl(0.5), torch.tensor([2.0, 1.0])
    state, sent, errors = TwoCopies.of(local_state(memory, g)), [], []
    for _ in range(3):
        x = memory.compensate(g, g, state.now, state.next)
        payload = TopK(0.5).compress(x, {}, NOWHERE)
        own = TopK(0.5).decompress(payload, x, {}, NOWHERE)
        own.write_to(out := torch.empty(2))
        memory.sent(own, state.next)
        state.commit()
        sent.append(out.tolist())
        errors.append(state.now["residual"].tolist())
    assert sent == [[2.0, 0.0], [0.0, 1.5], [0.0, -0.25]]
    assert errors == [[0.0, 1.0], [0.0, 0.5], [0.0, 0.25]]


def test_who_is_absent_changes_nothing():
    memory = EF21(0.5, participation=0.5)
    coins = [[memory.present(Context(0, step, unit, 1)) for unit in ("a", "b[0:9]")] for step in range(400)]
    assert all(a == b for a, b in coins), "one coin for all parameters"
    assert 150 < sum(a for a, _ in coins) < 250
    seen = set()

    def look(i, g, x, own, state):
        here = memory.present(Context(0, run.step, "w", i))
        seen.add(here)
        if not here:
            assert x.count_nonzero() == 0
            assert all(torch.equal(state.now[key], state.next[key]) for key in state.now)

    run = Quadratic(memory)
    run.run(20, look)
    assert seen == {True, False}


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_filter_keeps_its_share_of_what_was_not_sent(beta):
    """``e_T - e_0 = beta sum (g - c)``, and what is compensated is the residual and the gradient."""
    memory, compressor = ErrorFeedback(beta=beta), TopK(0.2)
    old = local_state(memory, torch.zeros(50, dtype=torch.float64))
    kept = torch.zeros(50, dtype=torch.float64)
    for _ in range(20):
        g = torch.randn(50, dtype=torch.float64)
        new = {"residual": torch.full_like(g, torch.nan)}
        x = memory.compensate(2.0 * g, g, old, new, scale=0.5)
        torch.testing.assert_close(x, old["residual"] + g, rtol=0, atol=1e-12)
        own = compressor.decompress(compressor.compress(x, {}, NOWHERE), x, {}, NOWHERE)
        c = torch.zeros_like(g)
        own.write_to(c)
        memory.sent(own, new)
        kept += beta * (g - c)
        old = new
        torch.testing.assert_close(old["residual"], kept, rtol=0, atol=1e-12)
    assert kept.norm() > 0


def test_decay_shrinks_the_residual():
    memory, g = ErrorFeedback(decay=0.5), torch.tensor([0.0, 1.0])
    assert traits_of(memory).accumulation is None
    new = local_state(memory, g)
    assert memory.compensate(g, g, {"residual": torch.tensor([4.0, 2.0])}, new).tolist() == [2.0, 2.0]


def trained(rank, name):
    parameters, wire = train_ddp(rank, RECIPES[name], 4, sgd={"momentum": 0.0}, kernels="reference")
    local = {unit: state.now for unit, state in wire.workers[0].local.items()}
    shared = {unit.name: unit.shared.now for unit in wire.units}
    wire.detach()
    return parameters, wire.ledger.rows, local, shared


@pytest.mark.parametrize("name", RECIPES)
def test_a_real_run_equals_the_simulated_one(world2, name):
    torch.set_num_threads(1)
    (parameters, rows, local, shared), (others, _, other, _) = world2.run(trained, name)
    expected, result = simulated(RECIPES[name], 2, 4, sgd={"momentum": 0.0})
    assert torch.equal(parameters, others)
    assert torch.equal(parameters, expected)
    assert [row.wire_bytes for row in rows] == [row.wire_bytes for row in result.ledger.rows]
    assert 0 < rows[-1].compressed_wire_bytes < 0.6 * rows[-1].compressed_dense_bytes
    assert (rows[0].error > 0) == (RECIPES[name].warmup is None), "its warm-up is a dense step"
    for unit, state in shared.items():
        for key in state.keys() & local[unit].keys():
            mean = (local[unit][key] + other[unit][key]) / 2
            torch.testing.assert_close(mean, state[key], rtol=1e-5, atol=1e-6)


def start(method, workers=4):
    param = torch.nn.Parameter(torch.zeros(8, 30))
    optimizer = torch.optim.SGD([param], lr=0.1)
    return param, SimulatedWorkers(torch.nn.ParameterList([param]), method, optimizer, workers)


def advance(param, sim, steps):
    targets = torch.randn(len(sim.peers), *param.shape, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        sim.step(lambda worker: (param - targets[worker]).square().sum() / 2)


def states_of(sim):
    return [worker.local["0"].now for worker in sim.session.workers], sim.session.units[0].shared.now


def saved_of(sim, step):
    """The checkpoint of each worker."""
    session = sim.session
    clock = {"world": len(session.workers), "step": step, "installed_at": 0}
    method = session.method.to_json()
    return [save(session.units, w, lambda t, like=None: t.unsqueeze(0), clock, method) for w in session.workers]


def assert_mirrored(sim):
    local, shared = states_of(sim)
    torch.testing.assert_close(torch.stack([s["estimate"] for s in local]).mean(0), shared["estimate"])
    assert shared["estimate"].abs().max() > 0


@pytest.mark.parametrize("name", ["ef21_sgdm", "econtrol", "ef21_bc"])
@pytest.mark.parametrize("way", ["fold", "reset"])
def test_another_world_size_keeps_what_is_shared(name, way):
    param, sim = start(RECIPES[name])
    advance(param, sim, 12)
    unit = sim.session.units[0]
    saved = saved_of(sim, 12)
    param, small = start(RECIPES[name], 2)
    restored = restore(saved, small.session.units, 0, 2, way)
    local, shared = restored.local["0"], restored.shared["0"]
    torch.testing.assert_close(local["estimate"], shared["estimate"])
    assert torch.equal(shared["estimate"], unit.shared.now["estimate"])
    if "residual" in local:
        assert (local["residual"].abs().max() > 0) == (way == "fold")
    # under a method that mirrors nothing, and from one
    _, other = start(ef14(0.1), 2)
    found = restore(saved, other.session.units, 0, 2, way)
    assert found.shared["0"] == {}
    assert set(found.local["0"]) == {"residual"}
    assert any("estimate has no place" in note for note in found.notes)


def test_a_checkpoint_that_lost_one_half_of_the_estimates_loses_the_other():
    param, sim = start(ef21(0.1), 1)
    advance(param, sim, 5)
    saved = saved_of(sim, 5)[0]
    whole = restore(saved, sim.session.units, 0, 1, "error")
    assert torch.equal(whole.shared["0"]["estimate"], whole.local["0"]["estimate"])
    assert whole.notes == []
    saved["shared"]["0"] = {}
    saved["version"] = 1  # else a checksum would tell
    del saved["checks"]
    half = restore(saved, sim.session.units, 0, 1, "error")
    assert half.local["0"]["estimate"].count_nonzero() == 0
    assert any("estimate has no place" in note for note in half.notes)


def test_a_checkpoint_of_another_method_takes_no_residual_for_a_difference():
    param, sim = start(ef14(0.1), 1)
    advance(param, sim, 5)
    saved = saved_of(sim, 5)[0]
    found = restore(saved, start(ef21(0.1), 1)[1].session.units, 0, 1, "error")
    assert found.local["0"]["estimate"].count_nonzero() == found.shared["0"]["estimate"].count_nonzero() == 0
    assert any("residual has no place in the present method and was dropped" in note for note in found.notes)


def test_an_average_begins_with_the_estimate_of_a_checkpoint():
    param, sim = start(ef21(0.1), 1)
    advance(param, sim, 5)
    saved = saved_of(sim, 5)[0]
    found = restore(saved, start(ef21_sgdm(0.1), 1)[1].session.units, 0, 1, "error")
    assert found.local["0"]["average"].abs().max() > 0
    assert torch.equal(found.local["0"]["average"], found.local["0"]["estimate"])
    assert not any("average" in note for note in found.notes)


def test_change_in_mid_run_keeps_estimates_or_drops_both():
    param, sim = start(ef21(0.1))
    advance(param, sim, 6)
    for method in (ef21_sgdm(0.1), econtrol(0.1), ef21_bc(0.1, 0.5)):
        sim.session.set_method(method)
        assert_mirrored(sim)
        for state in states_of(sim)[0]:  # an average continues where the gradients are believed to be
            assert torch.equal(state.get("average", state["estimate"]), state["estimate"])
        advance(param, sim, 3)
        assert_mirrored(sim)
    sim.session.set_method(ef14(0.1))
    assert [set(state) for state in states_of(sim)[0]] == [{"residual"}] * 4
    assert states_of(sim)[1] == {}
    advance(param, sim, 3)


def test_a_residual_that_meets_differences_is_delivered_once():
    param, sim = start(ef14(0.1))
    advance(param, sim, 5)
    pending = torch.stack([state["residual"] for state in states_of(sim)[0]]).mean(0)
    assert pending.abs().max() > 0
    sim.session.set_method(ef21(0.1))
    before = param.detach().clone()
    advance(param, sim, 1)
    sent = (before - param.detach()) / 0.1
    torch.testing.assert_close(sent - states_of(sim)[1]["estimate"], pending)
    assert "pending_residual" not in states_of(sim)[1]
    assert_mirrored(sim)


@pytest.mark.parametrize(
    "before",
    [ef14(0.1), ef14(thinwire.compressors.Sign()), thinwire.powersgd(1, min_compression_rate=0)],
    ids=["topk", "sign", "powersgd"],
)
def test_a_residual_that_meets_voters_counts_once(before):
    param, sim = start(before)
    advance(param, sim, 5)
    assert all(state["residual"].abs().max() > 0 for state in states_of(sim)[0])
    sim.session.set_method(thinwire.signsgd(0.5))
    now = param.detach().clone()
    advance(param, sim, 1)
    targets = torch.randn(4, *param.shape, generator=torch.Generator().manual_seed(2))
    for state, target in zip(states_of(sim)[0], targets, strict=True):
        assert set(state) == {"momentum"}
        torch.testing.assert_close(state["momentum"], 0.5 * (now - target))


def test_ranks_that_change_method_together_deliver_the_residual(world2):
    for kept, left in world2.run(_switch):
        assert kept
        assert left


def _switch(rank):
    from torch.nn.parallel import DistributedDataParallel

    from tests.engines.models import batch, loss_of

    model, optimizer = build(momentum=0.0)
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, ef14(0.1), optimizer=optimizer, kernels="reference")
    for step, method in enumerate([None, ef21(0.1), None]):
        if method is not None:
            wire.set_method(method)
            kept = all("pending_residual" in u.shared.now for u in wire.units if u.compressed)
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    left = not any("pending_residual" in u.shared.now for u in wire.units)
    wire.detach()
    return kept, left


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EF21(0.0), r"eta is 0.0.*\(0, 1\]"),
        (lambda: EF21(float("nan")), "eta is nan"),
        (lambda: EF21(participation=1.5), "participation is 1.5"),
        (lambda: EControl(-0.1), r"eta is -0.1.*\[0, 1\]"),
        (lambda: EControl(2.0), "eta is 2.0"),
        (lambda: ErrorFeedback(decay=0.0), "decay is 0.0"),
        (lambda: thinwire.scalecom(0.1, beta=1.5), "beta is 1.5"),
        (lambda: ef21(1.5), "density is 1.5"),
        (lambda: ef21_bc(0.1, Growing()), "Growing may lose more"),
        (lambda: ef21(Growing()), "Growing may lose more"),
        (lambda: econtrol(Growing(None)), "give econtrol an eta"),
        (lambda: theory.xi(0.0), "alpha is 0.0"),
        (lambda: theory.ef21_step(0.0, [1.0], 0.1), "must be above 0"),
        (lambda: theory.ef21_step(1.0, [1.0], 0.1, "harmonic"), "mean is 'harmonic'"),
        (lambda: theory.ef21_pp_step(1.0, [1.0], 0.1, 0.0), "participation is 0.0"),
        (lambda: theory.logistic_smoothness(torch.ones(0, 3)), "at least one example"),
    ],
)
def test_out_of_range(make, message):
    with pytest.raises(ThinwireError, match=message):
        make()


class Growing(Cast):
    """Says that it may lose more than it is given, or that nothing is known."""

    def __init__(self, alpha=0.0):
        super().__init__()
        object.__setattr__(self, "alpha", alpha)

    @cached_property
    def traits(self):
        return replace(super().traits, contraction=lambda n: self.alpha)


def test_an_unknown_option_is_an_error():
    with pytest.raises(ThinwireError, match=r"ef21 has no option colour=.*all recipes take warmup"):
        ef21(0.1, colour="red")
    kept = ef21(0.1, keep_dense=["*.bias"], clip=1.0)
    assert (kept.clip, kept.rules[0].match) == (1.0, "*.bias")
    assert Method.from_json(ef21_bc(0.1, 0.5).to_json()) == ef21_bc(0.1, 0.5)


def test_steps_of_the_theory():
    each = [1.0, 2.0, 3.0]
    assert theory.xi(1e-6) == pytest.approx(2e6, rel=1e-2)
    assert theory.ef21_step(2.0, each, 1.0) == 0.5
    assert theory.ef21_step(2.0, each, 0.01, "arithmetic") > theory.ef21_step(2.0, each, 0.01)
    for alpha in (1e-6, 1e-3, 0.5, 1.0):
        found = [theory.ef21_pp_step(2.0, each, alpha, p) for p in (0.1, 0.5, 1.0)]
        assert 0 < found[0] < found[1] < found[2] < math.inf
    a, r = torch.randn(50, 7, dtype=torch.float64), 0.1
    x = torch.zeros(7, dtype=torch.float64)

    def loss(x):
        return (1 + torch.exp(-(a @ x))).log().mean() + r * (x * x / (1 + x * x)).sum()

    hessian = torch.autograd.functional.hessian(loss, x)
    assert torch.linalg.eigvalsh(hessian)[-1].item() == pytest.approx(theory.logistic_smoothness(a, r))


def of_matrices(compressor, memory):
    return Method("x", (Rule(compressor, memory, min_ndim=2), Rule(Cast(), thinwire.memories.NoMemory())))


def whole_and_small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 3))


def small_run(model, method, steps=4, workers=2, momentum=0.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
    sim = SimulatedWorkers(model, method, optimizer, workers)
    for _ in range(steps):
        xs = torch.randn(workers, 4, 12)
        sim.step(lambda worker, xs=xs: model(xs[worker]).square().mean())
    return sim


@pytest.mark.parametrize(
    ("method", "momentum"),
    [
        (thinwire.methods.ef21_pp(thinwire.compressors.PowerSGD(2), participation=0.5), 0.0),
        (thinwire.ef21(thinwire.compressors.PowerSGD(4)), 0.0),  # the last matrix has 3 rows, and is sent whole
        (
            Method(
                "x",
                (
                    Rule(thinwire.compressors.PowerSGD(4), MomentumCorrection(), min_ndim=2),
                    Rule(Cast(), thinwire.memories.Momentum()),
                ),
            ),
            0.9,
        ),
        (Method("x", (Rule(TopK(0.2), EF21(participation=0.5, downlink=TopK(0.5))),)), 0.0),
        (thinwire.scalecom(0.1, beta=0.5, state_dtype="bfloat16"), 0.0),
    ],
    ids=["absent-powersgd", "whole", "whole-momentum", "absent-downlink", "filter-bfloat16"],
)
def test_memories_beside_other_shared_state(method, momentum):
    sim = small_run(whole_and_small(), method, momentum=momentum)
    rows = sim.session.ledger.rows
    assert len(rows) == 4
    assert sim.session.ledger.skipped == 0
    assert all(torch.isfinite(unit.param).all() for unit in sim.session.units)
    assert rows[-1].wire_bytes < rows[-1].dense_bytes
    assert rows[0].error > 0


def test_a_carried_residual_passes_to_a_filter_and_to_who_is_absent():
    model = whole_and_small()
    sim = small_run(model, thinwire.topk(0.1))
    pending = sim.session.workers[0].local["0.weight"].now["residual"].clone()
    sim.session.set_method(thinwire.dense())
    assert torch.equal(sim.session.workers[0].local["0.weight"].now["pending_residual"], pending)
    sim.session.set_method(of_matrices(TopK(0.1), ErrorFeedback(beta=0.1)))
    now = sim.session.workers[0].local["0.weight"].now
    assert torch.equal(now["residual"], pending)
    assert "pending_residual" not in now
    sim.session.set_method(thinwire.methods.ef21_pp(TopK(0.1), participation=0.5))
    for _ in range(4):
        sim.step(lambda worker: model(torch.ones(4, 12)).square().mean())


def test_what_is_dropped_at_detach_is_said_of_what_was_carried_too():
    sim = small_run(whole_and_small(), thinwire.topk(0.1))
    sim.session.set_method(thinwire.dense())
    sim.session.detach()
    assert any("discarded the gradient that was not sent yet" in note for note in sim.session.ledger.notes)


def test_a_warm_up_of_density_one_is_dense_whatever_codes_the_values():
    sim = small_run(whole_and_small(), thinwire.topk(0.1, values="int4", warmup=Warmup(2, (1.0,))), steps=2)
    assert sim.session.ledger.rows[0].error == 0
    assert sim.session.workers[0].local["0.weight"].now["residual"].abs().max() == 0
    sim = small_run(whole_and_small(), thinwire.topk(0.1, values="int4"), steps=2)
    assert sim.session.ledger.rows[0].error > 0


@pytest.mark.parametrize(
    "compressor",
    [TopK(0.1), thinwire.compressors.PowerSGD(2), thinwire.compressors.CLTK(0.1), thinwire.compressors.Sign()],
    ids=str,
)
@pytest.mark.parametrize("memory", [thinwire.memories.Momentum(0.9), thinwire.memories.MajorityVote()], ids=str)
def test_a_biased_compressor_needs_a_memory_that_feeds_back(compressor, memory):
    with pytest.raises(ThinwireError, match="is biased, and"):
        Rule(compressor, memory)


def test_what_counts_what_it_sent_is_not_summed_in_few_bits():
    rounded = thinwire.compressors.RandK(0.1, scaled=False) >> thinwire.compressors.Cast("bfloat16")
    with pytest.raises(ThinwireError, match="EF21 never makes good what a sum in"):
        small_run(whole_and_small(), thinwire.ef21(rounded))
    small_run(whole_and_small(), thinwire.methods.ef14(rounded))
    thinwire.methods.ef14(TopK(0.01) >> thinwire.compressors.Quantize(4))
    with pytest.raises(ThinwireError, match="use more bits, smaller blocks"):
        thinwire.methods.ef14(TopK(0.01) >> thinwire.compressors.Quantize(4, 512))
