"""Replicas stay equal, or all ranks hear which of them parted, at which step and by which parameter."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.sharded import mesh_of
from thinwire import ThinwireError, cast, dense, dgc, powersgd, scalecom, simulate, topk
from thinwire.methods import randk


class Experts(nn.Module):
    """The first is used by rank 0 alone, and its gradient there is exactly zero; the last by nobody."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        self.body = nn.Linear(48, 48)

    def forward(self, x, rank):
        x = torch.tanh(self.body(x))
        if rank == 0:
            x = x + 0.0 * self.experts[0](x).detach() + 0.0 * self.experts[0](x)
        return x + self.experts[1](x) if rank != 1 else x


def inputs(rank, step):
    return torch.randn(4, 48, generator=torch.Generator().manual_seed(100 * step + rank))


def build(engine, optimizer="adamw", **options):
    """A model behind an engine, its optimizer, and what else attach() is to be given."""
    torch.manual_seed(0)
    model = Experts()
    if engine == "fsdp2":
        mesh = mesh_of(2, 1)
        fully_shard(model, mesh=mesh["shard"])
        options |= {"fsdp2": thinwire.Fsdp2Options(mesh["replicate"])}
    elif engine == "bare":
        options = {"process_group": dist.group.WORLD} | options
    params = list(model.parameters())
    kind = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
    if optimizer == "sgd":
        kind = torch.optim.SGD(params, lr=0.05, momentum=0.0)
    run = DistributedDataParallel(model, find_unused_parameters=True) if engine == "ddp" else model
    return model, run, kind, options


def held(model):
    return torch.cat(
        [(p.to_local() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()]
    ).clone()


def _unequal_use(rank, cases):
    results = []
    for engine, method, optimizer, options in cases:
        model, run, opt, options = build(engine, optimizer, **options)
        wire = thinwire.attach(run, method, optimizer=opt, **options)
        there = []
        for step in range(3):
            opt.zero_grad()
            run(inputs(rank, step), rank).square().mean().backward()
            there.append([expert.weight.grad is not None for expert in model.experts])
            opt.step()
        row = wire.ledger.rows[-1]
        results.append((held(model), there, row.compressed_wire_bytes < row.compressed_dense_bytes))
        wire.detach()
    return results


USES = [
    ("bare", dense(), "adamw", {}),
    ("bare", cast("bfloat16"), "adamw", {}),
    ("bare", topk(0.05), "adamw", {}),
    ("bare", topk(0.05, route="two_phase"), "adamw", {}),
    ("bare", scalecom(0.05), "adamw", {}),
    ("bare", powersgd(2), "adamw", {}),
    ("bare", thinwire.qsgd(4), "adamw", {}),
    ("bare", dgc(0.05), "sgd", {"sparse_gradients": True}),
    ("fsdp2", dense(), "adamw", {}),
    ("fsdp2", topk(0.05), "adamw", {}),
    ("ddp", dense(), "adamw", {}),
    ("ddp", randk(0.05), "adamw", {}),
]


def test_who_has_a_gradient_is_told_by_flags_and_not_by_values(world2):
    one, other = world2.run(_unequal_use, USES, timeout=180)
    for (engine, method, *_), (weights, there, fewer), (theirs, same, *_) in zip(USES, one, other, strict=True):
        assert torch.equal(weights, theirs), (engine, method.name)
        assert there == same == [[True, True, False]] * 3, (engine, method.name)
        if method.name != "dense":
            assert fewer, (engine, method.name)


def test_the_simulator_does_as_the_model_without_a_wrapper(world2):
    (real, *_), _ = (ranks[0] for ranks in world2.run(_unequal_use, [USES[2]], timeout=180))
    model, _, opt, _ = build("simulated")
    simulate(
        model, topk(0.05), optimizer=opt, batches=lambda worker, step: (inputs(worker, step), worker),
        loss=lambda m, batch: m(*batch).square().mean(), workers=2, steps=3,
    )  # fmt: skip
    assert torch.equal(held(model), real)


def _leaves_out_a_step(rank, cases):
    """At which step each run ends, and in what, where rank 1 leaves out one step of the optimizer."""
    found = []
    for engine, method, optimizer, options in cases:
        model, run, opt, options = build(engine, optimizer, **options)
        wire = thinwire.attach(run, method, optimizer=opt, **options)
        for step in range(5):
            opt.zero_grad()
            try:
                run(inputs(rank, step), rank).square().mean().backward()
            except ThinwireError as error:
                before = held(model)
                opt.step()
                assert torch.equal(before, held(model))
                found.append((step, str(error)))
                break
            if (rank, step) != (1, 1):
                opt.step()
        else:
            found.append((None, ""))
        dist.barrier()
        wire.detach()
    return found


LEFT_OUT = [
    ("bare", dense(), "adamw", {}),
    ("bare", randk(0.05), "adamw", {}),
    ("bare", powersgd(2), "adamw", {}),
    ("bare", scalecom(0.05), "adamw", {}),
    ("ddp", thinwire.methods.natural(), "adamw", {}),
    ("ddp", dense(), "adamw", {"check_every": 3}),
    ("fsdp2", powersgd(2), "adamw", {}),
    ("fsdp2", dense(), "adamw", {"check_every": 3}),
]


def test_a_step_that_one_rank_leaves_out_is_an_error_on_all_whatever_the_route(world2):
    for rank, found in enumerate(world2.run(_leaves_out_a_step, LEFT_OUT, timeout=180)):
        for (engine, method, *_), (step, error) in zip(LEFT_OUT, found, strict=True):
            assert step == 2, (engine, method.name, error)
            assert error.startswith(f"step {2 - rank}: ranks are at different steps: "), error
            assert "rank 0 is at step 2, rank 1 at 1. Some ranks called optimizer.step()" in error


def _all_leave_out(rank):
    """All ranks leave out a step: what was exchanged there never was, and the run goes on."""
    results = []
    for method in (powersgd(2), scalecom(0.05)):
        for left_out in (False, True):
            model, run, opt, options = build("bare")
            wire = thinwire.attach(run, method, optimizer=opt, **options)
            shared = {unit.name: unit.shared for unit in wire.units}
            for step in range(6):
                opt.zero_grad()
                before = {f"{n}.{k}": v.clone() for n, s in shared.items() for k, v in s.now.items()}
                run(inputs(rank, step), rank).square().mean().backward()
                if left_out and step == 2:
                    after = {f"{n}.{k}": v for n, s in shared.items() for k, v in s.now.items()}
                    assert all(torch.equal(before[key], after[key]) for key in before)
                    continue
                opt.step()
            results.append((held(model), wire.step))
            wire.detach()
    return results


def test_a_step_that_all_ranks_leave_out_is_none(world2):
    one, other = world2.run(_all_leave_out, timeout=180)
    for (weights, steps), (theirs, same) in zip(one, other, strict=True):
        assert torch.equal(weights, theirs)
        assert steps == same
    assert [steps for _, steps in one] == [6, 5, 6, 5]


def _changed(rank, cases, where):
    """What is raised where rank 1 changes a parameter before attach, or after two steps."""
    errors = []
    for engine, name, change, options in cases:
        model, run, opt, options = build(engine, **options)

        def meddle(model=model, name=name, change=change):
            if rank == 1:
                with torch.no_grad():
                    x = model.get_parameter(name)
                    change(x.to_local() if isinstance(x, DTensor) else x)

        if where == "attach":
            meddle()
        try:
            wire = thinwire.attach(run, dense(), optimizer=opt, **{"check_every": 2, **options})
        except ThinwireError as error:
            errors.append(str(error))
            continue
        try:
            for step in range(4):
                opt.zero_grad()
                run(inputs(rank, step), rank).square().mean().backward()
                opt.step()
                if step == 1 and where == "run":
                    meddle()
            errors.append("")
        except ThinwireError as error:
            errors.append(str(error))
        dist.barrier()
        wire.detach()
    return errors


def nudge(x):
    x.view(-1)[3:4].add_(1e-7)


def swap(x):
    flat = x.view(-1)
    flat[:2] = flat[:2].flip(0)


def turn(x):
    x.view(-1)[:2].neg_()


def poison(x):
    x.view(-1)[0] = torch.nan


@pytest.mark.parametrize("where", ["attach", "run"])
def test_the_first_parameter_that_differs_is_named_on_all_ranks(world2, where):
    cases = [
        ("ddp", "body.weight", nudge, {}),
        ("ddp", "experts.1.bias", swap, {}),
        ("fsdp2", "experts.0.weight", swap, {}),
    ]
    if where == "attach":
        cases += [("fsdp2", "body.bias", poison, {})]  # in the run it soon is in all parameters of all ranks
    else:
        cases += [("bare", "experts.2.weight", nudge, {}), ("bare", "body.weight", turn, {})]
        cases += [("bare", "body.weight", nudge, {"check_every": 0})]
    for errors in world2.run(_changed, cases, where, timeout=180):
        for (engine, name, _, options), error in zip(cases, errors, strict=True):
            if options.get("check_every") == 0:
                assert error == ""
                continue
            begins = "the ranks begin with different weights: " if where == "attach" else "replicas differ: "
            assert f"{begins}parameter {name!r} is not the same on all ranks: rank 1 differs from rank 0" in error, (
                engine,
                error,
            )


def _unlike(rank, sizes):
    """What FSDP2 ranks hear of which one has other layers."""
    found = []
    for mine in sizes:
        layers = [nn.Linear(4, n) for n in mine[rank]]
        model, mesh = nn.Sequential(*layers), mesh_of(2, 1)
        fully_shard(model, mesh=mesh["shard"])
        with pytest.raises(ThinwireError) as raised:
            thinwire.attach(model, dense(), fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"]), timeout=30)
        found.append(str(raised.value))
    return found


UNLIKE = [
    (([4], [4, 4, 4, 4]), "rank 0 has nothing; rank 1 has parameter '1.weight': of shape (4, 4), torch.float32"),
    (([4, 4, 4], [4]), "rank 0 has parameter '1.weight': of shape (4, 4), torch.float32; rank 1 has nothing"),
    (([4, 4], [4, 8]), "rank 0 has parameter '1.weight': of shape (4, 4), torch.float32; rank 1 has parameter '1.w"),
]


def test_ranks_with_other_parameters_hear_so_before_values_are_compared(world2):
    for errors in world2.run(_unlike, [sizes for sizes, _ in UNLIKE], timeout=180):
        for (_, said), error in zip(UNLIKE, errors, strict=True):
            assert said in error


def _four(rank):
    """A replica of a shard, and a rank of a node, that differ from the others."""
    errors = []
    torch.manual_seed(0)
    mesh = mesh_of(2, 2)
    model = Experts()
    fully_shard(model, mesh=mesh["shard"])
    if rank == 3:
        with torch.no_grad():
            model.body.weight.to_local().mul_(2)
    with pytest.raises(ThinwireError) as raised:
        thinwire.attach(model, dense(), fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"]))
    errors.append(str(raised.value))
    torch.manual_seed(0)
    model = Experts()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    wire = thinwire.attach(
        model, topk(0.05), optimizer=opt, process_group=dist.group.WORLD, ranks_per_node=2, check_every=1
    )
    with torch.no_grad():
        if rank in (1, 2):
            model.experts[1].weight[0, 0] = 7.0
    with pytest.raises(ThinwireError) as raised:
        model(inputs(rank, 0), rank).square().mean().backward()
    errors.append(str(raised.value))
    dist.barrier()
    wire.detach()
    return errors


def test_shards_are_compared_with_their_replicas_and_nodes_rank_by_rank(world4):
    for shards, nodes in world4.run(_four, timeout=180):
        assert "parameter 'body.weight' is not the same on all ranks: rank 3 differs from rank 1, which" in shards
        assert "parameter 'experts.1.weight' is not the same on all ranks: ranks 1 and 2 differ from rank 0" in nodes


@pytest.mark.parametrize("wrong", [-1, 2.5, True])
def test_what_is_no_number_of_exchanges_is_refused(world2, wrong):
    for [error] in world2.run(_changed, [("ddp", "body.weight", nudge, {"check_every": wrong})], "run", timeout=180):
        assert error.startswith(f"check_every is {wrong!r}; it is a number of exchanges")


def _raises_in_the_check(rank):
    """What a rank hears where another raises something in the check of replicas, or never comes to it."""
    _, run, opt, options = build("bare", process_group=dist.new_group([0, 1]))
    wire = thinwire.attach(run, topk(0.05), optimizer=opt, check_every=1, timeout=20.0, **options)
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr("thinwire.session.replicas.fingerprint", lambda _: {}["of its own"])
        with pytest.raises((ThinwireError, KeyError)) as raised:
            run(inputs(rank, 0), rank).square().mean().backward()
    wire.abandon()
    dist.barrier()
    return str(raised.value)


def test_what_is_raised_in_the_check_of_replicas_is_told(world2):
    honest, raised = world2.run(_raises_in_the_check)
    assert "of its own" in raised
    assert "rank 1" in honest
    assert "step 0: the check of replicas failed" in honest
