"""Local updates where something is out of the ordinary: clips, warm-ups, nonfinite state, changes in flight."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import thinwire
from tests.engines.test_outer import RECIPES, batch, build, flat, loss_of
from thinwire import Method, ThinwireError, methods, topk
from thinwire.engines.simulator import SimulatedWorkers


class Mover:
    """Workers with one vector each, which move it by -1 in each inner step."""

    def __init__(self, method: Method, workers: int = 1, size: int = 64, **options) -> None:
        self.model = nn.Linear(size, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.sim = SimulatedWorkers(self.model, method, self.optimizer, workers, **options)

    def step(self, times: int = 1) -> float:
        for _ in range(times):
            self.sim.step(lambda worker: self.model.weight.sum())
        return self.anchor

    @property
    def anchor(self) -> float:
        return float(self.sim.session.units[0].own[0, 0])


@pytest.mark.parametrize("momentum", [0.0, 0.2])
def test_a_clip_limits_what_moves_the_anchor(momentum):
    mover = Mover(methods.co2(10, momentum=momentum, clip=0.5, penalty=None, contraction=0.8))
    assert mover.step(20) == -0.5  # the first round's ten arrive with the second
    assert mover.step(10) == -1.0


def test_staleness_makes_an_update_smaller():
    """The gap: the first round's move arrives whole; the next one is divided by 1 + moved / (every * first)."""
    mover = Mover(methods.co2(4, clip=None))
    assert mover.step(8) == -4.0
    assert mover.step(4) == pytest.approx(-4.0 - 4.0 / (1.0 + 4.0 / (4 * 1.0)))


def half(moved: float, first: float, every: int) -> float:
    return 2.0


def test_a_penalty_is_a_function_with_a_name():
    method = methods.co2(4, clip=None, penalty=half)
    assert Method.from_json(method.to_json()).local.divisor(0.0, 1.0) == 2.0
    mover = Mover(method)
    assert mover.step(8) == -2.0
    methods.co2(4, penalty=lambda moved, first, every: 2.0)
    with pytest.raises(ThinwireError, match="and so is another one that was given before"):
        methods.co2(4, penalty=lambda moved, first, every: 3.0)


@pytest.mark.parametrize("steps", [7, 8, 11])
@pytest.mark.parametrize("method", [methods.local(every=4), methods.co2(4, clip=None, penalty=None)])
def test_detach_loses_no_step(method, steps):
    mover = Mover(method)
    mover.step(steps)
    mover.sim.session.detach()
    assert mover.model.weight[0, 0].item() == -steps


def test_slow_momentum_follows_a_warm_up():
    """Divided by the mean rate of the round, so without momentum the anchor goes where the worker went."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-4, total_iters=100)
    rates: list[float] = []
    sim = SimulatedWorkers(model, methods.slowmo(12, momentum=0.0), optimizer, 2)
    for _ in range(36):
        rates.append(optimizer.param_groups[0]["lr"])
        sim.step(lambda worker: model.weight.sum())
        schedule.step()
    assert float(sim.session.units[0].own[0, 0]) == pytest.approx(-sum(rates), rel=1e-5)


@pytest.mark.parametrize("method", [methods.local(topk(0.25), every=4, delay=2), methods.co2(4, exchange=topk(0.25))])
def test_another_compressor_in_flight_loses_nothing(method):
    """What was applied, what is pending and what is on its way are what the worker has moved."""
    mover = Mover(method)
    mover.step(3 if method.local.delay == 2 else 4)
    sent = mover.sim.local.rounds
    assert sent.flight is not None
    exchange = topk(0.1)
    mover.sim.session.set_method(methods.local(exchange, every=4, delay=2) if method.local.delay == 2 else
                                 methods.co2(4, exchange=exchange))  # fmt: skip
    residual = float(mover.sim.session.workers[0].local["weight"].now["residual"].sum())
    coming = float(sum(mean.sum() for mean in sent.late.means))
    assert residual > 0.0
    assert residual + coming == 64 * (2 if method.local.delay == 2 else 4)


def test_other_settings_between_rounds():
    mover = Mover(methods.co2(4, clip=None, penalty=None))
    mover.step(8)
    mover.sim.session.set_method(methods.local(every=2))  # what was on its way has moved the anchor
    assert mover.anchor == -8.0
    assert mover.step(2) == -10.0
    streaming = Mover(methods.streaming_diloco(8, fragments=1, delay=2))
    streaming.step(7)
    with pytest.raises(ThinwireError, match=r"in the middle of a round of 8.*change them after a round"):
        streaming.sim.session.set_method(methods.local(every=2))


class Scalar(nn.Module):
    """A parameter without dimensions beside a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("mode", ["skip", "zero"])
@pytest.mark.parametrize("method", [methods.local(every=2), methods.co2(2)])
def test_one_nonfinite_gradient_costs_one_round(method, mode):
    model = Scalar()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sim = SimulatedWorkers(model, method, optimizer, 2, on_nonfinite=mode)
    for step in range(20):
        bad = torch.tensor(torch.nan if step == 3 else 1.0)
        huge = 1e25 if step == 3 else 1.0  # its square is infinite, and it is not
        sim.step(lambda worker, bad=bad, huge=huge: huge * model.weight.sum() + (bad if worker else 1.0) * model.scale)
    assert sim.session.ledger.skipped == (1 if mode == "skip" else 0)
    sim.session.detach()
    assert all(bool(param.isfinite().all()) and param.abs().max().item() < 10 for param in model.parameters())


def test_zero_is_for_local_updates():
    model, optimizer = build()
    with pytest.raises(ThinwireError, match='on_nonfinite is "zero", which is for local updates'):
        SimulatedWorkers(model, topk(0.1), optimizer, 2, on_nonfinite="zero")


def _mismatch(rank):
    def begun(method, steps):
        model, optimizer = build()
        wire = thinwire.attach(model, method, optimizer=optimizer, process_group=dist.group.WORLD)
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()
        return wire

    found = []
    two, sent = methods.streaming_diloco(8, fragments=2, delay=2, exchange=topk(0.1)), topk(0.1)
    for saved, method in (
        (methods.diloco(8, exchange=sent), two),
        (methods.diloco(4, exchange=sent), methods.diloco(7, exchange=sent)),
        (methods.diloco(4, exchange=sent), sent),
    ):
        wire = begun(saved, 6)
        state = wire.state_dict()
        wire.detach()
        wire = begun(method, 3)
        before, residual = wire.step, wire.workers[0].local["inner.weight"].now["residual"].clone()
        clock = (wire.rounds.inner, list(wire.rounds.exchanged_at)) if method.local else None
        with pytest.raises(ThinwireError) as caught:
            wire.load_state_dict(state)
        assert wire.step == before
        assert clock is None or clock == (wire.rounds.inner, wire.rounds.exchanged_at)
        assert torch.equal(wire.workers[0].local["inner.weight"].now["residual"], residual)
        wire.detach()
        found.append(str(caught.value))
    return found


def test_a_checkpoint_that_does_not_fit_changes_nothing(world2):
    says = ("has 1 fragments, and this run 2", "other settings (every 4, here 7)", "the checkpoint is of local updates")
    for found in world2.run(_mismatch):
        for text, expected in zip(found, says, strict=True):
            assert expected in text


def test_lookahead_is_its_definition_and_sends_nothing():
    model, optimizer = build(torch.float64, adam=False)
    slow, fast = build(torch.float64, adam=False)
    result = thinwire.simulate(
        model, methods.lookahead(3, lr=0.5), optimizer=optimizer, workers=1, steps=9, loss=loss_of,
        batches=lambda worker, step: batch(worker, step, torch.float64),
    )  # fmt: skip
    anchor = [param.detach().clone() for param in slow.parameters()]
    for step in range(9):
        fast.zero_grad()
        loss_of(slow, batch(0, step, torch.float64)).backward()
        fast.step()
        if step % 3 == 2:
            with torch.no_grad():
                for kept, param in zip(anchor, slow.parameters(), strict=True):
                    kept.lerp_(param, 0.5)
                    param.copy_(kept)
    assert torch.allclose(flat(model.parameters()), flat(slow.parameters()), atol=1e-12, rtol=0)
    assert result.ledger.wire_bytes == 0


def _moments(rank):
    """One parameter has a gradient on one rank only; buffers are float64; a frozen parameter is each rank's own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(40, 8), "b": nn.Linear(40, 8)})
    model.register_buffer("third", torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    method = methods.local(methods.method_of(thinwire.compressors.TopK(0.1)) if False else topk(0.1), every=2,
                           sync_moments=1, buffers="average")  # fmt: skip
    wire = thinwire.attach(model, method, optimizer=optimizer, process_group=dist.group.WORLD)
    model.third.fill_((1 + rank) / 3)
    for step in range(6):
        optimizer.zero_grad()
        model["a"](batch(rank, step).repeat(1, 3)[:, :40]).square().mean().backward()
        if rank == 0:
            model["b"](batch(rank, step).repeat(1, 3)[:, :40]).square().mean().backward()
        optimizer.step()
    moment = optimizer.state[model["a"].weight]["exp_avg"].clone()
    wire.detach()
    return flat(model.parameters()), model.third, moment


def test_moments_are_averaged_where_some_ranks_have_none(world2):
    (params, third, moment), (others, same, equal) = world2.run(_moments)
    assert torch.equal(params, others)
    assert torch.equal(moment, equal)
    assert torch.equal(third, torch.full((3,), 0.5, dtype=torch.float64))
    assert torch.equal(third, same)


def _apart(rank, on_lost):
    """Rank 1 has made a step less, and detaches while rank 0 exchanges."""
    model, optimizer = build()
    group = dist.new_group([0, 1])  # it is broken afterwards
    wire = thinwire.attach(
        model, RECIPES["diloco"], optimizer=optimizer, process_group=group, timeout=4.0, on_lost=on_lost
    )
    try:
        for step in range(4 - rank):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()
        wire.detach()
    except ThinwireError as error:
        return str(error)


@pytest.mark.parametrize("on_lost", ["error", "continue"])
def test_ranks_at_different_steps_are_told_so(world2, on_lost):
    for text in world2.run(_apart, on_lost):
        assert "ranks have made different numbers of inner steps (rank 0 4, rank 1 3)" in text
