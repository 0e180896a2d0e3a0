"""Parameters that change their memory format, dtype or shape after they were wrapped or attached."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.sharded import mesh_of
from thinwire import ThinwireError, dgc, onebit_adam, powersgd, topk
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.methods import randk
from thinwire.optim import OneBitAdam

SHAPES = {"image": (8, 6, 3, 3), "volume": (4, 3, 2, 3, 2), "matrix": (24, 20), "bias": (8,)}
STEPS = 6


class Given(nn.Module):
    """Its gradients are those that the test gives, whatever the layout."""

    def __init__(self) -> None:
        super().__init__()
        for number, (name, shape) in enumerate(SHAPES.items()):
            values = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, worker: int, step: int) -> torch.Tensor:
        return sum((p * wanted(p.shape, worker, step).to(p)).sum() for p in self.parameters())


def wanted(shape, worker, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + 10 * len(shape) + worker))


def channels_last(model):
    model.image.data = model.image.data.to(memory_format=torch.channels_last)
    model.volume.data = model.volume.data.to(memory_format=torch.channels_last_3d)


def whole_model(model):
    """As users write it; the 5-D parameter would be refused, so it is moved out of the way."""
    volume = model._parameters.pop("volume")
    model.to(memory_format=torch.channels_last)
    model._parameters["volume"] = volume


def transposed(model):
    model.matrix.data = model.matrix.data.t().contiguous().t()


def contiguous(model):
    for param in model.parameters():
        param.data = param.data.contiguous()


CHANGES = {
    "none": {},
    "before": {-1: channels_last},
    "first": {1: channels_last, 2: transposed},
    "later": {2: whole_model, 4: transposed},
    "and back": {-1: transposed, 1: channels_last, 4: contiguous},
    "in between": {3.5: channels_last},
}
BEFORE = ("none", "before")  # with views of buckets, nothing may change after the first backward


def logical(model):
    return torch.cat([model.get_parameter(name).detach().contiguous().flatten() for name in SHAPES])


def build(method):
    model = Given()
    if method.name == "onebit_adam":
        return model, OneBitAdam(model.parameters(), lr=0.01, freeze_step=2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if method.absorbs else 0.0)


def _trained(rank, method, changes, options):
    """Parameters at the end, and by how much sent and left differ from what was compensated."""
    model, optimizer = build(method)
    run = model if options is None else DistributedDataParallel(model, **options)
    changes.get(-1, lambda _: None)(model)
    where = {"process_group": dist.group.WORLD} if options is None else {}
    wire = thinwire.attach(run, method, optimizer=optimizer, kernels="reference", **where)
    received = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(STEPS):
        changes.get(step, lambda _: None)(model)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        run(rank, step).backward()
        for name, param in model.named_parameters():
            received[name] += param.grad
        changes.get(step + 0.5, lambda _: None)(model)
        optimizer.step()
    assert wire.ledger.wire_bytes < wire.ledger.dense_bytes
    left = {name: state.now.get("residual") for name, state in wire.workers[0].local.items()}
    wire.detach()
    lost = {}
    for name, shape in SHAPES.items():
        compensated = sum(wanted(shape, rank, step) for step in range(STEPS))
        both = torch.stack([compensated, left[name] if left[name] is not None else torch.zeros(shape)])
        dist.all_reduce(both)
        lost[name] = float((2 * received[name] + both[1] - both[0]).abs().max())
    return logical(model), lost


ENGINES = {
    "bare": None,
    "ddp": {},
    "ddp-view": {"gradient_as_bucket_view": True},
    "ddp-unused": {"find_unused_parameters": True, "bucket_cap_mb": 0.001},
}


def _all(rank, options, methods, names):
    torch.set_num_threads(1)
    return {(m.name, c): _trained(rank, m, CHANGES[c], options) for m in methods for c in names}


@pytest.mark.filterwarnings("ignore:Grad strides do not match")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_layout_is_followed(world2, engine):
    """Residuals stay with their elements: a run whose parameters move is, bit for bit, the run in which they do not."""
    methods = [topk(0.05), dgc(0.05, masking=False)] if engine in ("bare", "ddp") else [topk(0.05)]
    names = BEFORE if engine == "ddp-view" else list(CHANGES)
    ours, theirs = world2.run(_all, ENGINES[engine], methods, names, timeout=200.0)
    for (method, change), (parameters, lost) in ours.items():
        assert torch.equal(parameters, theirs[method, change][0]), (method, change)
        assert torch.equal(parameters, ours[method, "none"][0]), (method, change)
        assert method != "topk" or max(lost.values()) < 1e-4, (change, lost)


@pytest.mark.parametrize("engine", ["bare", "ddp"])
def test_methods_that_know_a_layout(world2, engine):
    methods = [powersgd(2), topk(0.05, route="two_phase"), randk(0.1), onebit_adam()]
    ours, theirs = world2.run(_all, ENGINES[engine], methods, ["none", "later"], timeout=200.0)
    for (method, change), (parameters, lost) in ours.items():
        assert torch.equal(parameters, theirs[method, change][0]), (method, change)
        if method in ("powersgd", "topk"):
            assert max(lost.values()) < 1e-4, (method, lost)


def test_the_simulator_follows_too():
    ends = []
    for name in ("none", "first"):
        model, optimizer = build(topk(0.05))
        sim = SimulatedWorkers(model, topk(0.05), optimizer, 2, kernels="reference")
        for step in range(STEPS):
            CHANGES[name].get(step, lambda _: None)(model)
            sim.step(lambda worker, step=step, model=model: model(worker, step))
        assert sim.session.ledger.rows[0].error > 0
        sim.session.detach()
        ends.append(logical(model))
    assert torch.equal(*ends)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.to(self.first.weight.dtype))))


def halved(model):
    model.last.weight.data = model.last.weight.data[:8].clone()
    model.last.bias.data = model.last.bias.data[:8].clone()


def gaps(model):
    model.first.weight.data = torch.zeros(32, 32)[:, ::2]


WRONG = {
    "bfloat16": (lambda model: model.to(torch.bfloat16), "'first.weight' was torch.float32 at attach"),
    "half": (lambda model: model.last.half(), "'last.weight' was torch.float32 at attach and is torch.float16 now"),
    "double": (lambda model: model.double(), "'first.weight' was torch.float32 at attach and is torch.float64 now"),
    "shape": (halved, "'last.weight' was of shape (32, 16)"),
    "meta": (lambda model: model.to("meta"), "'first.weight' was replaced after "),
    "gaps": (gaps, "'first.weight' was of strides (16, 1) at attach and is of strides (32, 2) now"),
}  # fmt: skip
WRONG["shape"] = (halved, "'last.weight' was of shape (16, 32) at attach and is of shape (8, 32) now")


def _refused(rank, engine):
    said = {}
    for name, (change, _) in WRONG.items():
        if engine == "fsdp2" and name in ("shape", "meta", "gaps"):  # FSDP2's own error comes first
            continue
        torch.manual_seed(0)
        model = Small()
        options = {"kernels": "reference"}
        if engine == "fsdp2":
            mesh = mesh_of(2, 1)
            torch.distributed.fsdp.fully_shard(model, mesh=mesh["shard"])
            options["fsdp2"] = thinwire.Fsdp2Options(mesh["replicate"])
        elif engine == "bare":
            options["process_group"] = dist.group.WORLD
        run = DistributedDataParallel(model) if engine == "ddp" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wire = thinwire.attach(run, topk(0.1), optimizer=optimizer, **options)
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))
        run(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        pending = wire.state_dict()
        change(model)
        with pytest.raises(ThinwireError) as caught:
            run(x)
        said[name] = str(caught.value)
        wire.detach()
        if name == "bfloat16" and engine != "fsdp2":  # the way out that the message names
            run = DistributedDataParallel(model) if engine == "ddp" else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            wire = thinwire.attach(run, topk(0.1), optimizer=optimizer, **options)
            wire.load_state_dict(pending)
            residual = wire.workers[0].local["first.weight"].now["residual"]
            assert residual.abs().max() > 0
            run(x).square().sum().backward()
            optimizer.step()
            wire.detach()
    return said


@pytest.mark.parametrize("engine", ["bare", "ddp", "fsdp2"])
def test_what_can_not_be_followed_is_said_at_the_next_forward(world2, engine):
    for said in world2.run(_refused, engine, timeout=200.0):
        for name, text in said.items():
            assert WRONG[name][1] in text, (name, text)
            assert "attach again" in text
            assert ("load_state_dict(state)" in text) == (name not in ("shape", "meta"))


def _views(rank):
    """With views of the buckets, DDP itself goes wrong where a layout changes in mid-run."""
    said = []
    for change in (channels_last, transposed):
        model = Given()
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wire = thinwire.attach(ddp, topk(0.1), optimizer=optimizer, kernels="reference")
        ddp(rank, 0).backward()
        optimizer.step()
        change(model)
        for _ in range(2):  # it stays so
            with pytest.raises(ThinwireError) as caught:
                ddp(rank, 1)
            said.append(str(caught.value))
        wire.detach()
    return said


def test_views_of_buckets_keep_their_layout(world2):
    for said in world2.run(_views):
        assert len(said) == 4
        assert all("gradient_as_bucket_view=True" in text and "attach again" in text for text in said)


def _frozen_for_a_while(rank, wrapped):
    """A layer frozen in mid-run stands still, and goes on as if it had been unused."""
    torch.manual_seed(0)
    model = Small()
    options = {} if wrapped else {"process_group": dist.group.WORLD}
    run = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wire = thinwire.attach(run, topk(0.1), optimizer=optimizer, kernels="reference", **options)
    for step in range(6):
        model.first.requires_grad_(step not in (2, 3))
        before = model.first.weight.detach().clone()
        optimizer.zero_grad()
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + rank))
        run(x).square().sum().backward()
        optimizer.step()
        assert torch.equal(before, model.first.weight) == (step in (2, 3))
    wire.detach()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "ddp"])
def test_a_layer_may_be_frozen_and_thawed(world2, wrapped):
    a, b = world2.run(_frozen_for_a_while, wrapped)
    assert torch.equal(a, b)
