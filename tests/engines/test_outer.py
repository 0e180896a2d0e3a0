"""Local updates: the laws that tie them to known methods, the simulator to real processes, and what is sent to what is
applied."""

import os
import random
import re
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.sharded import mesh_of, whole
from tests.engines.test_faults import finish, start_ranks
from thinwire import ThinwireError, dense, methods, topk
from thinwire.engines.outer.outer_step import fragments_of
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.methods.local_settings import Local, growth_of
from thinwire.methods.method import Method

RECIPES = {
    "updates": methods.updates(topk(0.1)),
    "post_local_sgd": methods.post_local_sgd(4, start=3, exchange=topk(0.1)),
    "slowmo": methods.slowmo(4, exchange=topk(0.1)),
    "diloco": methods.diloco(4, exchange=topk(0.1, values="int4")),
    "streaming": methods.streaming_diloco(8, fragments=2, delay=2, exchange=topk(0.1)),
    "sparse_loco": methods.sparse_loco(4, density=0.1),
    "muloco": methods.muloco(4),
    "co2": methods.co2(3, exchange=topk(0.1)),
    "mean_adamw": methods.updates(topk(0.1)),
    "averaged": methods.local(topk(0.1), every=4, buffers="average", sync_moments=2),
}


class Net(nn.Module):
    """Two blocks and a buffer that each worker changes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 40)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(40, 40), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(40, 4)
        self.watches = dtype == torch.float32  # in float64, equal to models without buffers
        self.register_buffer("seen", torch.zeros(16))
        self.to(dtype)

    def forward(self, x):
        if self.watches:
            with torch.no_grad():
                self.seen.lerp_(x.mean(0).to(self.seen.dtype), 0.1)
        x = torch.tanh(self.inner(x - self.seen))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def build(dtype=torch.float32, adam=True, lr=0.02, seed=0, mean=False):
    torch.manual_seed(seed)
    model = Net(dtype)
    kind = thinwire.optim.MeanAdamW if mean else torch.optim.AdamW if adam else torch.optim.SGD
    return model, kind(model.parameters(), lr=lr)


def batch(worker, step, dtype=torch.float32):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * step + worker), dtype=dtype)


def loss_of(model, x):
    return (model(x) - x[:, :4].cumsum(1)).square().mean()


def flat(tensors):
    return torch.cat([x.detach().flatten().double() for x in tensors])


def simulated(method, workers=4, steps=12, dtype=torch.float64, **options):
    model, optimizer = build(dtype, **options)
    result = thinwire.simulate(
        model, method, optimizer=optimizer, workers=workers, steps=steps, loss=loss_of,
        batches=lambda worker, step: batch(worker, step, dtype),
    )  # fmt: skip
    return flat(model.parameters()), result


def _train(rank, method, steps, mean=False):
    model, optimizer = build(seed=rank, mean=mean)  # they start from those of rank 0
    wire = thinwire.attach(model, method, optimizer=optimizer, process_group=dist.group.WORLD)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(rank, step)).backward()
        optimizer.step()
    wire.detach()
    facts = wire.ledger.wire_bytes, wire.ledger.dense_bytes, [row.error for row in wire.ledger.rows if row.error]
    return flat(model.parameters()), flat(model.buffers()), facts, wire.ledger.notes


def close(a, b):
    assert torch.allclose(a, b, rtol=0.0, atol=1e-12), float((a - b).abs().max())


def test_one_step_rounds_are_data_parallelism():
    data_parallel, _ = simulated(dense(), adam=False)
    for method in (
        methods.local(every=1), methods.post_local_sgd(every=1), methods.post_local_sgd(every=99, start=12),
        methods.updates(dense()),
    ):  # fmt: skip
        close(simulated(method, adam=False)[0], data_parallel)


def test_updates_are_the_mean_of_local_steps():
    """By hand: each worker keeps its own AdamW, and all continue from the mean of their parameters."""
    pairs = [build(torch.float64) for _ in range(3)]
    for step in range(6):
        for worker, (model, optimizer) in enumerate(pairs):
            optimizer.zero_grad()
            loss_of(model, batch(worker, step, torch.float64)).backward()
            optimizer.step()
        with torch.no_grad():
            for each in zip(*(model.parameters() for model, _ in pairs), strict=True):
                mean = torch.stack([*each]).mean(0)
                for param in each:
                    param.copy_(mean)
    close(simulated(methods.updates(dense()), workers=3, steps=6)[0], flat(pairs[0][0].parameters()))


def test_one_whole_fragment_without_delay_is_diloco():
    one = methods.streaming_diloco(4, fragments=1, delay=0, mix=0.0)
    assert torch.equal(simulated(one)[0], simulated(methods.diloco(4))[0])


def test_diloco_is_pytorchs_nesterov_on_the_mean_update():
    pairs = [build(torch.float64) for _ in range(3)]
    anchor = [p.detach().clone().requires_grad_() for p in pairs[0][0].parameters()]
    outer = torch.optim.SGD(anchor, lr=0.7, momentum=0.9, nesterov=True)
    for step in range(12):
        for worker, (model, optimizer) in enumerate(pairs):
            optimizer.zero_grad()
            loss_of(model, batch(worker, step, torch.float64)).backward()
            optimizer.step()
        if step % 4 == 3:
            with torch.no_grad():
                for i, a in enumerate(anchor):
                    a.grad = a - torch.stack([[*model.parameters()][i] for model, _ in pairs]).mean(0)
                outer.step()
                for model, _ in pairs:
                    for a, param in zip(anchor, model.parameters(), strict=True):
                        param.copy_(a)
    close(simulated(methods.diloco(4), workers=3)[0], flat(anchor))


def test_co2_of_single_steps_is_delayed_sgd():
    """The mean gradient of a step moves the parameters at the end of the next."""
    model, _ = build(torch.float64)
    params, late, steps = [*model.parameters()], None, 7
    for step in range(steps + 1):
        grads = None
        if step < steps:
            each = [torch.autograd.grad(loss_of(model, batch(w, step, torch.float64)), params) for w in range(2)]
            grads = [torch.stack(found).mean(0) for found in zip(*each, strict=True)]
        if late is not None:
            with torch.no_grad():
                for param, grad in zip(params, late, strict=True):
                    param.sub_(grad, alpha=0.02)
        late = grads
    method = methods.co2(1, penalty=None, clip=None)
    close(simulated(method, workers=2, steps=steps, adam=False)[0], flat(params))


FIXTURES = {
    (0, 0.0): ({3: -11, 6: -17, 9: -35, 12: -41, 15: -59}, {3: -5, 6: -23, 9: -29, 12: -47, 15: -53}),
    (0, 0.5): ({3: -8, 6: -14, 9: -24.5, 12: -30.5, 15: -40.25}, {3: -5, 6: -17, 9: -23, 12: -32, 15: -38}),
    (1, 0.0): ({3: -7, 6: -13, 9: -27, 12: -33, 15: -47}, {3: -5, 6: -19, 9: -25, 12: -39, 15: -45}),
    (1, 0.5): ({3: -6, 6: -12, 9: -21.5, 12: -27.5, 15: -35.75}, {3: -5, 6: -15, 9: -21, 12: -29, 15: -35}),
}
"""The two parameters after some steps in torchft's regression fixtures (test_diloco_mocked_updates, 0, 1, 3 and 4), by
delay and mix: two fragments, six steps in a round, constant gradients of 2, an inner rate of 1, an outer one of 2."""


@pytest.mark.parametrize(("delay", "mix"), FIXTURES)
def test_torchfts_regression_fixtures(delay, mix):
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(2))})
    for param in model.parameters():
        nn.init.ones_(param)
    method = methods.local(every=6, fragments=2, lr=2.0, delay=delay, mix=mix, contraction=0.3)
    sim = SimulatedWorkers(model, method, torch.optim.SGD(model.parameters(), lr=1.0), 2)
    for step in range(1, 16):
        sim.step(lambda worker: sum(2 * param.sum() for param in model.parameters()))
        for layer, expected in zip(model["layers"], FIXTURES[delay, mix], strict=True):
            assert layer.weight.item() == expected.get(step, layer.weight.item())
    sim.session.detach()


def test_sparse_loco_sends_less_than_covenants_bits():
    """Bits per parameter and step that a worker sends to each other one, by the ledger."""
    torch.manual_seed(0)
    model = nn.Linear(512, 512)
    result = thinwire.simulate(
        model, methods.sparse_loco(30), optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), workers=2, steps=60,
        loss=lambda model, x: (model(x) - x).square().mean(), batches=lambda worker, step: torch.randn(8, 512),
    )  # fmt: skip
    assert 0 < 8 * result.ledger.wire_bytes / (512 * 513 * 60) <= 0.0055
    assert result.ledger.rows[0].error > 0


@pytest.mark.parametrize("name", RECIPES)
def test_simulator_equals_real_processes(world2, name):
    method = RECIPES[name]
    mean = name == "mean_adamw"
    results = world2.run(_train, method, 10, mean)
    params, buffers, (sent, plain, errors), _ = results[0]
    assert all(torch.equal(params, other) for other, *_ in results[1:])
    assert torch.equal(buffers, results[1][1]) == (method.local.buffers == "average")
    assert sent < plain
    assert errors
    mine, result = simulated(method, workers=2, steps=10, dtype=torch.float32, mean=mean)
    assert torch.equal(mine, params)
    assert result.ledger.wire_bytes == sent
    assert (result.ledger.rows[-1].noise_scale is not None) == mean


@pytest.mark.parametrize("name", RECIPES)
def test_four_workers_hold_one_anchor(world4, name):
    mean = name == "mean_adamw"
    results = world4.run(_train, RECIPES[name], 10, mean)
    assert all(torch.equal(results[0][0], other) for other, *_ in results[1:])
    mine, _ = simulated(RECIPES[name], workers=4, steps=10, dtype=torch.float32, mean=mean)
    reduces = name in ("averaged", "mean_adamw", "sparse_loco")  # an all-reduce sums in an order of its own
    assert torch.equal(mine, results[0][0]) or (reduces and torch.allclose(mine, results[0][0], atol=1e-3))


def test_what_is_applied_and_pending_is_what_workers_moved():
    """With lr=1 and no momentum, the anchors' way and the mean residual are the mean of what the workers moved."""
    model, optimizer = build(torch.float64)
    sim = SimulatedWorkers(model, methods.local(topk(0.05), every=3), optimizer, 4)
    start = {unit.name: unit.param.clone() for unit in sim.session.units}
    moved = {name: torch.zeros_like(x) for name, x in start.items()}
    exchange = sim.local.rounds._exchange

    def spied(fragment):
        for replica in sim.local.replicas:
            for unit, delta in zip(sim.session.units, sim.local.rounds.deltas(replica, range(len(start))), strict=True):
                moved[unit.name] += delta / 4
        exchange(fragment)

    sim.local.rounds._exchange = spied
    for step in range(9):
        sim.step(lambda worker, step=step: loss_of(model, batch(worker, step, torch.float64)))
    for unit in sim.session.units:
        applied = start[unit.name] - unit.param
        residuals = [worker.local[unit.name].now.get("residual") for worker in sim.session.workers]
        pending = sum(r for r in residuals if r is not None) / 4 if residuals[0] is not None else 0.0
        close(applied + pending, moved[unit.name])
    sim.session.detach()


def _sharded(rank, method, steps):
    mesh = mesh_of(2, 2)
    torch.manual_seed(0)
    model = Net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    wire = thinwire.attach(model, method, optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"]))
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(rank, step)).backward()
        optimizer.step()
    wire.detach()
    return whole(model), wire.ledger.wire_bytes, wire.ledger.dense_bytes


@pytest.mark.parametrize("name", ["updates", "diloco", "streaming", "co2"])
def test_shards_talk_to_the_same_shards(world4, name):
    results = world4.run(_sharded, RECIPES[name], 10)
    assert all(torch.equal(results[0][0], other) for other, *_ in results[1:])
    assert results[0][1] < results[0][2]


def test_growth_on_a_quadratic_is_that_of_the_characteristic_polynomial():
    for momentum, lr in ((0.0, 0.99), (0.2, 0.79), (0.5, 0.49), (0.9, 0.09)):
        local = Local(4, lr=lr, momentum=momentum, delay="round")
        roots = torch.tensor([[1 + momentum, -(momentum + lr)], [1.0, 0.0]], dtype=torch.float64)
        assert growth_of(local, 1.0) == pytest.approx(float(torch.linalg.eigvals(roots).abs().max()))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: methods.diloco(0), "every is 0; it must be a whole number, at least 1"),
        (lambda: methods.local(every=4, delay=4), "delay is 4 inner steps.*use at most 3"),
        (lambda: methods.local(every=8, fragments=2, delay=4), "after 4 of every / fragments = 4.*at most 3"),
        (lambda: methods.local(every=2, fragments=3), "fragments is 3 and every is 2"),
        (lambda: methods.co2(4, lr=0.7, momentum=0.9), "the largest stable lr is 0.1"),
        (lambda: methods.diloco(4, lr=3.0), "largest stable lr is 1"),
        (lambda: methods.local(every=4, penalty="gap"), 'it needs delay="round"'),
        (lambda: methods.local(thinwire.dgc(0.01), every=4), "exchange is dgc, which stands in for a part of"),
        (lambda: methods.local(methods.updates(topk(0.1)), every=4), "makes local updates already"),
        (lambda: methods.co2(4, mix=0.5), 'mix is 0.5, and delay="round"'),
    ],
)
def test_bad_settings(make, says):
    with pytest.raises(ThinwireError, match=says):
        make()


def test_json():
    for method in RECIPES.values():
        assert Method.from_json(method.to_json()) == method


def test_fragments_hold_layers_in_turn():
    names = ["embed.weight", *(f"blocks.{i}.{x}" for i in range(4) for x in ("w", "b")), "head.weight"]
    first, second = fragments_of(names, 2)
    assert [names[i] for i in first] == ["embed.weight", "blocks.1.w", "blocks.1.b", "blocks.3.w", "blocks.3.b"]
    assert sorted(first + second) == list(range(len(names)))


@pytest.mark.parametrize("exchange", [topk(0.1), dense()], ids=["topk", "dense"])
def test_a_nonfinite_worker_takes_back_the_round_of_all(exchange):
    model, optimizer = build()
    sim = SimulatedWorkers(model, methods.local(exchange, every=2), optimizer, 3)
    for step in range(8):
        before = [unit.param.clone() for unit in sim.session.units]
        fault = torch.tensor([1.0, torch.nan if step == 3 else 1.0, 1.0])
        sim.step(lambda worker, step=step, fault=fault: loss_of(model, batch(worker, step)) * fault[worker])
        if step == 3:
            assert all(torch.equal(a, u.param) for a, u in zip(before, sim.session.units, strict=True))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert sim.session.ledger.skipped == 1
    sim.session.detach()


def _resume(rank, method, folder, stop, steps):
    """Save in the middle of a round, to both formats, go on; then load in new sessions and go on alike."""
    model, optimizer = build(seed=rank)
    wire = thinwire.attach(model, method, optimizer=optimizer, process_group=dist.group.WORLD)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()

    train(model, optimizer, 0, stop)
    file = f"{folder}/{rank}.pt"
    torch.save({"wire": wire.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    dcp.save({"wire": wire}, checkpoint_id=f"{folder}/dcp")
    train(model, optimizer, stop, steps)
    wire.detach()
    expected = flat(model.parameters())
    found = []
    for of_folder in (False, True):
        saved = torch.load(file, weights_only=True)
        model, optimizer = build(seed=rank + 7)
        wire = thinwire.attach(model, method, optimizer=optimizer, process_group=dist.group.WORLD)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if of_folder:  # as a checkpoint that keeps one copy of what it takes for replicated
            with torch.no_grad():
                for param in model.parameters():
                    param.zero_()
            wire.load(f"{folder}/dcp")
        else:
            wire.load_state_dict(saved["wire"])
        train(model, optimizer, stop, steps)
        wire.detach()
        found.append(flat(model.parameters()))
    return expected, found


@pytest.mark.parametrize(
    ("name", "stop"), [("updates", 5), ("diloco", 6), ("streaming", 5), ("co2", 7), ("averaged", 6)]
)
def test_resume_in_the_middle_of_a_round(world2, tmp_path, name, stop):
    for expected, found in world2.run(_resume, RECIPES[name], str(tmp_path), stop, 13):
        assert all(torch.equal(expected, other) for other in found)


def job(folder, *arguments):
    ranks = start_ranks(4, ["-m", "tests.engines.outer_job", folder, *arguments])
    outputs = finish(ranks)
    return [rank.returncode for rank in ranks], [out + errors for out, errors in outputs]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    codes, said = job(tmp_path_factory.mktemp("unbroken"), 9)
    assert codes == [0] * 4, said
    return said


@pytest.mark.parametrize("repeat", range(int(os.environ.get("THINWIRE_KILLS", "1"))))
def test_a_killed_worker_is_named_and_a_restart_ends_alike(unbroken, tmp_path, repeat):
    rank, step = random.Random(repeat).randrange(4), random.Random(repeat).randrange(3, 8)
    codes, said = job(tmp_path, 9, rank, step)
    assert codes == [3 if other != rank else -signal.SIGKILL for other in range(4)], said
    for other, text in enumerate(said):
        assert other == rank or re.search(rf"error .*rank {rank}", text), text
    codes, said = job(tmp_path, 9)
    assert codes == [0] * 4, said
    assert said == unbroken


def _fold(rank, folder, save):
    """Two workers save in the middle of a round; four go on from the mean of what they had."""
    method = methods.diloco(4, exchange=topk(0.1))
    model, optimizer = build(seed=rank)
    wire = thinwire.attach(model, method, optimizer=optimizer, process_group=dist.group.WORLD)
    if save:
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()
        dcp.save({"wire": wire}, checkpoint_id=folder)
        found = flat(model.parameters()), flat(unit.param for unit in wire.units)
    else:
        wire.load(folder, on_world_change="fold")
        found = flat(model.parameters()), flat(unit.param for unit in wire.units)
        for step in range(6, 12):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()
    wire.detach()
    return *found, flat(model.parameters())


def test_another_number_of_workers(world2, world4, tmp_path):
    before = world2.run(_fold, str(tmp_path / "dcp"), True)
    after = world4.run(_fold, str(tmp_path / "dcp"), False)
    mean = (before[0][0] + before[1][0]) / 2
    for params, anchor, end in after:
        assert torch.equal(anchor, before[0][1])
        assert torch.allclose(params, mean, atol=1e-6)
        assert torch.equal(end, after[0][2])


def _refused(rank):
    model, optimizer = build()
    group = dist.group.WORLD

    def says(method=RECIPES["diloco"], model=model, **options):
        options = {"optimizer": optimizer, "process_group": group} | options
        with pytest.raises(ThinwireError) as caught:
            thinwire.attach(model, method, **options)
        return str(caught.value)

    ddp = DistributedDataParallel(Net())
    part = torch.optim.SGD([*model.parameters()][1:], lr=0.1)
    found = [
        says(optimizer=None),
        says(optimizer=part),
        says(model=ddp, process_group=None, optimizer=torch.optim.SGD(ddp.parameters(), lr=0.1)),
        says(scaler=torch.amp.GradScaler("cpu")),
        says(ranks_per_node=2),
        says(methods.streaming_diloco(100, fragments=50, delay=0)),
        says(methods.diloco(4 + rank)),
    ]
    wire = thinwire.attach(model, methods.diloco(4), optimizer=optimizer, process_group=group)
    optimizer.zero_grad()
    loss_of(model, batch(rank, 0)).backward()
    optimizer.step()
    for method in (methods.diloco(8), topk(0.1)):
        with pytest.raises(ThinwireError) as caught:
            wire.set_method(method)
        found.append(str(caught.value))
    wire.detach()
    return found


def test_bad_input_at_attach(world2):
    expected = [
        "a round ends after so many steps of the inner optimizer",
        "parameter 'inner.weight' is not in the inner optimizer",
        "is a DistributedDataParallel, which averages the gradients",
        "scaler= is given",
        "ranks_per_node= is 2, which is for gradients",
        "fragments is 50, and the model has 8 parameters",
        "ranks differ: rank 0 has method",
        "inner step 1 is in the middle of a round of 4",
        "topk exchanges gradients, and this model was attached for local updates",
    ]
    for found in world2.run(_refused):
        for text, says in zip(found, expected, strict=True):
            assert says in text
