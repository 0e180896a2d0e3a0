"""Two levels: the contract between nodes, training on 2 nodes of 2, and the same state inside a node."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import batch, build, flat_parameters, loss_of, simulated
from tests.engines.test_ddp import SMALL_BUCKETS, close
from thinwire import ThinwireError, cast, dense, dgc, powersgd, scalecom, topk
from thinwire.comm.hierarchical import Nodes, groups_of
from thinwire.comm.process_group import ProcessGroup


def _contract(rank):
    everyone = ProcessGroup(dist.group.WORLD)
    inside, between, made = groups_of(everyone, 2)
    nodes = Nodes(everyone, inside, between, made)
    assert (nodes.world, nodes.rank, nodes.local_ranks) == (2, rank // 2, 2)
    for nbytes in (8, 24, 1000):
        mine = torch.arange(nbytes, dtype=torch.uint8)
        last = nodes.all_gather(mine + nodes.rank).advance(30)
        last.future.wait()
        assert torch.equal(last.answer(), torch.stack([mine, mine + 1]))
        last = nodes.all_to_all(torch.stack([mine + 10 * nodes.rank, mine + 10 * nodes.rank + 1])).advance(30)
        last.future.wait()
        assert torch.equal(last.answer(), torch.stack([mine + nodes.rank, mine + 10 + nodes.rank]))
        last = nodes.broadcast(mine + nodes.rank, 1).advance(30)
        last.future.wait()
        assert torch.equal(last.answer(), mine + 1)
    for shape in ((3, 5), (1,), (40,)):
        last = nodes.all_reduce(torch.full(shape, 1.5 + nodes.rank)).advance(30)
        last.future.wait()
        assert torch.equal(last.answer(), torch.full(shape, 4.0))
    assert nodes.any_within_node([rank == 1, False, True], mine, 30) == [rank < 2, False, True]
    assert 1390 <= nodes.sent <= 1590, "half of every message, padded, and a step; an all-reduce sends one message"
    assert nodes.sent_within_node > nodes.sent
    assert not nodes.apart()
    sends = {
        "sum": lambda x: nodes.all_reduce(x.to(torch.float16)),
        "gather": nodes.all_gather,
        "all to all": lambda x: nodes.all_to_all(x.expand(2, -1)),
        "broadcast": lambda x: nodes.broadcast(x, 1),
    }
    for what, send in sends.items():
        for late in range(4):
            nodes.at(255 + (rank == late))
            last = send(torch.zeros(24, dtype=torch.uint8)).advance(30)
            last.future.wait()
            last.answer()
            assert nodes.apart() == (what != "broadcast" or late >= 2), (what, late)
    nodes.close()
    return True


def test_contract(world4):
    assert all(world4.run(_contract))


def _train(rank, method, options, how, steps=12, **attach):
    model, optimizer = build()
    ddp = DistributedDataParallel(model, **options)
    nodes = 2 if how == "number" else init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    wire = thinwire.attach(ddp, method, optimizer=optimizer, ranks_per_node=nodes, **attach)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    residuals = {name: two.now["residual"] for name, two in wire.workers[0].local.items() if "residual" in two.now}
    rows = list(wire.ledger.rows)
    saved = wire.state_dict()
    wire.load_state_dict(saved)
    facts = close(wire)
    facts["inside"] = rows[-1].within_node_bytes
    return flat_parameters(model), residuals, facts, int(saved["rank"].to_local()), saved["world"]


@pytest.mark.parametrize("how", ["number", "mesh"])
@pytest.mark.parametrize(
    "method", [dense(), topk(0.05), dgc(0.02, route="two_phase"), dgc(0.02, clip=1.0), scalecom(0.05)], ids=str
)
def test_two_nodes_of_two(world4, method, how):
    options = {} if how == "number" else SMALL_BUCKETS
    results = world4.run(_train, method, options, how)
    for rank, (parameters, residuals, facts, saved, world) in enumerate(results):
        assert torch.equal(parameters, results[0][0])
        assert (saved, world) == (rank, 4), "every rank has a row of its own in a checkpoint"
        assert all(torch.equal(r, results[rank // 2 * 2][1][name]) for name, r in residuals.items())
        if method.name != "dense":
            assert 0 < facts["wire_bytes"] < facts["dense_bytes"]
            assert facts["error"] > 0
            assert facts["inside"] > 0
            assert "between 2 nodes of 2 ranks" in facts["report"]
            assert "bytes inside the node" in facts["report"]
    if method.name != "dense":
        assert any(not torch.equal(r, results[2][1][name]) for name, r in results[0][1].items())
    if how == "number":  # a node is one worker, with the batch of both of its ranks
        model, optimizer = build()
        thinwire.simulate(
            model,
            method,
            optimizer=optimizer,
            batches=lambda node, step: [batch(2 * node, step), batch(2 * node + 1, step)],
            loss=lambda m, pair: (loss_of(m, pair[0]) + loss_of(m, pair[1])) / 2,
            workers=2,
            steps=12,
        )
        torch.testing.assert_close(results[0][0], flat_parameters(model), rtol=1e-4, atol=1e-5)


def _again(rank):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    for nodes in (2, 4, 1):
        wire = thinwire.attach(ddp, topk(0.1), optimizer=optimizer, ranks_per_node=nodes, emulate_link="1gbit")
        for step in range(2):
            optimizer.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            optimizer.step()
        wire.detach()
    with pytest.raises(ThinwireError, match="ranks_per_node is 3; it is the ranks of one node, and must divide 4"):
        thinwire.attach(ddp, topk(0.1), optimizer=optimizer, ranks_per_node=3)
    mesh = DeviceMesh("cpu", [0, 1, 2, 3])
    with pytest.raises(ThinwireError, match="ranks_per_node is a mesh of 1 dimensions and 4 ranks"):
        thinwire.attach(ddp, cast("float16"), ranks_per_node=mesh)
    with pytest.raises(ThinwireError, match="ranks differ: rank 0 has ranks_per_node: 2; rank 1 has ranks_per_node: 4"):
        thinwire.attach(ddp, topk(0.1), optimizer=optimizer, ranks_per_node=4 if rank else 2)
    return flat_parameters(model)


def test_attach_again_and_bad_nodes(world4):
    a, *others = world4.run(_again)
    assert all(torch.equal(a, b) for b in others)


def _leaves_out_a_step(rank, cases):
    """How each run ends where one rank leaves out a step of the optimizer."""
    found = []
    for engine, method, who in cases:
        model, optimizer = build()
        run = DistributedDataParallel(model) if engine == "ddp" else model
        options = {"ranks_per_node": 2, "check_every": 0, "kernels": "reference"}
        options |= {} if engine == "ddp" else {"process_group": dist.group.WORLD}
        wire = thinwire.attach(run, method, optimizer=optimizer, **options)
        try:
            for step in range(4):
                optimizer.zero_grad()
                loss_of(run, batch(rank, step)).backward()
                if (rank, step) != (who, 1):
                    optimizer.step()
            found.append((step, "nothing"))
        except ThinwireError as error:
            before = flat_parameters(model)
            optimizer.step()
            assert torch.equal(before, flat_parameters(model))
            found.append((step, str(error)))
        dist.barrier()
        wire.detach()
    return found


LEFT_OUT = [(engine, m, who) for engine in ("ddp", "bare") for m in (topk(0.05), powersgd(2)) for who in (1, 2)]
LEFT_OUT += [("ddp", m, who) for m in (topk(0.05), powersgd(2)) for who in (0, 3)]
LEFT_OUT += [("ddp", dgc(0.02, route="two_phase"), 3), ("ddp", scalecom(0.05), 2), ("bare", cast("bfloat16"), 1)]


def test_a_step_that_a_rank_of_any_lane_leaves_out_is_an_error_on_all(world4):
    for rank, found in enumerate(world4.run(_leaves_out_a_step, LEFT_OUT, timeout=240)):
        for (engine, method, who), (step, error) in zip(LEFT_OUT, found, strict=True):
            assert error.startswith(f"step {2 - (rank == who)}: ranks are at different steps"), (
                engine, method.name, who, error,
            )  # fmt: skip
            assert step == 2, (engine, method.name, who)


def _experts(rank):
    """A layer that only one rank of a node uses: its head must be the same on both."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(40, 40) for _ in range(3)])
    ddp_model = _Pick(model, rank)
    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.01)
    ddp = DistributedDataParallel(ddp_model, find_unused_parameters=True)
    wire = thinwire.attach(ddp, topk(0.1), optimizer=optimizer, ranks_per_node=2)
    for _ in range(4):
        optimizer.zero_grad()
        ddp(torch.randn(3, 40)).square().mean().backward()
        optimizer.step()
    close(wire)
    return flat_parameters(ddp_model)


class _Pick(torch.nn.Module):
    def __init__(self, layers, rank) -> None:
        super().__init__()
        self.layers, self.rank = layers, rank

    def forward(self, x):
        return self.layers[0](self.layers[1](x) if self.rank == 1 else x)


def test_unused_inside_a_node(world4):
    a, *others = world4.run(_experts)
    assert all(torch.equal(a, b) for b in others)


def test_two_workers_are_still_the_simulator():
    """Guards the comparison above: the batch of a node is not that of one rank."""
    assert not torch.equal(simulated(topk(0.05), 2, 3)[0], simulated(topk(0.05), 4, 3)[0])
