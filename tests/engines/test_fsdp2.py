"""FSDP2 on real gloo processes: both axes, what is equal to plain FSDP2, what is saved, what is skipped."""

import copy
import gc
import threading
import weakref
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import thinwire
from tests.engines.models import build as build_ddp
from tests.engines.models import flat_parameters, train_ddp
from tests.engines.sharded import build, data, grouped, loss_of, mesh_of, train, whole
from thinwire import Rule, ThinwireError, dense, dgc, ef21, onebit_adam, powersgd, topk
from thinwire.comm import gloo_p2p
from thinwire.compressors import QSGD, Cast, Quantize
from thinwire.core.sharding import own
from thinwire.engines.fsdp2.engine import Fsdp2, check_method
from thinwire.memories import ErrorFeedback, NoMemory
from thinwire.policies import LGreCo

HALF = {"spare": False}
KEEPS_UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
needs_unused = pytest.mark.skipif(not KEEPS_UNUSED, reason="this torch leaves unused parameters out of the buffer")
STEPS = 8


def threads():
    """All but the one of tqdm, whose progress bars torch.compile may use."""
    return sum(thread.name != "tqdm_monitor" for thread in threading.enumerate())


def _run(rank, shape, runs):
    """For each run, all parameters after it and sums of what the ledger holds."""
    mesh, answers = mesh_of(*shape), []
    before = threads()
    for options in runs:
        with mock.patch.object(gloo_p2p, "LEAST", 0):  # messages go as long ones do
            model, _, wire = train(rank, mesh, **{"steps": STEPS, **options})
        facts = {}
        if wire is not None:
            rows = list(wire.ledger.rows)
            for key in (f"{what}{plain}_bytes" for what in ("within_node", "gather") for plain in ("", "_dense")):
                facts[key] = sum(getattr(row, key) for row in rows)
            for key in ("wire_bytes", "dense_bytes"):
                facts[key] = sum(getattr(row, key) for row in rows)
            facts.update(error=rows[0].error, report=wire.report(), step=wire.step, notes=wire.ledger.notes)
            wire.detach()
        assert threads() == before
        answers.append((whole(model), facts))
    return answers


def ran(world, shape, *runs, timeout=100.0):
    """The answers of rank 0; all ranks must hold the same model."""
    results = world.run(_run, shape, list(runs), timeout=timeout)
    for other in results[1:]:
        for (mine, _), (theirs, _) in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs), "replicas drifted apart"
    return results[0]


EXACT = {"method": dense(), "reduce_scatter": Cast()}
SHORT = {"method": dense(), "reduce_scatter": QSGD(8)}


def test_identity_is_plain_fsdp2(world2, world4):
    for world, other in ((world2, (2, 1)), (world4, (2, 2))):
        (expected, _), *exchanged = ran(world, (1, world.size), {}, EXACT) + ran(world, other, EXACT)
        for got, facts in exchanged:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
            assert facts["step"] == STEPS


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(HALF, marks=needs_unused),
        {"accumulate": 3},
        {"clip": 0.1, "optimizer": "adamw"},
        {"compiled": True},
        {"mixed": True},
    ],
    ids=["plain", "unused", "accumulation", "clip", "compiled", "mixed"],
)
def test_eight_bits_of_reduce_scatter(world2, options):
    plain, exact, short = ran(world2, (1, 2), options, options | EXACT, options | SHORT)
    if options != HALF:  # there plain FSDP2 leaves out the weight decay of what is unused, as its gradient is None
        torch.testing.assert_close(exact[0], plain[0], rtol=1e-6, atol=1e-6)
    assert 0 < (short[0] - exact[0]).abs().max() < 0.1
    assert short[1]["within_node_bytes"] <= 0.27 * short[1]["within_node_dense_bytes"]
    assert exact[1]["within_node_bytes"] == exact[1]["within_node_dense_bytes"]
    assert "| ratio of the reduce-scatter to fp32           | 4.0" in short[1]["report"]


def test_four_bits_of_reduce_scatter_and_eight_of_all_gather(world2):
    gathering = EXACT | {"all_gather": Quantize(8)}
    four = {"method": dense(), "reduce_scatter": QSGD(4, block=64)}
    runs = ran(world2, (1, 2), EXACT, four, gathering, gathering | {"mixed": True}, EXACT | {"mixed": True})
    exact, short, gathered, mixed, exact_mixed = runs
    assert 0 < (short[0] - exact[0]).abs().max() < 0.3
    assert short[1]["within_node_bytes"] <= 0.15 * short[1]["within_node_dense_bytes"]
    for (got, facts), (expected, _) in ((gathered, exact), (mixed, exact_mixed)):
        assert 0 < (got - expected).abs().max() < 0.1
        assert 0 < facts["gather_bytes"] <= 0.27 * facts["gather_dense_bytes"]
        assert facts["within_node_bytes"] == facts["within_node_dense_bytes"]
    assert exact[1]["gather_bytes"] == 0
    assert "| ratio of the all-gather to fp32" in gathered[1]["report"]


@needs_unused
def test_a_reduce_scatter_that_remembers(world2):
    remembering = {"method": dense(), "reduce_scatter": Rule(QSGD(8), ErrorFeedback())}
    exact, short, remembered = ran(world2, (1, 2), EXACT, SHORT, remembering)
    assert 0 < (remembered[0] - exact[0]).norm() < (short[0] - exact[0]).norm()
    assert any("remembers what it lost: " in note for note in remembered[1]["notes"])


METHODS = {
    "dgc": {"method": dgc(0.001)},
    "dgc-clip": {"method": dgc(0.02, clip=0.1)},
    "topk": {"method": topk(0.01), "optimizer": "adamw"},
    "two-phase": {"method": topk(0.05, route="two_phase"), "optimizer": "adamw"},
    "both": {"method": topk(0.05), "reduce_scatter": QSGD(8)},
    "ef21": {"method": ef21(0.05)},
    "powersgd": {"method": powersgd(2)},
    "1-bit": {"method": onebit_adam(), "optimizer": "1-bit"},
    "planned": {"method": topk(0.05), "policy": LGreCo(every=4, looks=2)},
}


def test_compression_between_replicas(world4):
    steps = {name: 3 if name in ("dgc-clip", "two-phase", "both") else 10 for name in METHODS}
    results = ran(world4, (2, 2), *({"steps": steps[name], **options} for name, options in METHODS.items()))
    found = {name: facts for name, (_, facts) in zip(METHODS, results, strict=True)}
    for name, facts in found.items():
        assert facts["wire_bytes"] < facts["dense_bytes"]
        assert (facts["error"] > 0) != (name == "1-bit"), "which begins with a dense step"
        assert facts["step"] == steps[name]
    assert found["both"]["within_node_bytes"] <= 0.27 * found["both"]["within_node_dense_bytes"]
    assert any("the variance is frozen" in note for note in found["1-bit"]["notes"])
    assert sum("L-GreCo plans" in note for note in found["planned"]["notes"]) == 2


def _conserves(rank, method):
    """Of one weight with known gradients: what was compensated, what all received, what is left; and the bytes."""
    mesh = mesh_of(2, 2)
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(64, 801, bias=False), mesh=mesh["shard"])
    momentum = 0.9 if method.absorbs else 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    wire = thinwire.attach(model, method, optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"]))
    compensated, velocity, received = 0, 0, 0
    for step in range(20):
        parts = []
        for worker in (rank // 2 * 2, rank // 2 * 2 + 1):  # those whose gradients meet in this replica
            x, y = data_of(worker, step)
            parts.append(y.t() @ x)
            if worker == rank:
                (model(x) * y).sum().backward()
        received = received + model.weight.grad.full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        velocity = momentum * velocity + (parts[0] + parts[1]) / 2
        compensated = compensated + velocity
    left = wire.state_dict()["local"]["weight"]["residual"].full_tensor()[rank // 2]
    rows, size = wire.ledger.rows, wire.workers[0].local["weight"].now["residual"].numel()
    ratio = rows[-1].dense_bytes / rows[-1].wire_bytes
    weight = model.weight.full_tensor().detach()
    wire.detach()
    return compensated, received, left, weight, ratio, size


def data_of(worker, step):
    return torch.randn(6, 865, generator=torch.Generator().manual_seed(100 * step + worker)).split([64, 801], 1)


@pytest.mark.parametrize("method", [dgc(0.001, masking=False), topk(0.01)], ids=["dgc", "topk"])
def test_sent_and_left_is_what_was_asked_of_each_shard(world4, method):
    results = world4.run(_conserves, method, timeout=100.0)
    for result in results[1:]:
        assert torch.equal(result[3], results[0][3])
        assert torch.equal(result[1], results[0][1])
    (compensated, received, left, _, ratio, size), _, other, _ = results
    assert ratio > 50
    assert size == 401 * 64  # a shard
    assert left.abs().max() > 0
    torch.testing.assert_close(2 * received + left + other[2], compensated + other[0], rtol=1e-4, atol=1e-3)


def _steps(rank, model, optimizer, first, last, poisoned=(), scaler=None):
    for step in range(first, last):
        loss = loss_of(model, data(rank, step))
        if rank in poisoned:
            loss = loss * float("nan")
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()


def _pending(wire):
    """All residuals, in whole rows of all replicas."""
    local = wire.state_dict()["local"]
    return {name: state["residual"].full_tensor() for name, state in local.items() if "residual" in state}


SAVED = {"dgc": (dgc(0.02), "sgd"), "topk": (topk(0.05), "adamw")}


def _whole_run(rank, shape, name, folder):
    """The end of an unbroken run, and of one that was saved in the middle and resumed by another model."""
    mesh, (method, kind) = mesh_of(*shape), SAVED[name]
    model, optimizer = build(mesh, kind)
    wire = thinwire.attach(model, method, optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"]))
    _steps(rank, model, optimizer, 0, 4)
    dcp.save({"model": model.state_dict(), "wire": wire}, checkpoint_id=f"{folder}/dcp")
    pending, state_of_optimizer = _pending(wire), copy.deepcopy(optimizer.state_dict())
    torch.save(wire.state_dict(), f"{folder}/{rank}.pt")
    _steps(rank, model, optimizer, 4, 7)
    end = whole(model)
    wire.detach()
    ends = []
    for how in ("dcp", "folder", "file"):
        model, optimizer = build(mesh, kind, seed=1)
        wire = thinwire.attach(
            model, method, optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
        )
        state = {"model": model.state_dict(), **({"wire": wire} if how == "dcp" else {})}
        dcp.load(state, checkpoint_id=f"{folder}/dcp")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(copy.deepcopy(state_of_optimizer))
        if how == "folder":
            wire.load(f"{folder}/dcp")
        if how == "file":
            wire.load_state_dict(torch.load(f"{folder}/{rank}.pt", weights_only=False))
            with pytest.raises(ThinwireError, match=r"ranks differ|state of rank|state of shard"):
                wire.load_state_dict(torch.load(f"{folder}/{rank ^ 1}.pt", weights_only=False))
        _steps(rank, model, optimizer, 4, 7)
        ends.append(whole(model))
        wire.detach()
    return end, ends, pending


def _resized(rank, shape, name, folder):
    mesh, (method, kind) = mesh_of(*shape), SAVED[name]
    model, optimizer = build(mesh, kind)
    wire = thinwire.attach(model, method, optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"]))
    with pytest.raises(ThinwireError, match="saved by 2 workers"):
        wire.load(f"{folder}/dcp")
    wire.load(f"{folder}/dcp", on_world_change="fold")
    pending, step = _pending(wire), wire.step
    _steps(rank, model, optimizer, 4, 5)
    wire.detach()
    return pending, step


@pytest.mark.parametrize("name", SAVED)
def test_checkpoints(world2, world4, tmp_path, name):
    results = world4.run(_whole_run, (2, 2), name, tmp_path, timeout=100.0)
    saved = results[0][2]
    assert max(float(rows.abs().max()) for rows in saved.values()) > 0
    for end, ends, _ in results:
        for again in ends:
            assert torch.equal(again, end)
    for world, shape in ((world2, (1, 2)), (world4, (4, 1))):
        for pending, step in world.run(_resized, shape, name, tmp_path, timeout=100.0):
            assert step == 4
            for unit, rows in pending.items():
                torch.testing.assert_close(rows.double().mean(0), saved[unit].double().mean(0), rtol=1e-6, atol=1e-9)


def _skips(rank, with_scaler):
    """A nonfinite gradient on one rank: nobody steps, and nobody remembers."""
    mesh = mesh_of(2, 2)
    model, optimizer = build(mesh)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if with_scaler else None
    nonfinite = []

    def poison(param):
        if nonfinite and rank == 3:  # one shard of one replica
            own(param.grad).view(-1)[-1] = torch.nan

    model.tied.weight.register_post_accumulate_grad_hook(poison)
    wire = thinwire.attach(
        model, dgc(0.02), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"]), scaler=scaler
    )
    _steps(rank, model, optimizer, 0, 2, scaler=scaler)
    before, pending, step = whole(model), _pending(wire), wire.step
    nonfinite.append(1)
    _steps(rank, model, optimizer, 2, 3, scaler=scaler)
    nonfinite.clear()
    after = _pending(wire)
    same = torch.equal(before, whole(model)) and all(torch.equal(pending[k], after[k]) for k in pending)
    same = same and wire.step == step
    skipped = wire.ledger.skipped
    notes = [note for note in wire.ledger.notes if "not finite" in note]
    _steps(rank, model, optimizer, 3, 5, scaler=scaler)
    moved = whole(model)
    wire.detach()
    return same, skipped, notes, bool(moved.isfinite().all()) and not torch.equal(moved, before)


@pytest.mark.parametrize("with_scaler", [False, True], ids=["plain", "scaler"])
def test_a_bad_gradient_on_one_rank_skips_on_all(world4, with_scaler):
    for same, skipped, notes, moved in world4.run(_skips, with_scaler, timeout=100.0):
        assert same
        assert skipped == 1
        assert notes
        assert moved


def _errors(rank):
    mesh = mesh_of(1, 2)
    messages = {}

    def refused(name, *args, **options):
        with pytest.raises(ThinwireError) as caught:
            thinwire.attach(*args, **grouped(options))
        messages[name] = str(caught.value)

    native = fully_shard(nn.Linear(8, 8), mesh=mesh)
    refused("native", native, dense())
    refused("fsdp1", FullyShardedDataParallel(nn.Linear(8, 8), device_id=torch.device("cpu")), dense())
    model, optimizer = build(mesh)
    refused("nothing", model, topk(0.1), optimizer=optimizer)
    refused("dimensions", model, dense(), replicate=mesh)
    refused("same axis", model, dense(), replicate=mesh["shard"])
    refused("nodes", model, dense(), ranks_per_node=2)
    refused("biased", model, dense(), reduce_scatter=thinwire.compressors.TopK(0.1))
    refused("zeros", model, dense(), all_gather=thinwire.compressors.TopK(0.1))
    refused("noise", model, dense(), all_gather=QSGD(2))
    refused("matrices", model, dense(), all_gather=thinwire.compressors.PowerSGD(1))
    refused("momentum", model, dense(), reduce_scatter=Rule(QSGD(8), thinwire.memories.Momentum()))
    refused("mean", model, dense(), optimizer=optimizer, reduce_scatter=Rule(QSGD(8), thinwire.memories.EF21()))
    refused("no optimizer", model, dense(), reduce_scatter=Rule(QSGD(8), ErrorFeedback()))
    refused("ranks differ", model, dense(), reduce_scatter=QSGD(8, block=32 + rank))
    wire = thinwire.attach(
        model, dense(), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(reduce_scatter=Rule(QSGD(8), NoMemory()))
    )
    refused("twice", model, dense(), reduce_scatter=QSGD(8))
    with pytest.raises(ThinwireError) as caught:
        wire.set_method(topk(0.1))
    messages["later"] = str(caught.value)
    wire.detach()
    _steps(rank, model, optimizer, 0, 2)  # as plain FSDP2
    with torch.device("meta"):
        blank = nn.Linear(8, 8)
    refused("meta", fully_shard(blank, mesh=mesh["shard"]), dense())
    refused("ddp", DistributedDataParallel(nn.Linear(2, 2)), dense(), replicate=mesh["replicate"])
    with pytest.raises(ThinwireError) as caught:
        check_method(model, "set_nonsense", "9.9")
    messages["version"] = str(caught.value)
    return messages


def test_errors(world2):
    expected = {
        "native": 'native HSDP.*fully_shard(module, mesh=mesh["shard"]) instead of fully_shard(module, mesh=mesh)',
        "fsdp1": "FSDP1) is not supported; replace it by torch.distributed.fsdp.fully_shard(model)",
        "nothing": "topk has nothing to compress",
        "dimensions": "replicate is a mesh of 2 dimensions; it must have one",
        "same axis": "do not make a mesh",
        "nodes": "ranks_per_node= is for DDP",
        "biased": "TopK is biased, and NoMemory forgets",
        "zeros": "TopK is biased, and NoMemory forgets",
        "noise": "all_gather=QSGD adds noise of 2",
        "matrices": "all_gather=PowerSGD needs matrices",
        "momentum": "reduce_scatter with Momentum",
        "mean": "reduce_scatter with EF21, which does something with the mean",
        "no optimizer": "pass optimizer=",
        "ranks differ": "ranks differ: rank 0 has reduce_scatter: QSGD(bits=8, block=32, norm='l2')",
        "twice": "dense is attached to this model; call wire.set_method(), or wire.detach() first",
        "later": "topk has nothing to compress",
        "meta": "on the meta device",
        "ddp": "this model has no shards",
        "version": f"set_nonsense(), which came with torch 9.9; here is {torch.__version__}",
    }
    for messages in world2.run(_errors, timeout=100.0):
        assert messages.keys() == expected.keys()
        for name, parts in expected.items():
            assert all(part in messages[name] for part in parts.split(".*")), messages[name]


def _compiled(rank, how, method):
    model, optimizer = build_ddp()
    torch._dynamo.reset()
    inner = torch.compile(model, backend="aot_eager") if how == "inside" else model
    ddp = DistributedDataParallel(inner)
    run = torch.compile(ddp, backend="aot_eager") if how == "outside" else ddp
    wire = thinwire.attach(ddp, method, optimizer=optimizer)
    from tests.engines import models

    for step in range(STEPS):
        optimizer.zero_grad()
        models.loss_of(run, models.batch(rank, step)).backward()
        optimizer.step()
    sent = wire.ledger.wire_bytes, wire.ledger.dense_bytes
    assert not any("_orig_mod" in unit.name for unit in wire.units)  # a checkpoint is the same without compile
    wire.detach()
    return flat_parameters(model), sent


def _eager(rank, method):
    parameters, wire = train_ddp(rank, method, STEPS)
    wire.detach()
    return parameters


@pytest.mark.parametrize("how", ["inside", "outside"])
def test_compiled_ddp_equals_eager(world2, how):
    method = dgc(0.05)
    for (got, (sent, plain)), expected in zip(
        world2.run(_compiled, how, method, timeout=100.0), world2.run(_eager, method), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert sent < plain


def _accumulates(rank):
    mesh = mesh_of(2, 1)
    model, optimizer = build(mesh)
    wire = thinwire.attach(
        model, topk(0.1), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
    )
    loss_of(model, data(rank, 0)).backward()
    with pytest.warns(UserWarning, match=r"set_requires_gradient_sync\(False\)"):
        loss_of(model, data(rank, 1)).backward()
    wire.detach()


def test_accumulation_of_exchanged_gradients_is_a_warning(world2):
    world2.run(_accumulates)


def _evaluates_then_trains(rank):
    """An evaluation leaves the root whole; one replica uses a layer that the other does not."""
    mesh = mesh_of(2, 1)
    model, optimizer = build(mesh)
    with torch.no_grad():
        model(data(rank, 0))
    wire = thinwire.attach(
        model, topk(0.1), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
    )
    spare = model.spare.weight
    for step in range(3):
        used = step == 1 and rank == 1
        loss_of(model, data(rank, step), spare=used).backward()
        there = spare.grad is not None
        assert there == (step == 1), (step, rank)
        optimizer.step()
        optimizer.zero_grad()
    result = whole(model)
    wire.detach()
    return result


def test_what_one_replica_uses(world2):
    one, other = world2.run(_evaluates_then_trains)
    assert torch.equal(one, other)


class Stack(nn.Module):
    """Blocks, checkpointed or not, behind a layer of the root's own."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.reentrant = nn.Linear(8, 24), reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(24, 5)

    def forward(self, x, blocks=3):
        x = self.first(x)
        for block in self.blocks[:blocks]:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return self.last(x)


def _stack(mesh, reentrant=None, **options):
    torch.manual_seed(0)
    model = Stack(reentrant)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"], **options)
    fully_shard(model, mesh=mesh["shard"], **options)
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def _x(rank, step):
    return data(rank, step)[:, :8]


def _checkpointed(rank):
    """Residuals and the number of exchanges of the same steps, with activations kept and recomputed."""
    mesh, results = mesh_of(2, 1), {}
    for how in ("kept", False, True, "method", "whole kept", "whole"):
        model, optimizer = _stack(mesh, {"method": True}.get(how, how if isinstance(how, bool) else None))
        if how == "method":
            model.run = model.forward
            register_fsdp_forward_method(model, "run")
        wire = thinwire.attach(
            model, topk(0.1), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
        )
        for step in range(3):
            if str(how).startswith("whole"):  # of two runs in a pass, the second with more blocks than the first
                run = model if how == "whole kept" else partial(checkpoint, model, use_reentrant=False)
                loss = sum(run(_x(rank, step + 10 * i), 1 + i).square().mean() for i in range(2))
            else:
                loss = (model.run if how == "method" else model)(_x(rank, step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        left = torch.cat([rows.flatten() for _, rows in sorted(_pending(wire).items())])
        results[how] = whole(model), left, len(wire.ledger.rows), wire.ledger.skipped, wire.ledger.wire_bytes
        wire.detach()
    return results


def test_recomputing_activations_changes_nothing(world2):
    results = world2.run(_checkpointed)
    for one in results:
        for how, kept in ((False, "kept"), (True, "kept"), ("method", "kept"), ("whole", "whole kept")):
            assert torch.equal(one[how][0], results[0][how][0]), how
            torch.testing.assert_close(one[how][:2], one[kept][:2], rtol=1e-5, atol=1e-6)
            assert one[how][2:] == one[kept][2:], how
            assert one[how][2:4] == (3, 0), how


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("this backward fails")


def _life(rank):
    """What may happen to a model around its steps: a pass that dies, a layer that is unfrozen, and its end."""
    mesh = mesh_of(2, 1)
    model, optimizer = _stack(mesh)
    model.run = model.forward
    register_fsdp_forward_method(model, "run")
    model.last.requires_grad_(False)
    wire = thinwire.attach(
        model, topk(0.1), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
    )
    with pytest.raises(ValueError, match="fails"):
        model.run(_Fails.apply(_x(rank, 0).requires_grad_())).sum().backward()
    model._get_fsdp_state()._reset_iter_state()  # reset_iter_state() where torch has it
    optimizer.zero_grad()
    for step in range(2):
        model.run(_x(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert wire.step == 2
    after = whole(model)
    model.last.requires_grad_(True)
    with pytest.raises(ThinwireError, match=r"'last.weight' required no gradient at attach .* detach\(\) and attach"):
        model(_x(rank, 3))
    gone = weakref.ref(model), weakref.ref(wire)
    del model, optimizer, wire
    gc.collect()
    return after, [it() is None for it in gone]


@needs_unused  # where torch has that, it can also begin anew after an error in backward
def test_a_dead_pass_an_unfrozen_layer_and_the_end(world2):
    results = world2.run(_life)
    assert torch.equal(results[0][0], results[1][0])
    assert all(freed == [True, True] for _, freed in results)


def _shards_alone(rank):
    mesh = mesh_of(1, 2)
    model, optimizer = _stack(mesh)
    with torch.no_grad():
        exact = model(_x(rank, 0))
        wire = thinwire.attach(model, dense(), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(all_gather=Quantize(4)))
        rounded = model(_x(rank, 0))
        wire.detach()
        again = model(_x(rank, 0))
    sent = {}
    for name, policy in {
        "fp32": (),
        "bf16": (torch.bfloat16,),
        "fp32 of bf16": (torch.bfloat16, torch.float32),
    }.items():
        model, optimizer = _stack(mesh, mp_policy=MixedPrecisionPolicy(*policy))
        wire = thinwire.attach(model, dense(), optimizer=optimizer)
        model(_x(rank, 0)).float().square().mean().backward()
        sent[name] = wire.ledger.rows[0].within_node_bytes
        wire.detach()
    drawing = Quantize(8, rounding="stochastic")
    with pytest.raises(ThinwireError, match="draws anew in each step"):
        thinwire.attach(model, dense(), fsdp2=thinwire.Fsdp2Options(all_gather=drawing))
    thinwire.attach(model, dense(), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(all_gather=drawing)).detach()
    return exact, rounded, again, sent


def _two_groups(rank):
    """A module whose parameters are sharded over two meshes of the same ranks; what a refused attach leaves."""
    common = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_common")
    if not hasattr(common, "ShardPlacementResult"):
        return None
    mesh, model = mesh_of(1, 2), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other = common.FSDPMeshInfo(DeviceMesh.from_group(dist.new_group([0, 1]), "cpu"), shard_mesh_dim=0)
    theirs = common.ShardPlacementResult(Shard(0), other)
    apart = {id(param) for param in model[1].parameters()}
    fully_shard(model, mesh=mesh["shard"], shard_placement_fn=lambda p: theirs if id(p) in apart else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ThinwireError, match="the model has 2 groups of parameters"):
        thinwire.attach(model, dense(), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(reduce_scatter=QSGD(8)))
    return len(optimizer._optimizer_step_pre_hooks)


def _breaks_late(rank):
    mesh = mesh_of(2, 1)
    model, _ = _stack(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fsdp2, "install", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            thinwire.attach(
                model, dgc(0.1), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
            )
    assert optimizer.param_groups[0]["momentum"] == 0.9
    thinwire.attach(
        model, dgc(0.1), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
    ).detach()


def test_along_the_shards(world2):
    for exact, rounded, again, sent in world2.run(_shards_alone):
        assert not torch.equal(rounded, exact)
        assert torch.equal(again, exact), "detach leaves no rounded weights"
        assert sent["fp32"] == sent["fp32 of bf16"] == 2 * sent["bf16"] > 0
    assert all(hooks in (None, 0) for hooks in world2.run(_two_groups))
    world2.run(_breaks_late)


def _uneven(rank, folder):
    """Shards of a matrix that keep different amounts, one of them nothing; and weights gathered from half of them."""
    mesh = mesh_of(2, 2)
    torch.manual_seed(0)
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(16, 33)), nn.Tanh(), nn.Linear(33, 5))
    fully_shard(model, mesh=mesh["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wire = thinwire.attach(
        model, powersgd(2), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
    )
    assert [unit.name for unit in wire.units] == ["0.weight", "0.bias", "2.weight", "2.bias"]

    def step(i):
        model(data(rank, i)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    step(1)
    kept = {unit.name: dict(unit.shared.now) for unit in wire.units}
    sizes = [tuple(x.shape) for x in kept["0.weight"].values()]
    dcp.save({"wire": wire}, checkpoint_id=folder)
    step(2)
    wire.load(folder)
    for unit in wire.units:
        assert unit.shared.now.keys() == kept[unit.name].keys()
        assert all(torch.equal(unit.shared.now[key], value) for key, value in kept[unit.name].items())
    wire.detach()
    ends, mesh = [], mesh_of(1, 4)
    for gather in (None, Cast(), Quantize(8)):
        other, optimizer = _stack(mesh, reshard_after_forward=2)
        wire = thinwire.attach(other, dense(), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(all_gather=gather))
        other(_x(rank, 0)).square().mean().backward()
        optimizer.step()
        row = wire.ledger.rows[0]
        assert row.gather_bytes <= row.gather_dense_bytes
        wire.detach()
        ends.append(whole(other))
    return sizes, ends


def test_uneven_shards_and_gathers_of_half_of_them(world4, tmp_path):
    results = world4.run(_uneven, tmp_path, timeout=100.0)
    assert results[0][0] != results[1][0]
    for _, (plain, exact, rounded) in results:
        assert torch.equal(exact, plain)
        assert 0 < (rounded - plain).abs().max() < 0.1
