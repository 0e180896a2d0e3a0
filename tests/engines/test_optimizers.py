"""What optimizers hold: settings that are followed, checkpoints loaded late, several of one model, wrappers."""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines import sharded
from tests.engines.models import Net, batch, flat_parameters, loss_of
from thinwire import ThinwireError, dense, dgc, topk
from thinwire.engines.simulator import SimulatedWorkers

EXACT = dgc(1.0)
LOST = "momentum and residuals of step 3"


def groups_of(model: nn.Module) -> list[dict]:
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim == 1]}]


def start(**sgd):
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.SGD(groups_of(model), **{"lr": 0.05, "momentum": 0.9, **sgd})


def dense_steps(model, optimizer, steps, schedule=lambda t: None):
    """What two workers do together, by plain PyTorch."""
    for step in steps:
        optimizer.zero_grad()
        sum(loss_of(model, batch(worker, step)) / 2 for worker in range(2)).backward()
        optimizer.step()
        schedule(step)


def simulated_steps(sim, model, steps, schedule=lambda t: None):
    for step in steps:
        sim.step(lambda worker, step=step: loss_of(model, batch(worker, step)))
        schedule(step)


def buffers(optimizer) -> list[torch.Tensor]:
    held = [param for group in optimizer.param_groups for param in group["params"] if param in optimizer.state]
    found = [optimizer.state[param].get("momentum_buffer") for param in held]
    return [buffer for buffer in found if buffer is not None]


# -- settings that change ----------------------------------------------------------------------------------------------


def one_cycle(optimizer):
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    return lambda step: scheduler.step()


def cyclic(optimizer):
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3)
    return lambda step: scheduler.step()


def ramp(optimizer):
    """From none at all, and down to none in between."""
    values = [0.0, 0.0, 0.5, 0.9, 0.0, 0.0, 0.8, 0.8, 0.9, 0.9]

    def write(step):
        for group in optimizer.param_groups:
            group["momentum"] = values[step]

    write(0)
    return write


def by_group(optimizer):
    decay = [0.0, 0.1, 0.05, 0.0, 0.0, 0.1, 0.1, 0.2, 0.0, 0.0]

    def write(step):
        optimizer.param_groups[0]["weight_decay"] = decay[step]
        optimizer.param_groups[1]["momentum"] = 0.5 + 0.03 * step

    return write


def nesterov_at_times(optimizer):
    def write(step):
        for group in optimizer.param_groups:
            group["nesterov"] = step % 3 == 0

    return write


@pytest.mark.parametrize("sgd", [{}, {"nesterov": True}, {"weight_decay": 0.01}], ids=["plain", "nesterov", "decay"])
@pytest.mark.parametrize("schedule", [one_cycle, cyclic, ramp, by_group, nesterov_at_times])
def test_what_is_written_in_the_groups_is_followed(schedule, sgd):
    expected, plain = start(**sgd)
    dense_steps(expected, plain, range(10), schedule(plain))
    model, optimizer = start(**sgd)
    sim = SimulatedWorkers(model, EXACT, optimizer, 2)
    simulated_steps(sim, model, range(10), schedule(optimizer))
    torch.testing.assert_close(flat_parameters(model), flat_parameters(expected), rtol=1e-5, atol=1e-6)
    keys = ("momentum", "nesterov", "weight_decay", "lr")
    written = [[group[key] for key in keys] for group in optimizer.param_groups]
    assert written == [[group[key] for key in keys] for group in plain.param_groups]
    sim.session.detach()
    assert written == [[group[key] for key in keys] for group in optimizer.param_groups]
    for found, wanted in zip(buffers(optimizer), buffers(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def _scheduled(rank, engine):
    """Parameters after a schedule of momentum: by plain DDP, and by what is exchanged."""
    found = []
    for method in (None, EXACT):
        model, optimizer = start(weight_decay=0.01)
        run = DistributedDataParallel(model) if engine == "ddp" or method is None else model
        options = {} if engine == "ddp" else {"process_group": dist.group.WORLD}
        wire = thinwire.attach(run, method, optimizer=optimizer, **options) if method else None
        schedule = one_cycle(optimizer)
        for step in range(8):
            optimizer.zero_grad()
            loss_of(run, batch(rank, step)).backward()
            optimizer.step()
            schedule(step)
        found.append(flat_parameters(model))
        if wire is not None:
            wire.detach()
    return found


@pytest.mark.parametrize("engine", ["ddp", "bare"])
def test_a_schedule_of_momentum_between_processes(world2, engine):
    for expected, found in world2.run(_scheduled, engine, timeout=120):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _scheduled_shards(rank):
    """Two replicas, whose gradients are averaged by all that they hold."""
    found, mesh = [], sharded.mesh_of(2, 1)
    for method in (dense(), EXACT):
        model, optimizer = sharded.build(mesh)
        wire = thinwire.attach(
            model, method, optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
        )
        for step in range(6):
            for group in optimizer.param_groups:
                group.update(momentum=0.9 - 0.1 * step, weight_decay=0.01 * step)
            optimizer.zero_grad()
            sharded.loss_of(model, sharded.data(rank, step)).backward()
            optimizer.step()
        found.append(sharded.whole(model))
        wire.detach()
    return found


def test_a_schedule_of_momentum_between_replicas_of_shards(world2):
    for expected, found in world2.run(_scheduled_shards, timeout=120):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_can_not_be_followed_is_said_before_the_step():
    model, optimizer = start()
    sim = SimulatedWorkers(model, dgc(0.05), optimizer, 2)
    simulated_steps(sim, model, range(1))
    assert sim.session.ledger.rows[0].error > 0
    assert sim.session.ledger.ratio > 1
    before = flat_parameters(model)
    for key, value, text in (("momentum", 1.5, "momentum is 1.5"), ("dampening", 0.1, "dampening=0.1")):
        optimizer.param_groups[1][key] = value
        with pytest.raises(ThinwireError, match=text):
            simulated_steps(sim, model, range(1, 2))
        optimizer.param_groups[1][key] = 0.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ThinwireError, match=r"shape \(3,\) \(in group 2\).*detach\(\) before you add a group"):
        simulated_steps(sim, model, range(1, 2))
    assert torch.equal(before, flat_parameters(model))
    optimizer.param_groups[2]["params"][0].requires_grad_(False)  # nobody steps it
    simulated_steps(sim, model, range(1, 2))
    sim.session.detach()


def test_a_change_between_backward_and_step_counts_later_and_is_said(world2):
    for texts in world2.run(_changed_late):
        assert len(texts) == 1
        assert "counts from the next backward on" in texts[0]


def _changed_late(rank):
    model, optimizer = start()
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, dgc(0.05), optimizer=optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            optimizer.param_groups[0]["momentum"] = 0.5 + 0.1 * step
            optimizer.step()
    wire.detach()
    return [str(one.message) for one in caught]


def test_a_step_that_dies_leaves_the_settings():
    model, optimizer = start(weight_decay=0.01)
    sim = SimulatedWorkers(model, dgc(0.05), optimizer, 2)

    def die(*_):
        raise KeyError("in a hook")

    handle = optimizer.register_step_pre_hook(die)
    with pytest.raises(KeyError):
        simulated_steps(sim, model, range(1))
    handle.remove()
    simulated_steps(sim, model, range(1, 3))
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    sim.session.detach()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01]


# -- checkpoints of the optimizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sgd", [{}, {"nesterov": True}, {"weight_decay": 0.01}], ids=["plain", "nesterov", "decay"])
@pytest.mark.parametrize("late", [False, True])
def test_momentum_that_is_loaded_after_attach_counts(sgd, late):
    expected, plain = start(**sgd)
    dense_steps(expected, plain, range(4))
    weights, state = copy.deepcopy(expected.state_dict()), copy.deepcopy(plain.state_dict())
    dense_steps(expected, plain, range(4, 8))
    model, optimizer = start(**{**sgd, "momentum": 0.5} if late else sgd)
    model.load_state_dict(weights)
    if not late:
        optimizer.load_state_dict(state)
    sim = SimulatedWorkers(model, EXACT, optimizer, 2)
    if late:
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert not buffers(optimizer)
    simulated_steps(sim, model, range(4, 8))
    sim.session.detach()
    torch.testing.assert_close(flat_parameters(model), flat_parameters(expected), rtol=1e-5, atol=1e-6)


def _saved(optimizer, how, model):
    if how == "dcp":
        return get_optimizer_state_dict(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def _loaded(optimizer, how, model, state):
    if how == "dcp":
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(state))
    else:
        optimizer.load_state_dict(state)


def _marked(rank, name, engine, how):
    """Which warnings there are, by what is loaded and in which order."""
    kind, method = (torch.optim.AdamW, topk(0.05)) if name == "topk" else (torch.optim.SGD, dgc(0.05))

    def begin(attached=True, state=None):
        torch.manual_seed(0)
        model = Net()
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.01)
        if state is not None:
            _loaded(optimizer, how, model, state)
        run = DistributedDataParallel(model) if engine == "ddp" or not attached else model
        options = {} if engine == "ddp" else {"process_group": dist.group.WORLD}
        wire = thinwire.attach(run, method, optimizer=optimizer, **options) if attached else None
        return model, run, optimizer, wire

    def go(run, optimizer, steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in steps:
                optimizer.zero_grad()
                loss_of(run, batch(rank, step)).backward()
                optimizer.step()
        return [str(one.message) for one in caught]

    model, run, optimizer, wire = begin()
    assert "thinwire_step" not in str(optimizer.state_dict()["param_groups"]), "nothing is remembered yet"
    assert not go(run, optimizer, range(3))
    assert wire.ledger.rows[0].error > 0
    assert wire.ledger.ratio > 1
    state, remembered = _saved(optimizer, how, model), wire.state_dict()
    wire.detach()
    said = {}
    for order in ("alone", "optimizer first", "wire first", "before attach", "before attach, with wire"):
        early = order.startswith("before")
        model, run, optimizer, wire = begin(state=state if early else None)
        if order == "wire first":
            wire.load_state_dict(remembered)
        if not early:
            _loaded(optimizer, how, model, state)
        if order in ("optimizer first", "before attach, with wire"):
            wire.load_state_dict(remembered)
        said[order] = go(run, optimizer, range(3, 6))
        wire.detach()
    model, run, optimizer, _ = begin(attached=False)
    _loaded(optimizer, how, model, state)
    said["plain"] = go(run, optimizer, range(3, 6))
    return said


@pytest.mark.parametrize(
    ("name", "engine", "how"), [("dgc", "ddp", "dcp"), ("topk", "ddp", "save"), ("dgc", "bare", "save")]
)
def test_what_was_remembered_and_is_not_loaded_is_said_once(world2, name, engine, how):
    for said in world2.run(_marked, name, engine, how, timeout=180):
        for order in ("alone", "before attach"):
            assert len(said.pop(order)) == 1
        assert said == {"optimizer first": [], "wire first": [], "before attach, with wire": [], "plain": []}


def test_the_mark_is_gone_with_what_a_dense_run_leaves():
    model, optimizer = start()
    sim = SimulatedWorkers(model, dgc(0.05), optimizer, 2)
    simulated_steps(sim, model, range(3))
    marked = copy.deepcopy(optimizer.state_dict())
    sim.session.detach()
    assert marked["param_groups"][0]["thinwire_step"] == 3
    assert "thinwire_step" not in optimizer.state_dict()["param_groups"][0]
    model, optimizer = start()
    optimizer.load_state_dict(marked)  # without thinwire
    dense_steps(model, optimizer, range(3, 5))
    sim = SimulatedWorkers(model, dgc(0.05), optimizer, 2)  # the momentum is there: nothing is missing
    simulated_steps(sim, model, range(5, 7))
    optimizer.load_state_dict(marked)
    with pytest.warns(UserWarning, match=LOST):
        simulated_steps(sim, model, range(7, 8))
    sim.session.detach()


# -- several optimizers ------------------------------------------------------------------------------------------------


def pair(name, model):
    matrices, rest = (group["params"] for group in groups_of(model))
    if name == "muon and adamw":
        square = [p for p in matrices if p.ndim == 2]
        return torch.optim.Muon(square, lr=0.01), torch.optim.AdamW([p for p in matrices if p.ndim > 2] + rest, lr=0.01)
    second = torch.optim.AdamW(rest, lr=0.01) if name == "sgd and adamw" else torch.optim.SGD(rest, 0.05, 0.5)
    return torch.optim.SGD(matrices, lr=0.05, momentum=0.9, weight_decay=0.01), second


@pytest.mark.parametrize("name", ["sgd and sgd", "sgd and adamw", "muon and adamw"])
def test_several_optimizers_step_one_model(name):
    torch.manual_seed(0)
    expected = Net()
    both = pair(name, expected)
    for step in range(6):
        expected.zero_grad()
        sum(loss_of(expected, batch(worker, step)) / 2 for worker in range(2)).backward()
        for optimizer in both:
            optimizer.step()
    torch.manual_seed(0)
    model = Net()
    both = pair(name, model)
    sim = SimulatedWorkers(model, topk(1.0) if name == "muon and adamw" else EXACT, both, 2)
    simulated_steps(sim, model, range(6))
    assert sim.session.step == 6
    torch.testing.assert_close(flat_parameters(model), flat_parameters(expected), rtol=1e-4, atol=1e-5)
    sim.session.detach()
    assert all(group.get("momentum", 0.9) for optimizer in both for group in optimizer.param_groups)


def _several(rank, name, method, engine):
    torch.manual_seed(0)
    model = Net()
    both = pair(name, model)
    run = DistributedDataParallel(model) if engine == "ddp" else model
    options = {} if engine == "ddp" else {"process_group": dist.group.WORLD}
    wire = thinwire.attach(run, method, optimizer=list(both), **options)
    for step in range(6):
        model.zero_grad()
        loss_of(run, batch(rank, step)).backward()
        for optimizer in both:
            optimizer.step()
    assert wire.step == 6
    assert wire.ledger.rows[0].error > 0
    assert wire.ledger.ratio > 1
    wire.detach()
    return flat_parameters(model)


@pytest.mark.parametrize(
    ("name", "engine", "method"),
    [("sgd and adamw", "ddp", dgc(0.05)), ("sgd and sgd", "bare", dgc(0.05)), ("muon and adamw", "ddp", topk(0.05))],
)
def test_several_optimizers_between_processes(world2, name, engine, method):
    a, b = world2.run(_several, name, method, engine, timeout=120)
    assert torch.equal(a, b)
    torch.manual_seed(0)
    model = Net()
    sim = SimulatedWorkers(model, method, pair(name, model), 2)
    simulated_steps(sim, model, range(6))
    sim.session.detach()
    assert torch.equal(a, flat_parameters(model))


def _partial(rank):
    """Residuals of both halves after a round in which the second optimizer alone does not step."""
    torch.manual_seed(0)
    model = Net()
    both = pair("sgd and sgd", model)
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, topk(0.05, keep_dense=["middle.weight"]), optimizer=both)
    states, texts = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            model.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            both[0].step()
            if step != 1:
                both[1].step()
            states.append((wire.step, wire.workers[0].local["first.weight"].now["residual"].clone()))
        texts = [str(one.message) for one in caught]
    facts = wire.ledger.skipped, wire.ledger.notes
    wire.detach()
    return [step for step, _ in states], torch.equal(states[0][1], states[1][1]), texts, facts, flat_parameters(model)


def test_a_step_of_some_optimizers_is_said_and_keeps_what_belongs_together(world2):
    (steps, stood_still, texts, (skipped, notes), a), (*_, b) = world2.run(_partial)
    assert torch.equal(a, b)
    assert steps == [1, 1, 2, 3], "a step is final when all have stepped"
    assert not stood_still, "what the first optimizer stepped has been sent"
    assert len(texts) == 1
    assert "SGD (1) did not step after the last exchange" in texts[0]
    assert skipped == 1
    assert any("is void" in note for note in notes)


def _two_under_a_scaler(rank, poisoned, where):
    torch.manual_seed(0)
    model = Net()
    both = pair("sgd and sgd", model)
    ddp = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wire = thinwire.attach(ddp, dgc(0.05), optimizer=both, scaler=scaler)
    bad = {"now": False}
    model.get_parameter(where).register_hook(lambda g: g * float("inf") if bad["now"] else None)
    for step in range(6):
        if step == 3 and not poisoned:
            continue
        bad["now"] = step == 3 and rank == 1
        model.zero_grad()
        scaler.scale(loss_of(ddp, batch(rank, step))).backward()
        before = flat_parameters(model)
        for optimizer in both:
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, flat_parameters(model)) == (step == 3), "all of them skip, or none"
    facts = wire.step, wire.ledger.skipped
    wire.detach()
    return flat_parameters(model), facts


@pytest.mark.parametrize("where", ["first.weight", "first.bias"])
def test_an_overflow_in_the_half_of_one_optimizer_skips_both(world2, where):
    (a, facts), (b, _) = world2.run(_two_under_a_scaler, True, where)
    assert torch.equal(a, b)
    assert facts == (5, 1)
    control = world2.run(_two_under_a_scaler, False, where)[0][0]
    torch.testing.assert_close(a, control, rtol=1e-6, atol=1e-7)


def test_optimizers_that_do_not_fit_are_refused():
    model, _ = start()
    matrices, rest = (group["params"] for group in groups_of(model))
    sgd, adamw = torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(rest)
    for optimizer, text in (
        ([sgd, torch.optim.SGD([*rest, matrices[0]], lr=0.1)], "is in two optimizers"),
        ([sgd], "is not in the optimizer"),
        ([sgd, adamw, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)], r"optimizer\[2\].*leave it out"),
        ([torch.optim.AdamW(matrices), torch.optim.SGD(rest, lr=0.1)], "owns its momentum, and its optimizer is AdamW"),
        ([torch.optim.AdamW(matrices), adamw], "needs torch.optim.SGD, not AdamW and AdamW"),
    ):
        with pytest.raises(ThinwireError, match=text):
            SimulatedWorkers(model, dgc(0.05), optimizer, 2)
    part = thinwire.optim.OneBitAdam(matrices)
    with pytest.raises(ThinwireError, match="OneBitAdam and AdamW, of which one is a part of its method"):
        SimulatedWorkers(model, thinwire.onebit_adam(), [part, adamw], 2)
    SimulatedWorkers(model, dgc(0.05), [sgd, adamw], 2).session.detach()


# -- wrappers ----------------------------------------------------------------------------------------------------------


class Wrapper:
    """As apex and many a script do it: no optimizer itself."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Sharp(torch.optim.Optimizer):
    """As SAM and Lookahead do it: an optimizer around one, whose groups it shares."""

    def __init__(self, base_optimizer):
        super().__init__(base_optimizer.param_groups, {})
        self.base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.optimizer = self  # no way out of this one

    def step(self, closure=None):
        self.base_optimizer.step()


@pytest.mark.parametrize("wrap", [Sharp, Wrapper, lambda o: Wrapper(Wrapper(Sharp(o))), lambda o: [Wrapper(o)]])
def test_a_wrapper_is_as_good_as_what_is_inside(wrap):
    model, optimizer = start()
    sim = SimulatedWorkers(model, dgc(0.05), wrap(optimizer), 2)
    simulated_steps(sim, model, range(3))
    assert sim.session.step == 3
    assert sim.session.optimizer is optimizer
    assert sim.session.ledger.ratio > 1
    sim.session.detach()


def test_a_memory_keeps_what_it_had_when_its_settings_change():
    """The separate decay ends, and its velocity goes on."""
    model, optimizer = start(weight_decay=0.1)
    sim = SimulatedWorkers(model, EXACT, optimizer, 2)
    simulated_steps(sim, model, range(3))
    unit = next(unit for unit in sim.session.units if unit.name == "middle.weight")
    velocity = unit.shared.now["decay"].clone()
    before = [worker.local[unit.name].now["momentum"].clone() for worker in sim.session.workers]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    sim.session.optimizer_link.begin(None)
    assert "decay" not in unit.shared.now
    assert velocity.norm() > 0
    for worker, was in zip(sim.session.workers, before, strict=True):
        torch.testing.assert_close(worker.local[unit.name].now["momentum"], was + velocity)
    sim.session.detach()
