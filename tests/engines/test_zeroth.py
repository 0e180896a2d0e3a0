"""Zeroth order: all layouts leave the bits of one rank, one scalar is sent, parameters are never written in a pass."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import thinwire
from thinwire import ThinwireError
from thinwire.comm.link import wire_bytes
from thinwire.engines.zeroth import directions
from thinwire.engines.zeroth.replay_file import History
from thinwire.kernels.normal import ReferenceNormals

ROOT = Path(__file__).parents[2]
STEPS = 5


class Block(nn.Module):
    """A residual block with a matrix, a bias and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.up(self.norm(x)))


class Net(nn.Module):
    """A tied pair outside of the blocks, a frozen matrix in one of them."""

    def __init__(self, width: int = 12, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.blocks[0].up.weight.requires_grad_(False)
        self.last = nn.Linear(width, width, bias=False)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.last.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.tied(torch.tanh(self.last(self.blocks(self.first(x))))) * self.scale


def build(dtype=torch.float32, **options) -> Net:
    torch.manual_seed(3)
    return Net(**options).to(dtype)


def batch(step, shard, size=6):
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(100 * step + shard))


def run(world, fn, *args):
    return world.run(fn, *args, timeout=240.0)


def loss_of(model, x):
    """The loss, rounded to 14 bits behind the point, so that the sum of a few is exact in any order."""
    loss = model(x.to(model.first.weight.dtype)).float().square().mean()
    return torch.round(loss * 2**14) / 2**14


def held(model):
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def trained(shards, zo, model, steps=STEPS):
    """The losses and the parameters after training on the mean loss of these shards."""
    losses = []
    for step in range(steps):
        xs = [batch(step, shard) for shard in shards]
        losses.append(zo.step(lambda xs=xs: torch.stack([loss_of(model, x).double() for x in xs]).mean()))
    zo.flush()
    return losses, held(model)


def one_rank(shards, dtype=torch.float32, steps=STEPS, **options):
    model = build(dtype)
    before = held(model)
    zo = thinwire.ZerothOrder(model, **{"lr": 0.02, "weight_decay": 0.1, "seed": 5, **options})
    _, after = trained(shards, zo, model, steps)
    assert not torch.equal(after, before)
    return after, zo


def _rank(rank, layout, options):
    model = build()
    world = dist.get_world_size()
    if layout == "ddp":
        where, shard = {"process_group": dist.group.WORLD}, rank
    else:
        data = world // 2
        shape, names = ((2,), ("pert",)) if layout == "pertp" else ((2, data), ("pert", "data"))
        where, shard = {"mesh": init_device_mesh("cpu", shape, mesh_dim_names=names)}, rank % data
    if options.pop("offload", False):
        options |= {"blocks": model.blocks, "device": "cpu"}
    if options.pop("sliced", False):
        options["node"] = dist.group.WORLD
    zo = thinwire.ZerothOrder(model, **{"lr": 0.02, "weight_decay": 0.1, "seed": 5, **where, **options})
    losses, after = trained([shard], zo, model)
    rows = [(row.wire_bytes, row.dense_bytes, row.within_node_bytes) for row in zo.ledger.rows]
    return after, losses, rows, zo.report(), zo.state_dict()["history"]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("layout", "ranks", "shards"), [("ddp", 2, 2), ("pertp", 2, 1), ("ddp", 4, 4), ("2d", 4, 2)])
def test_every_layout_leaves_the_bits_of_one_rank(layout, ranks, shards, offload, request):
    alone, zo = one_rank(range(shards))
    sent = 4 * sum(one.param.numel() for one in zo.parts)
    for after, _, rows, report, history in run(
        request.getfixturevalue(f"world{ranks}"), _rank, layout, {"offload": offload}
    ):
        assert torch.equal(after, alone)
        assert bytes(history.numpy()) == zo.history.encode()
        assert all(0 < wire <= 8 for wire, *_ in rows)
        assert {dense for _, dense, _ in rows} == {wire_bytes("all_reduce", sent, ranks)}
        assert "zeroth order" in report


def test_own_directions_are_averaged(world2):
    results = run(world2, _rank, "ddp", {"directions": "own"})
    assert torch.equal(results[0][0], results[1][0])
    assert all(wire == 12 for _, _, rows, *_ in results for wire, *_ in rows)
    history = History.decode(bytes(results[0][4].numpy()))
    assert [[number for number, _ in update.pairs] for update in history.updates] == [
        [2 * t, 2 * t + 1] for t in range(5)
    ]
    shared, _ = one_rank([0, 1])
    assert not torch.equal(results[0][0], shared)


def test_sliced_blocks_leave_the_same_bits(world2):
    whole, _ = one_rank([0, 1])
    for after, _, rows, *_ in run(world2, _rank, "ddp", {"offload": True, "sliced": True}):
        assert torch.equal(after, whole)
        assert all(within > 0 and wire <= 8 for wire, _, within in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_offloaded_blocks_leave_the_bits_of_a_run_in_memory(dtype):
    model = build(dtype)
    wanted, _ = one_rank([0], dtype)
    zo = thinwire.ZerothOrder(model, lr=0.02, weight_decay=0.1, seed=5, blocks=model.blocks, device="cpu")
    frozen = model.blocks[0].up.weight.clone()
    for step in range(STEPS):
        x = batch(step, 0)
        zo.step(lambda x=x: loss_of(model, x))
        other = loss_of(model, batch(99, 0))  # a pass outside of a step sees all updates
        zo.flush()
        assert torch.equal(other, loss_of(model, batch(99, 0)))
    assert torch.equal(held(model), wanted)
    assert torch.equal(model.blocks[0].up.weight, frozen)
    zo.detach()
    assert not model.blocks[0]._forward_hooks
    with pytest.raises(ThinwireError, match="make a new one to train on"):
        zo.step(lambda: 1.0)
    assert torch.equal(held(model), wanted)


def test_the_step_is_mezos():
    """Against the formula, with the whole of each direction at once."""
    after, zo = one_rank([0], steps=1)
    model = build()
    (update,) = zo.history.updates
    ((direction, scalar),) = update.pairs
    z = []
    for param in model.parameters():
        if param.requires_grad:
            z.append(torch.empty(param.numel()))
            ReferenceNormals().fill(z[-1], 5, direction, len(z) - 1, 0)
    params = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for sign in (1e-3, -1e-3):
        other = build()
        with torch.no_grad():
            for p, one in zip((p for p in other.parameters() if p.requires_grad), z, strict=True):
                p.add_(one.view_as(p) * sign)
        losses.append(loss_of(other, batch(0, 0)).item())
    assert scalar == pytest.approx((losses[0] - losses[1]) / 2e-3, abs=1e-9)
    with torch.no_grad():
        for p, one in zip(params, z, strict=True):
            p.mul_(1 - 0.02 * 0.1 * (p.ndim >= 2)).sub_(0.02 * scalar * one.view_as(p))
    assert torch.allclose(held(model), after, atol=1e-7)


def test_a_pass_never_writes_to_the_parameters():
    model = build()
    zo = thinwire.ZerothOrder(model, lr=0.0)
    theta = [p.data for p in model.parameters()]
    before, seen = held(model), []

    def closure():
        seen.append(held(model))
        return loss_of(model, batch(0, 0))

    zo.step(closure)
    assert all(p.data_ptr() == t.data_ptr() for p, t in zip(model.parameters(), theta, strict=True))
    assert torch.equal(held(model), before)
    changed = [not torch.equal(one, before) for one in seen]
    assert changed == [True, True]
    assert torch.allclose((seen[0] + seen[1]) / 2, before, atol=1e-6)
    with pytest.raises(ZeroDivisionError):
        zo.step(lambda: 1 / 0)
    assert torch.equal(held(model), before)


def test_a_change_in_chunks_is_the_change_at_once(monkeypatch):
    theta = torch.randn(1001)
    one = directions.Trained(2, "w", nn.Parameter(theta), True)
    updates = [directions.Update(0.1, 0.5, ((step, 0.3 * step),)) for step in range(3)]
    whole = theta.clone()
    directions.apply(whole, updates, 7, one)
    monkeypatch.setattr(directions, "CHUNK", 64)
    parts = theta.clone()
    for update in updates:
        directions.apply(parts, [update], 7, one)
    assert torch.equal(parts, whole)


def test_the_projected_gradient_is_the_gradient_along_the_direction():
    model = build(torch.float64)
    zo = thinwire.ZerothOrder(model, lr=0.0, eps=1e-4)
    x = batch(0, 0).double()
    zo.step(lambda: model(x).square().mean())
    model(x).square().mean().backward()
    ((direction, scalar),) = zo.history.updates[0].pairs
    along = 0.0
    for one in zo.parts:
        z = torch.empty(one.param.numel())
        ReferenceNormals().fill(z, 0, direction, one.number, 0)
        along += (one.param.grad.flatten() * z.double()).sum().item()
    assert scalar == pytest.approx(along, rel=1e-2, abs=1e-3)


def test_it_learns():
    model = build()
    x = batch(0, 0, 32)
    zo = thinwire.ZerothOrder(model, lr=0.01)
    losses = [zo.step(lambda: model(x).square().mean()) for _ in range(300)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_dropout_draws_alike_in_both_passes():
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 4)).train()
    masks = []
    model[1].register_forward_hook(lambda module, given, out: masks.append(out == 0))
    zo = thinwire.ZerothOrder(model, lr=0.0)
    state = torch.get_rng_state()
    for step in range(2):
        zo.step(lambda step=step: model(batch(step, 0)).square().mean())
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(torch.get_rng_state(), state)


def _drops_out(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 4)).train()
    mask = []
    model[1].register_forward_hook(lambda module, given, out: mask.append(out == 0))
    zo = thinwire.ZerothOrder(model, lr=0.0, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("pert",)))
    torch.manual_seed(rank)
    zo.step(lambda: model(batch(0, 0)).square().mean())
    return mask


def test_dropout_draws_alike_on_both_ranks_of_a_shard(world2):
    (one,), (other,) = run(world2, _drops_out)
    assert torch.equal(one, other)


def _nonfinite(rank):
    model = build()
    before = held(model)
    zo = thinwire.ZerothOrder(model, lr=0.02, process_group=dist.group.WORLD)
    found = []
    for value in (1.0, float("nan"), float("inf")):
        loss = zo.step(lambda value=value: loss_of(model, batch(0, rank)) * (value if rank == 1 else 1.0))
        found.append((torch.equal(held(model), before), math.isfinite(loss), zo.ledger.skipped, zo.steps, zo.attempts))
        before = held(model)
    return found, before


def test_a_nonfinite_loss_skips_the_step_on_all_ranks(world2):
    results = run(world2, _nonfinite)
    for rank, (found, _) in enumerate(results):
        assert [same for same, *_ in found] == [False, True, True]
        assert [finite for _, finite, *_ in found] == [True, rank == 0, rank == 0]
        assert found[-1][2:] == (2, 1, 3)
    assert torch.equal(results[0][1], results[1][1])


def test_lora_alone_is_trained_and_the_rest_stays():
    model = build().requires_grad_(False)
    model.adapter = nn.Parameter(torch.zeros(12))
    before = held(model)
    zo = thinwire.ZerothOrder(model, lr=0.1)
    x = batch(0, 0)
    for _ in range(3):
        zo.step(lambda: (model(x) + model.adapter - 1.0).square().mean())
    assert [one.name for one in zo.parts] == ["adapter"]
    assert model.adapter.abs().sum() > 0
    model.adapter.data.zero_()
    assert torch.equal(held(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_replay_file_rebuilds_the_model(tmp_path, dtype):
    model = build(dtype)
    zo = thinwire.ZerothOrder(model, lr=0.02, seed=9)
    for step in range(60):
        zo.lr = 0.02 / (1 + step // 20)
        zo.weight_decay = 0.1 * (step > 30)
        zo.step(lambda step=step: loss_of(model, batch(step, 0)))
    zo.save_replay(tmp_path / "tuned.zo")
    assert (tmp_path / "tuned.zo").stat().st_size < 2000 + 12 * 60
    rebuilt = build(dtype)
    thinwire.zeroth.replay(rebuilt, tmp_path / "tuned.zo")
    assert torch.equal(held(rebuilt), held(model))


def test_a_replay_file_of_another_model_or_a_damaged_one_changes_nothing(tmp_path):
    _, zo = one_rank([0])
    path = tmp_path / "tuned.zo"
    zo.save_replay(path)
    data = path.read_bytes()
    other = build()
    with torch.no_grad():
        other.scale.add_(1.0)
    cases = [
        (other, data, "load the weights that the training began with"),
        (build(width=13), data, "for another model: it has .*first.weight"),
        (build(blocks=4), data, "for another model"),
        (build(), data[:-1], "no replay file, or a damaged one"),
        (build(), data[:100] + b"x" + data[101:], "no replay file, or a damaged one"),
        (build(), b"", "no replay file, or a damaged one"),
    ]
    for model, content, said in cases:
        path.write_bytes(content)
        before = held(model)
        with pytest.raises(ThinwireError, match=said):
            thinwire.zeroth.replay(model, path)
        assert torch.equal(held(model), before)
    with pytest.raises(ThinwireError, match=r"no replay file can be read from .*No such file"):
        thinwire.zeroth.replay(build(), tmp_path / "missing")


def test_a_run_goes_on_from_its_state():
    wanted, whole = one_rank([0], steps=6)
    model = build()
    zo = thinwire.ZerothOrder(model, lr=0.02, weight_decay=0.1, seed=5)
    trained([0], zo, model, 3)
    state, weights = zo.state_dict(), model.state_dict()
    again = build()
    again.load_state_dict(weights)
    more = thinwire.ZerothOrder(again, lr=0.02, weight_decay=0.1, seed=5)
    more.load_state_dict(state)
    for step in range(3, 6):
        more.step(lambda step=step: loss_of(again, batch(step, 0)).double())
    assert torch.equal(held(again), wanted)
    assert more.history.encode() == whole.history.encode()
    with pytest.raises(ThinwireError, match="the state has seed 5, and this run 6"):
        thinwire.ZerothOrder(build(), lr=0.02, seed=6).load_state_dict(state)
    with pytest.raises(ThinwireError, match=r"pass what ZerothOrder\.state_dict"):
        more.load_state_dict({"step": 3})


class Shared(Net):
    """A block whose weight is used outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight = self.blocks[1].up.weight


BAD = [
    ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
    ({"lr": float("nan")}, "lr is nan"),
    ({"eps": 0.0}, "eps is 0.0; it must be above 0"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
    ({"seed": -1}, "seed is -1; it must be a whole number"),
    ({"directions": "mine"}, "directions is 'mine'; choose one of shared, own"),
    ({"timeout": 0}, "timeout is 0; it must be above 0"),
    ({"device": "cpu"}, "device= and node= are for blocks="),
    ({"blocks": True}, "blocks= needs device="),
    ({"blocks": True, "device": "nowhere"}, "device is 'nowhere', which is not there"),
    ({"process_group": 3}, "process_group is a int; pass the ranks"),
    ({"mesh": 3}, "mesh is a int; pass init_device_mesh"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=lambda value: str(value)[:24])
def test_bad_settings_are_refused(options, said):
    model = build()
    if options.get("blocks"):
        options = options | {"blocks": model.blocks}
    with pytest.raises(ThinwireError, match=said):
        thinwire.ZerothOrder(model, **{"lr": 0.1, **options})


def test_bad_models_and_closures_are_refused():
    cases = [
        (3, "model is 3; pass the model itself"),
        (build().requires_grad_(False), "no parameter that requires a gradient"),
        (nn.DataParallel(build()), "pass the model inside of it, model.module"),
        (nn.LazyLinear(3), "has no shape yet"),
        (nn.Linear(2, 2, dtype=torch.complex64), "directions are real"),
    ]
    for model, said in cases:
        with pytest.raises(ThinwireError, match=said):
            thinwire.ZerothOrder(model, lr=0.1)
    model = Shared()
    with pytest.raises(ThinwireError, match=r"last.weight is also in blocks\[1\]"):
        thinwire.ZerothOrder(model, lr=0.1, blocks=model.blocks, device="cpu")
    with pytest.raises(ThinwireError, match=r"blocks\[0\] is Linear, and no module of the model"):
        thinwire.ZerothOrder(model, lr=0.1, blocks=[nn.Linear(2, 2)], device="cpu")
    zo = thinwire.ZerothOrder(build(), lr=0.1)
    for closure, said in ((None, "closure is None"), (lambda: None, "it must return one number"),
                          (lambda: torch.ones(2), "the closure returned a tensor of shape \\(2,\\)")):  # fmt: skip
        with pytest.raises(ThinwireError, match=said):
            zo.step(closure)
    with pytest.raises(ThinwireError, match="lr is the text 'fast'"):
        zo.lr = "fast"
    norm = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    zo = thinwire.ZerothOrder(norm, lr=0.1)
    with pytest.raises(ThinwireError, match=r"call model.eval\(\) before the step"):
        zo.step(lambda: norm(batch(0, 0)).square().mean())
    norm.eval()
    zo.step(lambda: norm(batch(0, 0)).square().mean())


def _differs(rank):
    world, said = dist.get_world_size(), []

    def attempt(model=None, **options):
        try:
            thinwire.ZerothOrder(model or build(), **{"lr": 0.1, **options})
        except ThinwireError as error:
            said.append(str(error))
        else:
            said.append("no error")

    group = {"process_group": dist.group.WORLD}
    attempt(**group, seed=rank)
    attempt(lr=0.1 * (1 + rank), **group)
    attempt(**group, eps=0.0 if rank == 1 else 1e-3)
    other = build()
    if rank == 1:
        other.scale.data.add_(1.0)
    attempt(other, **group)
    attempt()
    attempt(mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("data",)))
    if world == 4:
        attempt(mesh=init_device_mesh("cpu", (4, 1), mesh_dim_names=("pert", "data")))
    else:
        attempt(mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("pert", "data")))
    attempt(mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pert", "data")), directions="own")
    attempt(mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pert", "data")), **group)
    return said


def test_ranks_that_differ_and_meshes_that_do_not_fit_are_refused(world2):
    for said in run(world2, _differs):
        for text, part in zip(said, [
            "rank 0 has seed: 0; rank 1 has seed: 1", "rank 0 has lr: 0.1; rank 1 has lr: 0.2",
            "eps is 0.0", "the ranks begin with different weights: ", "neither process_group= nor mesh=",
            "they must be (\"pert\",) or (\"pert\", \"data\")", 'dimension "pert" of mesh has 1 ranks; it must have 2',
            "needs both passes on each rank", "both say who trains the model",
        ], strict=True):  # fmt: skip
            assert part in text


def _drifts(rank):
    model = build()
    zo = thinwire.ZerothOrder(model, lr=0.02, process_group=dist.group.WORLD, check_every=3)
    for step in range(6):
        if step == 2 and rank == 1:
            model.scale.data.add_(1e-3)
        try:
            zo.step(lambda step=step: loss_of(model, batch(step, rank)))
        except ThinwireError as error:
            return step, str(error)
    return None


def test_replicas_that_differ_are_found(world2):
    for step, said in run(world2, _drifts):
        assert step == 2
        assert "replicas differ: " in said
        assert "scale" in said


def _raises(rank):
    model = build()
    zo = thinwire.ZerothOrder(model, lr=0.02, process_group=dist.group.WORLD, timeout=20.0)
    before = held(model)
    try:
        zo.step(lambda: loss_of(model, batch(0, 0)) if rank == 0 else 1 / 0)
    except Exception as error:
        return type(error).__name__, str(error), torch.equal(held(model), before)


def test_an_error_of_one_rank_is_one_of_all(world2):
    (kind, said, same), (other, _, also) = run(world2, _raises)
    assert (kind, other) == ("ThinwireError", "ZeroDivisionError")
    assert "rank 1" in said
    assert same
    assert also
    world2.stop()  # the group has hung up


def test_the_example():
    script = ROOT / "examples" / "finetune_zo.py"
    assert len(script.read_text().splitlines()) < 120
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), "--pertp"]
    command += ["--offload", "--steps", "12", "--base-steps", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert "the rebuilt model is equal: True" in done.stdout
    assert re.search(r"wire bytes per step and worker *\| 4 \|\n", done.stdout)
