"""Whatever trains and is not exchanged, and whatever is stepped on and was not exchanged, is said by name."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

import thinwire
from tests.engines.sharded import mesh_of, whole
from thinwire import ThinwireError, dense, dgc, topk

ENGINES = ["bare", "ddp", "fsdp2"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 24), nn.Linear(24, 8)
        self.late = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        return self.late(self.head(torch.tanh(self.body(x))))


def start(engine, method=None, seed=0, model=None, given=True, optimizer=None, **wrapping):
    """The model, what to call, the optimizer, the session."""
    torch.manual_seed(seed)
    model = model or Net()
    options = {"kernels": "reference"}
    if engine == "fsdp2":
        mesh = mesh_of(2, 1)
        fully_shard(model, mesh=mesh["shard"], **wrapping)
        options["fsdp2"] = thinwire.Fsdp2Options(mesh["replicate"])
    elif engine == "bare":
        options["process_group"] = dist.group.WORLD
    run = DistributedDataParallel(model, **wrapping) if engine == "ddp" else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    wire = thinwire.attach(run, method or topk(0.1), optimizer=optimizer if given else None, **options)
    return model, run, optimizer, wire


def inputs(rank, step=0):
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + rank))


def backward(run, rank, step=0):
    run(inputs(rank, step)).square().mean().backward()


def no_sync(engine, run, wire):
    return run.no_sync() if engine == "ddp" else wire.no_sync()


@contextlib.contextmanager
def refused(said):
    with pytest.raises(ThinwireError) as caught:
        yield
    said.append(str(caught.value))


# -- what trains -----------------------------------------------------------------------------------------------------


def _trains(rank, engine):
    said = []

    def added(model):
        model.extra = nn.Linear(2, 2)

    def replaced(model):
        model.head = nn.Linear(24, 8)

    def assigned(model):
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)

    def unfrozen(model):
        model.late.requires_grad_(True)

    def normed(model):
        parametrizations.weight_norm(model.body)

    for change in [unfrozen, added, replaced] + ([] if engine == "fsdp2" else [assigned, normed]):
        model, run, optimizer, wire = start(engine)
        backward(run, rank)
        optimizer.step()
        change(model)
        with refused(said):
            backward(run, rank, 1)
        wire.detach()
    return said


@pytest.mark.parametrize("engine", ENGINES)
def test_what_trains_and_is_not_exchanged_is_an_error_by_name(world2, engine):
    for said in world2.run(_trains, engine, timeout=120.0):
        assert "'late.weight' required no gradient at attach and does now" in said[0]
        assert "'extra.weight' is new since attach" in said[1]
        assert "'head.weight' was replaced after " in said[2] or "'head.bias' was replaced after " in said[2]
        if engine != "fsdp2":
            assert "was replaced after " in said[3]
            assert "'body.parametrizations.weight.original0' is new since attach" in said[4]
        assert all("attach again" in text for text in said)


def _apart(rank):
    """Left out on purpose: a warning that names it."""
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Net()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["head.bias"])
        _, run, optimizer, wire = start("ddp", model=model)
        backward(run, rank)
        optimizer.step()
        wire.detach()
        said += [str(w.message) for w in caught if "not averaged" in str(w.message)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Net()
        _, run, optimizer, wire = start("fsdp2", model=model, ignored_params={model.body.weight})
        backward(run, rank)
        optimizer.step()
        wire.detach()
        said += [str(w.message) for w in caught if "not averaged" in str(w.message)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, other = Net(), nn.Linear(3, 5)
        optimizer = torch.optim.SGD([*model.named_parameters(), *other.named_parameters("loss")], lr=0.1)
        _, run, optimizer, wire = start("bare", model=model, optimizer=optimizer)
        for step in range(2):
            backward(run, rank, step)
            optimizer.step()
        wire.detach()
        said += [str(w.message) for w in caught if "nobody averages" in str(w.message)]
    return said


def test_what_is_left_out_is_a_warning_by_name(world2):
    for ddp, fsdp2, foreign in world2.run(_apart, timeout=120.0):
        assert "'head.bias' trains" in ddp
        assert "parameters_to_ignore" in ddp
        assert "'body.weight' trains" in fsdp2
        assert "'loss.weight' of shape (5, 3)" in foreign


def _between(rank):
    """Changed between wrapping and attach."""
    said = []
    for change in ("unfrozen", "frozen", "added", "replaced"):
        model = Net()
        ddp = DistributedDataParallel(model)
        if change == "unfrozen":
            model.late.requires_grad_(True)
        elif change == "frozen":
            model.head.requires_grad_(False)
        elif change == "added":
            model.extra = nn.Linear(2, 2)
        else:
            model.head.weight = nn.Parameter(torch.zeros(8, 24))
        with refused(said):
            thinwire.attach(ddp, dense())
    return said


def test_what_changes_between_wrapping_and_attach(world2):
    for unfrozen, frozen, added, replaced in world2.run(_between):
        assert "6 parameters require a gradient and DDP averages 4" in unfrozen
        assert "2 parameters require a gradient and DDP averages 4" in frozen
        assert "'extra.weight' was added or unfrozen after the model was wrapped" in added
        assert "'head.weight' was replaced after the model was wrapped" in replaced


# -- what is stepped on ----------------------------------------------------------------------------------------------


def _stepped(rank, engine, given):
    """No exchange; one that has not ended; and gradients that were added to after it."""
    said = []
    model, run, optimizer, wire = start(engine, dense(), given=given)
    before = model.body.weight.detach().clone()
    if engine == "ddp":
        backward(run.module, rank)
        with refused(said):
            optimizer.step()
        optimizer.zero_grad()
    if engine != "fsdp2":
        for step in range(2):
            with no_sync(engine, run, wire):
                backward(run, rank, step)
        with refused(said):
            optimizer.step()
        optimizer.zero_grad()
    for param in model.parameters():
        if param.requires_grad:  # by hand
            param.grad = torch.ones_like(param)
    with refused(said):
        optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(before, model.body.weight)
    for step in range(2):
        backward(run, rank, step)
        optimizer.step()
        optimizer.zero_grad()
    if engine != "fsdp2":
        backward(run, rank, 2)
        with no_sync(engine, run, wire):
            backward(run, rank, 3)
        if given or engine == "bare":
            with refused(said):
                optimizer.step()
    wire.detach()
    optimizer.step()  # nobody minds
    return said


@pytest.mark.parametrize("given", [True, False], ids=["given", "not given"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_stepped_on_and_was_not_exchanged_is_an_error(world2, engine, given):
    for said in world2.run(_stepped, engine, given, timeout=120.0):
        *never, late = said if engine != "fsdp2" and (given or engine == "bare") else (*said, None)
        assert len(never) == {"ddp": 3, "bare": 2, "fsdp2": 1}[engine]
        for text in never:
            assert "the gradient of 'body.weight' was not exchanged" in text
            assert {"ddp": "ddp.no_sync()", "bare": "wire.no_sync()", "fsdp2": "set_requires"}[engine] in text
        assert late is None or "has added to the gradient of 'body.weight' after it was averaged" in late


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 8), nn.Linear(24, 8)

    def forward(self, x):
        return self.one(torch.tanh(self.body(x)))


def _waits(rank):
    """DDP waits for a gradient that never comes, with one bucket and with several."""
    said = []
    for cap in (25, 0.0001):
        _, run, optimizer, wire = start("ddp", model=Either(), bucket_cap_mb=cap)
        backward(run, rank)
        with refused(said):
            optimizer.step()
        wire.detach()
    model, run, optimizer, wire = start("ddp")
    parametrize.register_parametrization(model.head, "weight", nn.Identity())  # DDP loses its hooks
    backward(run, rank)
    with refused(said):
        optimizer.step()
    wire.detach()
    model, run, optimizer, wire = start("ddp")
    backward(run, rank)
    optimizer.step()
    model.head.requires_grad_(False)
    with refused(said):
        backward(run, rank)
    model.head.requires_grad_(True)
    del model.head
    with refused(said):
        run(inputs(rank))
    wire.detach()
    return said


def test_what_ddp_waits_for_is_named(world2):
    for said in world2.run(_waits):
        assert "'two." in said[0]
        assert "'two." in said[1]
        assert "parametrize before wrapping" in said[2]
        assert "'head.bias' was frozen or taken out of the model after wrapping" in said[3]
        assert "'head.bias' was frozen or taken out of the model after wrapping" in said[4]
        assert all("find_unused_parameters=True" in text for text in said)


# -- what is fine ----------------------------------------------------------------------------------------------------


def _fine(rank, engine):
    """None of this is worth a word: accumulation, evaluation, no gradients, two steps, a frozen layer, a moved one."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, run, optimizer, wire = start(engine, dgc(0.1) if engine != "fsdp2" else topk(0.1))
        optimizer.step()  # no gradients at all
        for step in range(3):
            if engine != "fsdp2":
                with no_sync(engine, run, wire):
                    backward(run, rank, 2 * step)
            backward(run, rank, 2 * step + 1)
            optimizer.step()
            optimizer.step()  # once more on the same
            optimizer.zero_grad(set_to_none=step == 1)
            optimizer.step()
            with torch.no_grad():
                run(inputs(rank))
        assert get_optimizer_state_dict(model, torch.optim.AdamW(model.parameters()))  # which steps on zeros
        if engine == "ddp":
            run.eval()
            (run.module if rank else run)(inputs(rank))  # somebody looks at something
            run.train()
        if engine != "fsdp2":
            prune.l1_unstructured(model.body, "weight", 0.5)
            if engine == "bare":  # DDP itself loses its hooks there
                parametrize.register_parametrization(model.head, "weight", nn.Identity())
            for step in range(3, 5):
                backward(run, rank, step)
                optimizer.step()
                optimizer.zero_grad()
            prune.remove(model.body, "weight")
            if engine == "bare":
                parametrize.remove_parametrizations(model.head, "weight")
            backward(run, rank, 6)
            optimizer.step()
        wire.detach()
    return whole(model)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_fine_is_not_minded(world2, engine):
    a, b = world2.run(_fine, engine, timeout=120.0)
    assert torch.equal(a, b)


def _gan(rank, engine, order):
    """The generator's pass goes through the discriminator under no_sync, as docs/engines.md has it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maker, judge = (nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, n)) for n in (16, 1))
        _, make, opt_make, wire_make = start(engine, model=maker)
        _, judged, opt_judge, wire_judge = start(engine, model=judge, seed=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def judge_step(step):
            opt_judge.zero_grad()
            with no_sync(engine, judged, wire_judge):
                judged(inputs(rank, step)).square().mean().backward()
            loss = judged(make(inputs(rank, step + 50)).detach()).mean()
            scaler.scale(loss * (float("inf") if order == "skipped" and step == 1 else 1.0)).backward()
            scaler.step(opt_judge)

        def make_step(step):
            opt_make.zero_grad()
            with no_sync(engine, judged, wire_judge):
                scaler.scale(-judged(make(inputs(rank, step + 90))).mean()).backward()
            scaler.step(opt_make)

        for step in range(4):
            for part in (make_step, judge_step) if order == "maker first" else (judge_step, make_step):
                part(step)
            scaler.update()
        assert (wire_make.ledger.steps, wire_judge.ledger.steps) == (4, 4)
        for wire in (wire_make, wire_judge):
            wire.detach()
    return torch.cat([p.detach().flatten() for net in (maker, judge) for p in net.parameters()])


@pytest.mark.parametrize("engine", ["bare", "ddp"])
def test_a_generator_passes_through_the_discriminator(world2, engine):
    for order in ("judge first", "maker first", "skipped"):
        a, b = world2.run(_gan, engine, order)
        assert torch.equal(a, b)


# -- two that average ------------------------------------------------------------------------------------------------


def _twice(rank):
    said = []
    model = Net()
    ddp = DistributedDataParallel(model)
    parts = [ddp.module, model.head, nn.Sequential(model)]
    for part in parts:
        with refused(said):
            thinwire.attach(part, dense(), process_group=dist.group.WORLD)
    del ddp, part, parts
    wire = thinwire.attach(model, dense(), process_group=dist.group.WORLD)  # it is gone
    backward(model, rank)
    again = DistributedDataParallel(model)
    with refused(said):
        again(inputs(rank))
    wire.detach()
    DistributedDataParallel(nn.Linear(2, 2))  # another is no obstacle
    return said


def test_a_model_inside_ddp_is_not_averaged_twice(world2):
    for said in world2.run(_twice):
        assert len(said) == 4
        for text in said[:3]:
            assert "is part of a DistributedDataParallel" in text
            assert "without process_group=" in text
        assert "wrapped in a DistributedDataParallel after attach" in said[3]
