"""PowerSGD: its laws (spec 13), against an oracle in float64, and on real processes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import batch, build, flat_parameters, loss_of, simulated, train_ddp
from tests.engines.test_ddp import SMALL_BUCKETS, trained
from thinwire import Rule, ThinwireError, Warmup, dense, powersgd
from thinwire.compressors import Cast, PowerSGD
from thinwire.compressors.powersgd import orthonormalise, random_columns
from thinwire.core import NOWHERE, Context
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.memories import ErrorFeedback, NoMemory

N, M, WORKERS = 30, 20, 4


def start(rank, dtype=torch.float64):
    return PowerSGD(rank).init(torch.empty(N, M, dtype=dtype), Context(0, 0, "w", 0))


def drive(grads, rank, dtype=torch.float64):
    """Error feedback by hand: yields (the mean that is received, the residuals) of each step's ``[workers, N, M]``."""
    compressor, old = PowerSGD(rank), start(rank, dtype)
    like, residual = torch.empty(N, M, dtype=dtype), torch.zeros(grads(0).shape, dtype=dtype)
    step = 0
    while True:
        ctx = Context(0, step, "w", 0)
        residual += grads(step)
        payloads = [compressor.compress(x, old, ctx) for x in residual]
        for x, payload in zip(residual, payloads, strict=True):
            compressor.decompress(payload, x, old, ctx).add_to(x, alpha=-1.0)
        mean = (torch.stack([payload[0] for payload in payloads]).mean(0),)
        compressor.decompress(mean, like, old, ctx).write_to(like)
        new = {key: torch.full_like(x, torch.nan) for key, x in old.items()}
        compressor.commit(mean, like, old, new, ctx)
        old = new
        yield like.clone(), residual
        step += 1


def oracle(grads, rank, *, local=True):
    """The same in NumPy; or, where not ``local``, with what all did not receive as everybody's residual."""
    right, left = start(rank)["right"].numpy(), None
    residual = np.zeros(grads(0).shape)
    step = 0
    while True:
        compensated = residual + grads(step).double().numpy()
        if step % 2 == 0:
            sent = compensated @ right @ right.T
            left = np.linalg.qr((compensated @ right).mean(0))[0]
        else:
            sent = left @ (left.T @ compensated)
            right = np.linalg.qr((compensated.transpose(0, 2, 1) @ left).mean(0))[0]
        residual = compensated - (sent if local else sent.mean(0))
        yield sent.mean(0), residual
        step += 1


def heterogeneous(step):
    """Each worker leans to a direction of its own."""
    own = torch.randn(WORKERS, N, M, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return own + torch.randn(WORKERS, N, M, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)


def after(steps, run):
    return next(result for step, result in enumerate(run, 1) if step == steps)


def test_equal_to_the_oracle():
    for (ours, left), (theirs, expected), _ in zip(
        drive(heterogeneous, 2, torch.float32), oracle(heterogeneous, 2), range(5), strict=False
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(left, expected, rtol=1e-5, atol=1e-5)


def test_residuals_stay_bounded_where_the_papers_form_grows():
    def norm(residual):
        return float(np.mean([np.linalg.norm(x) for x in np.asarray(residual)]))

    local, paper = drive(heterogeneous, 2), oracle(heterogeneous, 2, local=False)
    early, grown = (norm(after(300, run)[1]) for run in (local, paper))
    later, overgrown = (norm(after(2700, run)[1]) for run in (local, paper))
    assert later < 1.3 * early
    assert overgrown > 5 * grown
    assert overgrown > 20 * later


def test_both_forms_send_the_same():
    for (ours, _), (theirs, _), _ in zip(
        drive(heterogeneous, 2), oracle(heterogeneous, 2, local=False), range(30), strict=False
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_mean_is_conserved_and_all_that_counts():
    """Sent and mean residual are what was compensated; other splits of the same mean, in any order, send the same."""
    mixed = torch.randn(WORKERS, WORKERS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mixed /= mixed.sum(0)
    splits = [heterogeneous, lambda step: heterogeneous(step).flip(0)]
    splits.append(lambda step: torch.einsum("ij,jnm->inm", mixed, heterogeneous(step)))
    compensated, received = torch.zeros(2, N, M, dtype=torch.float64)
    for step, ((mean, left), *others) in enumerate(zip(*(drive(split, 3) for split in splits), strict=False)):
        compensated += heterogeneous(step).mean(0)
        received += mean
        torch.testing.assert_close(received + left.mean(0), compensated)
        for other, _ in others:
            torch.testing.assert_close(other, mean)
        if step == 20:
            return


def test_a_mean_of_low_rank_arrives_whole_every_second_step():
    """Then the left side spans its columns; the right one is found together with the residual, and overshoots."""

    def low(step):
        a, b = torch.randn(2, N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        off = torch.randn(1, N, M, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        return a @ b[:M].T + torch.cat([off, -off])  # the two deviate from it by anything

    for step, (_, left) in enumerate(drive(low, 3)):
        assert (left.mean(0).abs().max() < 1e-12) == step % 2
        assert left.abs().max() > 0.1
        if step == 6:
            return


def test_what_is_left_is_orthogonal_to_what_was_sent():
    x, state = torch.randn(N, M, dtype=torch.float64), start(4)
    for step, side in ((0, "right"), (1, "left")):
        ctx, rest = Context(0, step, "w", 0), x.clone()
        PowerSGD(4).decompress(PowerSGD(4).compress(x, state, ctx), x, state, ctx).add_to(rest, alpha=-1.0)
        assert ((rest if side == "right" else rest.T) @ state[side]).abs().max() < 1e-12
        assert 0 < rest.norm() < x.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_columns_that_say_nothing_are_replaced(dtype):
    fallback = random_columns(50, 4, torch.Generator().manual_seed(1), dtype)
    one = torch.randn(50, 1, dtype=dtype)
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    for x in (torch.zeros(50, 4), one @ torch.randn(1, 4, dtype=dtype), one.expand(50, 4),
              tiny * one.sign().expand(50, 4),
              0.9 * huge * torch.rand(50, 4, dtype=dtype), torch.eye(50, 4)):  # fmt: skip
        q = orthonormalise(x.to(dtype), fallback)
        torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=dtype), atol=1e-5, rtol=0)
        assert torch.equal(q, orthonormalise(x.to(dtype), fallback)), "the same on every rank"
    same = orthonormalise(torch.zeros(50, 4, dtype=dtype), fallback)
    torch.testing.assert_close((same.T @ fallback).abs(), torch.eye(4, dtype=dtype), atol=1e-5, rtol=0)
    for nonfinite in (torch.nan, torch.inf):
        assert not orthonormalise(torch.full((50, 4), nonfinite, dtype=dtype), fallback).isfinite().all()


def test_a_higher_rank_keeps_the_leading_columns():
    old = start(3)
    for rank in (1, 3, 5):
        new = PowerSGD(rank).inherit(old, start(rank))
        for side in ("left", "right"):
            kept = min(rank, 3)
            assert torch.equal(new[side][:, :kept], old[side][:, :kept])
            torch.testing.assert_close(new[side].T @ new[side], torch.eye(rank, dtype=torch.float64))
    assert PowerSGD(M).inherit(old, start(M)) == {}
    assert torch.equal(PowerSGD(2).inherit({"left": torch.zeros(7, 2)}, start(2))["left"], start(2)["left"])


@pytest.mark.parametrize("rank", [0, -1])
def test_bad_rank(rank):
    with pytest.raises(ThinwireError, match=f"rank is {rank}; it must be at least 1"):
        powersgd(rank)


def test_other_bad_input():
    with pytest.raises(ThinwireError, match="min_rate is -1"):
        PowerSGD(1, -1.0)
    with pytest.raises(ThinwireError, match="PowerSGD is biased, and NoMemory forgets"):
        Rule(PowerSGD(1), NoMemory())
    with pytest.raises(ThinwireError, match="PowerSGD needs the sum of what is sent"):
        PowerSGD(1) >> thinwire.compressors.TopK(0.1)


def test_the_plan_declines_vectors_and_small_matrices_and_says_so():
    shapes = {"big": (50, 40), "kernel": (50, 10, 2, 2), "vector": (40,), "small": (10, 8), "row": (1, 900)}
    named = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
    session = SimulatedWorkers(named, powersgd(4), torch.optim.SGD(named.parameters(), lr=0.1), 2).session
    assert {unit.name for unit in session.units if unit.compressed} == {"big", "kernel"}
    notes = "\n".join(session.ledger.notes)
    assert "vector: PowerSGD left it: fewer than 2 dimensions; the plan's next rule counts" in notes
    assert "small: PowerSGD left it: 10 x 8 is less than 2 times 4 x (10 + 8)" in notes
    alone = nn.ParameterList([nn.Parameter(torch.zeros(40))])
    method = thinwire.Method("mine", (Rule(PowerSGD(1), ErrorFeedback()),))
    with pytest.raises(ThinwireError, match="no rule of mine fits"):
        SimulatedWorkers(alone, method, torch.optim.SGD(alone.parameters(), lr=0.1), 2)


def test_a_warm_up_that_changes_nothing_is_said():
    named = nn.ParameterDict({"big": nn.Parameter(torch.zeros(50, 40))})
    optimizer = torch.optim.SGD(named.parameters(), lr=0.1)
    session = SimulatedWorkers(named, powersgd(2, warmup=Warmup(4)), optimizer, 2).session
    assert "big: a warm-up density of 0.25 changes nothing" in session.ledger.notes


METHODS = {
    "powersgd": powersgd(2),
    "powersgd-clip": powersgd(3, min_compression_rate=0.0, clip=0.5),
    "powersgd-fp16": thinwire.Method(
        "fp16", (Rule(PowerSGD(2) >> Cast("float16"), ErrorFeedback("bfloat16")), Rule(Cast(), NoMemory()))
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_simulator_equals_the_real_run(world2, name):
    torch.set_num_threads(1)
    real, facts = trained(world2, METHODS[name], 12, SMALL_BUCKETS)
    expected, result = simulated(METHODS[name], 2, 12)
    assert torch.equal(real, expected)
    assert facts["wire_bytes"] == pytest.approx(result.ledger.wire_bytes, rel=0.1)  # a head for each message
    assert (real - simulated(dense(), 2, 12)[0]).abs().max() > 0


def test_a_warm_up_sends_dense():
    _, result = simulated(powersgd(2, warmup=Warmup(4, (1.0,))), 2, 8)
    assert [row.error == 0.0 for row in result.ledger.rows if row.error is not None] == [True]
    sent = [row.compressed_wire_bytes for row in result.ledger.rows]
    assert max(sent[4:]) < 0.5 * min(sent[:4])


def test_all_ranks_of_the_matrix_are_sgd(world2):
    """Each side of these is at most 48 long."""
    real, _ = trained(world2, thinwire.Method("dense", powersgd(48, min_compression_rate=0.0).rules), 6)
    assert torch.equal(real, trained(world2, dense(), 6)[0])


def _many(rank, repeats):
    for _ in range(repeats):
        _, wire = train_ddp(rank, powersgd(2), 4, SMALL_BUCKETS)
        buckets = len(wire.stages.buckets)
        wire.detach()
    return buckets


def test_many_buckets_do_not_hang(world2):
    assert min(world2.run(_many, 50, timeout=60)) >= 2 * 2  # two shapes of each, after the first step's


def _resumed(rank, cut):
    """Ten steps with a checkpoint after ``cut``, of which a fresh session goes on; and a change of rank at 7."""
    model, optimizer = build()
    wire = thinwire.attach(ddp := DistributedDataParallel(model), powersgd(2), optimizer=optimizer)
    for step in range(10):
        if step == cut:
            saved = wire.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
            wire.detach()
            model, optimizer = build(seed=1)
            wire = thinwire.attach(ddp := DistributedDataParallel(model), powersgd(2), optimizer=optimizer)
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[2])
            wire.load_state_dict(saved[0])
        if step == 7:
            residuals = {name: two.now["residual"].clone() for name, two in wire.workers[0].local.items() if two.now}
            factors = {unit.name: unit.shared.now for unit in wire.units}
            wire.set_method(powersgd(3, min_compression_rate=1.0))
            for name, before in residuals.items():
                assert before.abs().max() > 0
                assert torch.equal(wire.workers[0].local[name].now["residual"], before)
            for unit in wire.units:
                for side, before in factors[unit.name].items():
                    assert torch.equal(unit.shared.now[side][:, :2], before)
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    keys = {key for unit in wire.units for key in wire.state_dict()["shared"].get(unit.name, {})}
    wire.detach()
    return flat_parameters(model), keys


def test_resume_is_bit_exact_and_a_change_of_rank_keeps_residuals(world2):
    whole, resumed = world2.run(_resumed, None), world2.run(_resumed, 5)
    assert torch.equal(whole[0][0], resumed[0][0])
    assert torch.equal(resumed[0][0], resumed[1][0])
    assert resumed[0][1] == {"left", "right"}


def test_losses_are_what_is_lost_once_it_has_converged():
    x = torch.randn(N, M) @ torch.diag(torch.logspace(0, -3, M)) @ torch.linalg.qr(torch.randn(M, M))[0]
    family = [PowerSGD(rank) for rank in (1, 2, 5, M, M + 7)]
    known = family[0].losses(x, family)
    tails = [float(torch.linalg.svdvals(x.double())[one.rank :].square().sum()) for one in family]
    assert known == pytest.approx(tails, rel=1e-4, abs=1e-6)
    state, compressor = PowerSGD(2).init(x, Context(0, 0, "w", 0)), PowerSGD(2)
    for step in range(20):
        ctx, new = Context(0, step, "w", 0), {key: value.clone() for key, value in state.items()}
        payload = compressor.compress(x, state, ctx)
        compressor.decompress(payload, x, state, ctx).write_to(out := torch.empty_like(x))
        compressor.commit(payload, x, state, new, ctx)
        state = new
    assert float((x - out).square().sum()) == pytest.approx(known[1], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(31, 33), (8, 3, 3, 3), (50, 8)])
def test_its_state_lies_as_a_checkpoint_of_it_does(shape, dtype):
    """Products with another order of memory differ in their last bits."""
    like = torch.randn(shape, dtype=dtype)
    state = PowerSGD(2).init(like, NOWHERE)
    assert {key: value.is_contiguous() for key, value in state.items()} == {"left": True, "right": True}
    wider = PowerSGD(4).inherit(state, PowerSGD(4).init(like, NOWHERE))
    narrower = PowerSGD(1).inherit(state, PowerSGD(1).init(like, NOWHERE))
    assert all(value.clone().is_contiguous() for value in (*wider.values(), *narrower.values()))
