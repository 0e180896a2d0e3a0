"""A copy of a model or an optimizer has no session, and the original keeps its own."""

import copy
import io
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import thinwire
from tests.engines.models import Net, batch, build, flat_parameters, loss_of
from tests.engines.sharded import build as build_sharded
from tests.engines.sharded import data, mesh_of, whole
from tests.engines.sharded import loss_of as sharded_loss
from thinwire import ThinwireError, dgc, topk


def saved(model):
    there = io.BytesIO()
    torch.save(model, there)
    return torch.load(io.BytesIO(there.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "multiprocessing": lambda model: ForkingPickler.loads(ForkingPickler.dumps(model)),
    "average": lambda model: AveragedModel(model, use_buffers=True).module,
}


def start(wrapped, seed=0):
    model, optimizer = build(seed)
    run = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
    options = {"kernels": "reference"} | ({} if wrapped else {"process_group": dist.group.WORLD})
    return model, run, optimizer, thinwire.attach(run, dgc(0.05), optimizer=optimizer, **options)


def step(run, optimizer, worker, number):
    optimizer.zero_grad()
    loss_of(run, batch(worker, number)).backward()
    optimizer.step()


def _copies(rank, wrapped):
    """Parameters of a run in which the model is copied all the time, and of the same run without."""
    ends = []
    for copied in (False, True):
        model, run, optimizer, wire = start(wrapped)
        step(run, optimizer, rank, 0)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if copied else None
        for number in range(1, 4):
            optimizer.zero_grad()
            loss_of(run, batch(rank, number)).backward()
            if copied:  # gradients are there
                for name, twin_of in COPIES.items():
                    of, exchanges = run if wrapped and name != "multiprocessing" else model, wire.ledger.steps
                    twin = twin_of(of)
                    twin = twin.module if isinstance(twin, DistributedDataParallel) else twin
                    assert torch.equal(flat_parameters(twin), flat_parameters(model)), name
                    assert all(p.grad is None for p in twin.parameters() if p.requires_grad) or "fork" in name
                    loss_of(twin, batch(rank, 50)).backward()
                    assert (wire.ledger.steps, twin.first.weight.grad is None) == (exchanges, False), name
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
                with torch.no_grad():
                    loss_of(average, batch(rank, 7))
        if average is not None:
            assert not torch.equal(flat_parameters(average.module), flat_parameters(model))
        ends.append(flat_parameters(model))
        assert wire.ledger.steps == 4
        wire.detach()
    return ends


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "ddp"])
def test_copies_do_nothing_and_the_original_goes_on(world2, wrapped):
    (expected, found), (other, _) = world2.run(_copies, wrapped)
    assert torch.equal(expected, found)
    assert torch.equal(expected, other)


def _attached_copies(rank, wrapped):
    """Copies that are attached themselves train as the original does."""
    _, run, optimizer, wire = start(wrapped)
    step(run, optimizer, rank, 0)
    ends, wires = [], []
    for twin_of in (copy.deepcopy, COPIES["pickle"], COPIES["twice"]):
        twin = twin_of(run)
        theirs = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
        options = {"kernels": "reference"} | ({} if wrapped else {"process_group": dist.group.WORLD})
        wires.append(thinwire.attach(twin, topk(0.05), optimizer=theirs, **options))
        for number in range(1, 4):
            step(twin, theirs, rank, number)
        ends.append(flat_parameters(twin))
        assert (wires[-1].ledger.steps, wire.ledger.steps) == (3, 1)
        assert wires[-1].ledger.wire_bytes < wires[-1].ledger.dense_bytes
        assert wires[-1].ledger.rows[0].error > 0
    step(run, optimizer, rank, 1)
    assert [one.ledger.steps for one in wires] == [3, 3, 3], "the original is not the copies'"
    for one in (wire, *wires):
        one.detach()
    late = copy.deepcopy(run)  # after detach
    options = {} if wrapped else {"process_group": dist.group.WORLD}
    thinwire.attach(late, thinwire.dense(), **options).detach()
    return torch.stack(ends)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "ddp"])
def test_a_copy_can_be_attached(world2, wrapped):
    a, b = world2.run(_attached_copies, wrapped)
    assert torch.equal(a, b)
    assert torch.equal(a[0], a[1])
    assert torch.equal(a[0], a[2])


def _optimizers(rank):
    """Copies of optimizers have no hooks of a session, and those that are part of a method can be attached."""
    model, run, optimizer, wire = start(False)
    step(run, optimizer, rank, 0)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for group in twin.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        twin.step()
    assert wire.step == 1
    step(run, optimizer, rank, 1)
    assert wire.step == 2
    wire.detach()
    model = Net()
    twin = copy.deepcopy((model, thinwire.optim.OneBitAdam(model.parameters(), freeze_step=1)))
    wire = thinwire.attach(twin[0], thinwire.onebit_adam(), optimizer=twin[1], process_group=dist.group.WORLD)
    for number in range(3):
        step(*twin, rank, number)
    assert wire.step == 3
    wire.detach()
    return flat_parameters(twin[0])


def test_copies_of_optimizers(world2):
    a, b = world2.run(_optimizers)
    assert torch.equal(a, b)


def _sessions(rank, folder):
    """What a session says where it is pickled or copied."""
    said = []
    for wrapped in (False, True):
        wire = start(wrapped)[-1]
        for tried in (lambda x: torch.save(x, io.BytesIO()), copy.deepcopy, pickle.dumps):
            with pytest.raises(ThinwireError) as caught:
                tried({"wire": wire})
            said.append(str(caught.value))
        torch.save({"wire": wire.state_dict()}, io.BytesIO())
        dcp.save({"wire": wire}, checkpoint_id=f"{folder}/{wrapped}")
        wire.detach()
    return said


def test_a_session_says_what_to_save(world2, tmp_path):
    for said in world2.run(_sessions, tmp_path):
        assert len(said) == 6
        assert all("wire.state_dict()" in text and "torch.distributed.checkpoint.save" in text for text in said)


def _parts_of_shards(rank):
    """torch copies no module that went through ``fully_shard``; parts of one and state dicts it does."""
    mesh = mesh_of(2, 1)
    model, optimizer = build_sharded(mesh)
    wire = thinwire.attach(
        model, topk(0.05), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
    )
    for number in range(3):
        sharded_loss(model, data(rank, number)).backward()
        if number == 1:
            copy.deepcopy(model.state_dict())
            pickle.dumps({"state": {k: v.full_tensor() for k, v in model.state_dict().items()}})
            plain = nn.Sequential(nn.Linear(3, 3))
            hooks = {
                k: copy.deepcopy(h) for k, h in model._forward_pre_hooks.items() if "thinwire" in type(h).__module__
            }
            assert len(hooks) == 2  # before_forward, recomputes
            plain._forward_pre_hooks.update(hooks)
            plain(torch.ones(1, 3)).sum().backward()
            pickle.loads(pickle.dumps(plain))(torch.ones(1, 3))
        optimizer.step()
        optimizer.zero_grad()
    steps = wire.ledger.steps
    wire.detach()
    return whole(model), steps


def test_hooks_on_a_sharded_model_are_copied_as_nothing(world2):
    (a, steps), (b, _) = world2.run(_parts_of_shards)
    assert steps == 3
    assert torch.equal(a, b)


def _pickled(rank, path):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    wire = thinwire.attach(model, thinwire.dense(), process_group=dist.group.WORLD)
    if rank == 0:
        torch.save(model, path)
    wire.detach()


def test_a_saved_model_is_read_where_thinwire_is_not_installed(world2, tmp_path):
    world2.run(_pickled, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['thinwire'] = None\n"
        f"import torch; m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "m(torch.ones(2, 3, requires_grad=True)).sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
