"""Optimizers that are part of a method: 1-bit Adam, 0/1 Adam, 1-bit LAMB."""

import copy
import io

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import Net, batch, flat_parameters, loss_of
from thinwire import ThinwireError
from thinwire.compressors.cast import Cast
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.memories.compressed_momentum import CompressedMomentum
from thinwire.optim.onebit_adam import is_refresh
from thinwire.session import checkpoint

KW = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.01}
MAKE = {
    "onebit_adam": (thinwire.onebit_adam, thinwire.optim.OneBitAdam, {"freeze_step": 3}),
    "onebit_lamb": (thinwire.methods.onebit_lamb, thinwire.optim.OneBitLamb, {"freeze_step": 3}),
    "zeroone_adam": (thinwire.zeroone_adam, thinwire.optim.ZeroOneAdam, {"refreshes": 2}),
}


def build(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Net().to(dtype)
    method, kind, own = MAKE[name]
    return model, method(), kind(model.parameters(), **KW, **{**own, **options})


def simulator(name, workers=2, **options):
    model, method, optimizer = build(name, **options)
    return model, SimulatedWorkers(model, method, optimizer, workers)


def advance(model, sim, first, last):
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        sim.step(lambda worker, step=step: loss_of(model, batch(worker, step).to(dtype)))


@pytest.mark.parametrize("name", list(MAKE))
def test_simulator_is_the_real_run(world2, name):
    model, sim = simulator(name)
    advance(model, sim, 0, 7)
    rows = sim.session.ledger.rows
    late = [row for row in rows if row.wire_bytes < 0.2 * row.dense_bytes]
    assert len(late) >= 2
    assert rows[0].wire_bytes >= rows[0].dense_bytes
    for parameters, momenta in world2.run(_real, name, 7):
        assert torch.equal(parameters, flat_parameters(model))
        for unit in sim.session.units:
            for key, value in unit.shared.now.items():
                assert torch.equal(momenta[unit.name][key], value)
    residuals = [worker.local["middle.weight"].now["residual"] for worker in sim.session.workers]
    assert all(residual.norm() > 0 for residual in residuals)
    assert not torch.equal(*residuals)


def _real(rank, name, steps):
    model, method, optimizer = build(name)
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, method, optimizer=optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    return flat_parameters(model), {unit.name: dict(unit.shared.now) for unit in wire.units}


@pytest.mark.parametrize("name", ["onebit_adam", "zeroone_adam"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_always_dense_is_adamw(name, dtype, tolerance):
    never = {"freeze_step": None} if name == "onebit_adam" else {"refreshes": 100}
    model, sim = simulator(name, dtype=dtype, **never)
    advance(model, sim, 0, 10)
    torch.manual_seed(0)
    plain = Net().to(dtype)
    other = SimulatedWorkers(plain, thinwire.dense(), torch.optim.AdamW(plain.parameters(), **KW), 2)
    advance(plain, other, 0, 10)
    torch.testing.assert_close(flat_parameters(model), flat_parameters(plain), rtol=tolerance, atol=tolerance)


def test_laws_after_the_switch():
    """Conservation over both compressions, a constant variance, and at one worker too."""
    for workers in (1, 3):
        model, sim = simulator("onebit_adam", workers, dtype=torch.float64)
        advance(model, sim, 0, 3)
        v = {p: s["exp_avg_sq"].clone() for p, s in sim.optimizer.state.items()}
        unit = next(u for u in sim.session.units if u.name == "middle.weight")

        def pending(unit=unit, sim=sim):
            return torch.stack([w.local[unit.name].now["residual"] for w in sim.session.workers]).mean(0)

        for step in range(3, 7):
            m, e, grads = unit.shared.now["momentum"].clone(), pending(), []

            def loss(worker, step=step, grads=grads, model=model, unit=unit):
                value = loss_of(model, batch(worker, step).double())
                grads.append(torch.autograd.grad(value, unit.param, retain_graph=True)[0])
                return value

            sim.step(loss)
            compensated = 0.9 * m + 0.1 * torch.stack(grads).mean(0) + e
            torch.testing.assert_close(unit.shared.now["momentum"] + pending(), compensated, rtol=1e-12, atol=1e-12)
            assert pending().norm() > 0, "one bit loses something, with one worker too"
        assert all(torch.equal(v[p], s["exp_avg_sq"]) for p, s in sim.optimizer.state.items())
        assert "exp_avg" not in sim.optimizer.state[unit.param]


def lossless(name):
    return thinwire.Method(name, (thinwire.Rule(Cast(), CompressedMomentum()),))


def test_without_compression_it_is_preconditioned_momentum_sgd():
    param = torch.nn.Parameter(torch.ones(40, dtype=torch.float64))
    optimizer = thinwire.optim.OneBitAdam([param], lr=0.1, freeze_step=2)
    sim = SimulatedWorkers(torch.nn.ParameterList([param]), lossless("x"), optimizer, 2)
    scale, m = torch.linspace(0.5, 2.0, 40, dtype=torch.float64), 0.0
    for step in range(6):
        before = param.detach().clone()
        sim.step(lambda worker, step=step: (param * scale * (1 + worker + step)).sum())
        m = 0.9 * m + 0.1 * scale * (1.5 + step)
        if step >= 2:
            v = optimizer.state[param]["exp_avg_sq"] / (1 - 0.999**2)
            torch.testing.assert_close(param.detach(), before - 0.1 * m / (v.sqrt() + 1e-8), rtol=1e-12, atol=1e-12)


def test_lamb_follows_the_fresh_variance_slowly():
    param = torch.nn.Parameter(torch.ones(40, dtype=torch.float64))
    optimizer = thinwire.optim.OneBitLamb([param], lr=0.1, betas=(0.9, 0.9), freeze_step=3)
    sim = SimulatedWorkers(torch.nn.ParameterList([param]), lossless("x"), optimizer, 2)
    last = 1.0
    for step in range(12):
        sim.step(lambda worker, step=step: (param * (1 + worker) * 0.5**step).sum())
        state = optimizer.state[param]
        if step >= 3:
            now = float(state["factor"])
            assert 0.9 * last - 1e-12 <= now <= 1.1 * last + 1e-12
            last = now
    assert last > 1.5, "gradients have become smaller"
    assert float(state["coeff"]) > 0


def test_lamb_recovers_the_gradient_from_the_momentum(monkeypatch):
    kind = thinwire.optim.OneBitLamb
    param = torch.nn.Parameter(torch.ones(40, dtype=torch.float64))
    optimizer = kind([param], lr=0.1, freeze_step=2)
    found, recovered = [], kind.recovered
    monkeypatch.setattr(kind, "recovered", lambda *args: found.append(recovered(*args)) or found[-1])
    sim = SimulatedWorkers(torch.nn.ParameterList([param]), lossless("x"), optimizer, 2)
    for _ in range(6):
        scales = torch.randn(2, 40, dtype=torch.float64)
        sim.step(lambda worker, scales=scales: (param * scales[worker]).sum())
        torch.testing.assert_close(found[-1], scales.mean(0), rtol=0, atol=1e-12)
    assert len(found) == 6


def _overflows(rank):
    """Under a loss scaler, with one step whose loss overflows on rank 1 alone."""
    model, method, optimizer = build("onebit_adam")
    ddp, scaler = DistributedDataParallel(model), torch.amp.GradScaler("cpu", init_scale=2.0**14)
    wire = thinwire.attach(ddp, method, optimizer=optimizer, scaler=scaler)
    moved = []
    for step in range(8):
        before = flat_parameters(model).clone()
        loss = loss_of(ddp, batch(rank, step)) * (float("inf") if step == 5 and rank == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not torch.equal(before, flat_parameters(model)))
    row = wire.ledger.rows[-1]
    return flat_parameters(model), moved, optimizer.steps, row.wire_bytes / row.dense_bytes, scaler.get_scale()


def test_an_overflow_under_a_scaler_skips_on_all_ranks(world2):
    results = world2.run(_overflows)
    for parameters, moved, steps, share, scale in results:
        assert torch.equal(parameters, results[0][0])
        assert torch.isfinite(parameters).all()
        assert moved == [step != 5 for step in range(8)]
        assert (steps, scale) == (7, 2.0**13)
        assert 0 < share < 0.2


def test_a_variance_of_zero_is_left_out():
    param = torch.nn.Parameter(torch.ones(20, 10))
    optimizer = thinwire.optim.OneBitAdam([param], lr=0.1, freeze_step=2)
    sim = SimulatedWorkers(torch.nn.ParameterList([param]), thinwire.onebit_adam(), optimizer, 2)
    for step in range(6):  # rows from 5 on have no gradient until the variance is frozen
        rows = 5 if step < 2 else 20
        sim.step(lambda worker, rows=rows: (param[:rows] * torch.randn(rows, 10)).sum())
    assert torch.equal(param.detach()[5:], torch.ones(15, 10))
    assert (param.detach()[:5] != 1.0).all()
    unit = sim.session.units[0]
    assert unit.shared.now["momentum"][5:].count_nonzero() == 0
    assert all(w.local["0"].now["residual"][5:].count_nonzero() == 0 for w in sim.session.workers)
    assert any("150 elements whose variance is 0" in note for note in sim.session.ledger.notes)


def _auto(rank):
    torch.manual_seed(0)
    model = Net()
    optimizer = thinwire.optim.OneBitAdam(model.parameters(), lr=1e-6, betas=(0.9, 0.8), freeze_step="auto")
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, thinwire.onebit_adam(), optimizer=optimizer)
    for step in range(60):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step % 5)).backward()
        optimizer.step()
    return optimizer.param_groups[0]["frozen_at"], [n for n in wire.ledger.notes if "frozen" in n]


def test_the_ratio_test_freezes_all_ranks_at_once(world2):
    answers = world2.run(_auto)
    assert answers[0] == answers[1]
    assert answers[0][0] % 5 == 0
    assert len(answers[0][1]) == 1


def _resume(rank, name, folder):
    def begin():
        model, method, optimizer = build(name)
        ddp = DistributedDataParallel(model)
        return model, optimizer, ddp, thinwire.attach(ddp, method, optimizer=optimizer)

    def go(ddp, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            optimizer.step()

    found = []
    for at in (2, 5):  # before the variance is frozen, and after
        model, optimizer, ddp, wire = begin()
        go(ddp, optimizer, range(at))
        torch.distributed.checkpoint.save({"wire": wire}, checkpoint_id=f"{folder}/{name}{at}")
        kept = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), wire.state_dict()], kept)
        go(ddp, optimizer, range(at, 8))
        for how in ("torch", "dcp"):
            again, other, wrapped, new = begin()
            kept.seek(0)
            weights, own, state = torch.load(kept, weights_only=False)
            again.load_state_dict(weights)
            if how == "torch":
                new.load_state_dict(state)
                other.load_state_dict(own)
            else:
                other.load_state_dict(own)
                new.load(f"{folder}/{name}{at}")
            go(wrapped, other, range(at, 8))
            found.append(torch.equal(flat_parameters(again), flat_parameters(model)))
    return found


@pytest.mark.parametrize("name", list(MAKE))
def test_resume_is_bit_exact(world2, tmp_path, name):
    assert world2.run(_resume, name, str(tmp_path)) == [[True] * 4] * 2


def test_another_world_size_keeps_what_is_pending():
    model, sim = simulator("onebit_adam")
    advance(model, sim, 0, 5)
    clock = {"world": 2, "step": 5, "installed_at": 0}
    session = sim.session
    states = [
        checkpoint.save(session.units, worker, lambda t, like=None: t.unsqueeze(0), clock, session.method.to_json())
        for worker in session.workers
    ]
    restored = checkpoint.restore(states, session.units, 0, 1, "fold")
    for unit in session.units:
        rows = torch.stack([worker.local[unit.name].now["residual"] for worker in session.workers])
        torch.testing.assert_close(restored.local[unit.name]["residual"], rows.mean(0))
        assert torch.equal(restored.shared[unit.name]["momentum"], unit.shared.now["momentum"])


def test_a_gradient_that_is_not_finite_changes_nothing():
    for at in (1, 5):
        model, sim = simulator("onebit_adam")
        advance(model, sim, 0, at)
        before = flat_parameters(model).clone()
        kept = [
            *(u.shared.now["momentum"].clone() for u in sim.session.units),
            *(w.local[u.name].now["residual"].clone() for w in sim.session.workers for u in sim.session.units),
            *(s["exp_avg_sq"].clone() for s in sim.optimizer.state.values()),
        ]
        sim.step(lambda worker, at=at, model=model: loss_of(model, batch(worker, at)) * (float("inf") if worker else 1))
        now = [
            *(u.shared.now["momentum"] for u in sim.session.units),
            *(w.local[u.name].now["residual"] for w in sim.session.workers for u in sim.session.units),
            *(s["exp_avg_sq"] for s in sim.optimizer.state.values()),
        ]
        assert all(map(torch.equal, kept, now))
        assert torch.equal(before, flat_parameters(model))
        assert sim.optimizer.steps == sim.session.step == at


def test_bytes_after_the_switch():
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(2)))
    optimizer = thinwire.optim.OneBitAdam(model.parameters(), freeze_step=1)
    result = thinwire.simulate(
        model, thinwire.onebit_adam(), optimizer=optimizer, workers=8, steps=3,
        batches=lambda worker, step: torch.randn(2, 256), loss=lambda model, x: model(x).square().mean(),
    )  # fmt: skip
    assert result.ledger.rows[-1].wire_bytes <= result.ledger.rows[-1].dense_bytes / 16


def test_gaps_double():
    assert [t for t in range(30) if is_refresh(t, 2)] == [0, 1, 2, 4, 6, 10, 14, 22]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("OneBitAdam", {"freeze_step": 0}), ("OneBitAdam", {"freeze_step": "soon"}), ("OneBitAdam", {"lr": -1.0}),
        ("OneBitAdam", {"betas": (1.0, 0.9)}), ("OneBitAdam", {"eps": 0.0}), ("OneBitAdam", {"weight_decay": -1.0}),
        ("ZeroOneAdam", {"refreshes": 0}), ("ZeroOneAdam", {"freeze_step": 0}), ("OneBitLamb", {"coeff": (2.0, 1.0)}),
        ("OneBitLamb", {"coeff_beta": 1.0}), ("OneBitLamb", {"factor": (0.0, 1.0)}),
        ("OneBitLamb", {"factor_change": 0.0}),
    ],
)  # fmt: skip
def test_bad_hyper_parameters(kind, options):
    with pytest.raises(ThinwireError, match=f"{next(iter(options))}.* (is|are) "):
        getattr(thinwire.optim, kind)([torch.nn.Parameter(torch.ones(2))], **options)


def test_the_wrong_optimizer_or_method():
    with pytest.raises(ThinwireError, match=r"beta1 is 1\.0"):
        thinwire.memories.CompressedMomentum(1.0)
    model = torch.nn.Linear(4, 4)
    with pytest.raises(
        ThinwireError, match="onebit_adam hands the optimizer its momentum, and AdamW steps with its gr"
    ):
        SimulatedWorkers(model, thinwire.onebit_adam(), torch.optim.AdamW(model.parameters()), 2)
    optimizer = thinwire.optim.OneBitAdam(model.parameters())
    with pytest.raises(ThinwireError, match=r"OneBitAdam steps with its momentum; attach thinwire\.onebit_adam"):
        SimulatedWorkers(model, thinwire.topk(0.1), optimizer, 2)
    with pytest.raises(ThinwireError, match="nothing is attached"):
        optimizer.step()
    sim = SimulatedWorkers(model, thinwire.onebit_adam(), optimizer, 2)
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    with pytest.raises(ThinwireError, match="beta1 of OneBitAdam was changed"):
        sim.step(lambda worker: model(torch.ones(1, 4)).sum())


@pytest.mark.parametrize("name", list(MAKE))
def test_states_keep_their_dtype_in_a_checkpoint(name):
    model, sim = simulator(name, dtype=torch.bfloat16)
    advance(model, sim, 0, 5)
    saved = copy.deepcopy(sim.optimizer.state_dict())
    _, _, other = build(name, dtype=torch.bfloat16)
    other.load_state_dict(saved)
    for group, loaded in zip(sim.optimizer.param_groups, other.param_groups, strict=True):
        for p, q in zip(group["params"], loaded["params"], strict=True):
            for key, value in sim.optimizer.state[p].items():
                assert not isinstance(value, torch.Tensor) or (
                    torch.equal(value, other.state[q][key]) and value.dtype == other.state[q][key].dtype
                )
    assert any(s["exp_avg_sq"].dtype == torch.float32 for s in other.state.values())


def test_momentum_outlives_a_detach():
    param = torch.nn.Parameter(torch.ones(40, dtype=torch.float64))
    optimizer = thinwire.optim.OneBitAdam([param], lr=0.1, freeze_step=100)
    model, scale = torch.nn.ParameterList([param]), torch.rand(40, dtype=torch.float64)
    for attached in range(2):
        sim = SimulatedWorkers(model, lossless("x"), optimizer, 2)
        for step in range(3):
            sim.step(lambda worker, step=step: (param * scale * (1 + worker + step)).sum())
        v = optimizer.state[param]["exp_avg_sq"].clone()
        sim.session.detach()
        assert optimizer.state[param]["exp_avg"].abs().max() > 0
        bound = 0.001 * sum((scale * (1.5 + step)) ** 2 for _ in range(attached + 1) for step in range(3))
        assert (v <= bound * (1 + 1e-9)).all(), "no gradient is larger than it was"
    assert not torch.equal(param.detach(), torch.ones_like(param))


def test_a_layer_without_a_gradient_so_far_is_named_at_the_freeze():
    used, later = torch.nn.Parameter(torch.ones(10)), torch.nn.Parameter(torch.ones(7))
    optimizer = thinwire.optim.OneBitAdam([used, later], lr=0.1, freeze_step=2)
    sim = SimulatedWorkers(torch.nn.ParameterList([used, later]), thinwire.onebit_adam(), optimizer, 2)
    for _ in range(3):
        sim.step(lambda worker: (used * torch.randn(10)).sum())
    assert any("7 elements whose variance is 0" in note for note in sim.session.ledger.notes)
