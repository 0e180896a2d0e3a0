"""A model without a wrapper, on real gloo processes."""

import gc
import threading
import time
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import thinwire
from tests.engines.models import Net, accumulated, batch, build, flat_parameters, loss_of, simulated
from tests.engines.test_ddp import close
from thinwire import ThinwireError, Warmup, cast, dense, dgc, topk
from thinwire.engines import bare
from thinwire.engines.bare import Plain
from thinwire.exchange import pipeline
from thinwire.methods.basic import IDENTITY


def start(rank, method, sgd=None, **options):
    """Ranks begin with parameters of their own, and end up with those of rank 0."""
    model, optimizer = build(seed=rank, **(sgd or {}))
    wire = thinwire.attach(model, method, optimizer=optimizer, process_group=dist.group.WORLD, **options)
    return model, optimizer, wire


def end(wire):
    """It really has compressed."""
    facts = close(wire)
    assert facts["wire_bytes"] < facts["dense_bytes"]
    assert facts["error"] > 0


def _train(rank, method, steps, sgd, options):
    model, optimizer, wire = start(rank, method, sgd, **options)
    sparse = set()
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(rank, step)).backward()
        sparse |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.is_sparse}
        optimizer.step()
    return flat_parameters(model), sparse, close(wire)


def trained(world, method, steps=12, sgd=None, **options):
    results = world.run(_train, method, steps, sgd, options)
    parameters, sparse, facts = results[0]
    assert all(torch.equal(parameters, other) for other, _, _ in results[1:]), "replicas drifted apart"
    if method.name != "dense":
        assert facts["wire_bytes"] < facts["dense_bytes"]
        assert facts["error"] > 0
    return parameters, sparse, facts


def same(a, b, sparse):
    """Bit-equal; but SGD rounds a sparse step once more than a dense one."""
    torch.testing.assert_close(a, b, rtol=1e-4 if sparse else 0.0, atol=1e-6 if sparse else 0.0)


@pytest.mark.parametrize(
    "method",
    [dgc(0.005), dgc(0.005, values="int4"), dgc(0.005, route="two_phase"), dgc(0.005, clip=0.5)],
    ids=["dgc", "int4", "two_phase", "clip"],
)
def test_sparse_and_dense_gradients_and_the_simulator_agree(world2, method):
    torch.set_num_threads(1)
    expected = simulated(method, 2, 12)[0]
    for sparse in (True, False):
        parameters, found, facts = trained(world2, method, sparse_gradients=sparse)
        same(parameters, expected, sparse)
        assert found == ({"conv.weight", "first.weight", "middle.weight", "last.weight"} if sparse else set())
        notes = [note for note in facts["notes"] if "reach the optimizer" in note]
        assert notes == (["4 of 8 gradients reach the optimizer as sparse tensors"] if sparse else [])


def test_four_workers_and_nodes(world4):
    torch.set_num_threads(1)
    parameters, found, _ = trained(world4, dgc(0.002), sparse_gradients=True)
    assert found
    same(parameters, simulated(dgc(0.002), 4, 12)[0], True)
    inside = trained(world4, dgc(0.005), ranks_per_node=2, sparse_gradients=True)
    assert inside[1]
    assert "between 2 nodes of 2 ranks" in inside[2]["report"]


class Aliased(nn.Module):
    """Gradients that are views of what flows on, or of one memory, and become ``.grad`` without a copy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.table, self.other = (nn.Parameter(torch.randn(64, 48)) for _ in range(3))

    def forward(self, x):
        return x * self.scale + self.table.unsqueeze(0) + self.other.view(48, 64).view(64, 48)


def _aliased(rank, method, sparse, flat):
    bare.BUCKET, before = 4 * 64 * 48, bare.BUCKET
    try:
        model, alone = Aliased(), Aliased()
        memory = torch.zeros(3, 64, 48)  # gradients that the user has laid into one memory stay there
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"process_group": dist.group.WORLD, "sparse_gradients": sparse}
        wire = thinwire.attach(model, method, optimizer=optimizer, **options)
        found = []
        for step in range(3):
            xs = [torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(2 * step + one)) for one in (0, 1)]
            optimizer.zero_grad()
            if flat:
                for param, grad in zip(model.parameters(), memory.zero_(), strict=True):
                    param.grad = grad
            (model(xs[rank]) * xs[rank]).sum().backward()
            expected = [torch.autograd.grad((alone(x) * x).sum(), list(alone.parameters())) for x in xs]
            means = [(one + other) / 2 for one, other in zip(*expected, strict=True)]
            grads = [param.grad for param in model.parameters()]
            found.append([torch.equal(grad.to_dense(), mean) for grad, mean in zip(grads, means, strict=True)])
            if flat:
                assert torch.equal(memory, torch.stack(grads))
        row, error = wire.ledger.rows[-1], wire.ledger.rows[0].error
        wire.detach()
        return found, error, row.compressed_wire_bytes < row.compressed_dense_bytes
    finally:
        bare.BUCKET = before


def _only(name, method):
    return thinwire.Method(method.name, (replace(method.rules[0], match=name), IDENTITY))


@pytest.mark.parametrize(("sparse", "flat"), [(False, False), (False, True), (True, False)])
def test_memory_that_autograd_still_reads_is_left_alone(world2, sparse, flat):
    for found, _, _ in world2.run(_aliased, dense(), sparse, flat):
        assert found == [[True] * 3] * 3
    for name, place in (("table", 1), ("other", 2)):  # what is not compressed arrives as it is
        for found, error, fewer in world2.run(_aliased, _only(name, topk(0.05)), sparse, flat):
            assert found == [[one != place for one in range(3)]] * 3, (name, found)
            assert error > 0
            assert fewer


@pytest.mark.parametrize("method", [topk(0.05), cast("float16"), dense()], ids=lambda m: m.name)
def test_other_methods(world2, method):
    torch.set_num_threads(1)
    assert torch.equal(trained(world2, method)[0], simulated(method, 2, 12)[0])


def test_what_is_not_few_stays_dense(world2):
    """Stages of a warm-up above the limit, and a weight decay that touches all."""
    warm = trained(world2, dgc(0.005, warmup=Warmup(8)), sparse_gradients=True)
    assert next(note for note in warm[2]["notes"] if "reach the optimizer" in note).startswith("0 of 8")
    assert len(warm[1]) == 4
    assert not trained(world2, dgc(0.005), sgd={"weight_decay": 0.01}, sparse_gradients=True)[1]


def _accumulate(rank, sparse):
    model, optimizer, wire = start(rank, dgc(0.005), sparse_gradients=sparse)
    for step in range(6):
        optimizer.zero_grad()
        with wire.no_sync():
            (loss_of(model, batch(rank, 2 * step)) / 2).backward()
        assert wire.step == step
        (loss_of(model, batch(rank, 2 * step + 1)) / 2).backward()
        optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loss_of(model, batch(rank, 20)).backward()
    end(wire)
    return flat_parameters(model), [str(w.message) for w in caught if "wire.no_sync()" in str(w.message)]


def test_accumulation(world2):
    torch.set_num_threads(1)
    (a, warned), (b, _) = world2.run(_accumulate, False)
    assert len(warned) == 1
    assert torch.equal(a, b)
    same(a, world2.run(_accumulate, True)[0][0], True)
    torch.testing.assert_close(a, accumulated(dgc(0.005), 6), rtol=1e-4, atol=1e-5)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(32, 64)
        self.left, self.right, self.spare = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x, left):
        x = torch.tanh(self.trunk(x))
        return self.left(x) if left else self.right(x)


def _branches(rank, sparse):
    torch.manual_seed(rank)
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wire = thinwire.attach(
        model, dgc(0.005), optimizer=optimizer, process_group=dist.group.WORLD, sparse_gradients=sparse
    )
    spare = model.spare.weight.detach().clone()
    for step in range(8):
        optimizer.zero_grad()
        left = step < 4 or rank == 0  # later the ranks part
        model(batch(rank, step).flatten(1)[:, :32], left).square().mean().backward()
        seen = model.right.weight.grad is not None, model.spare.weight.grad is None
        assert seen == (step >= 4, True)
        optimizer.step()
    assert torch.equal(model.spare.weight, spare)
    ratio = wire.ledger.wire_bytes / wire.ledger.dense_bytes
    end(wire)
    return flat_parameters(model), ratio


def test_ranks_that_use_different_parameters(world2):
    (a, ratio), (b, _) = world2.run(_branches, True)
    assert torch.equal(a, b)
    assert ratio < 0.5
    same(a, world2.run(_branches, False)[0][0], True)


def _poisoned(rank, scaled):
    model, optimizer, wire = start(rank, dgc(0.005), sparse_gradients=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    wire.rounds.scaler = scaler
    for step in range(4):
        before = (
            flat_parameters(model),
            {n: s.now["residual"].clone() for n, s in wire.workers[0].local.items() if s.now},
        )
        optimizer.zero_grad()
        loss = loss_of(model, batch(rank, step))
        (scaler.scale(loss) if scaler else loss).backward() if step != 2 or rank == 0 else (loss * torch.nan).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        same = torch.equal(before[0], flat_parameters(model))
        assert same == (step == 2)
        if step == 2:
            local = wire.workers[0].local
            assert all(
                torch.equal(local[name].now["residual"], r)
                for name, r in before[1].items()
                if "residual" in local[name].now
            )
    skipped = wire.ledger.skipped
    end(wire)
    return flat_parameters(model), skipped


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_not_finite_never_happened(world2, scaled):
    (a, skipped), (b, _) = world2.run(_poisoned, scaled)
    assert torch.equal(a, b)
    assert skipped == 1


def _moves_house(rank):
    """What was saved under DDP goes on without it, and the other way round."""
    model, optimizer, wire = start(rank, dgc(0.005))
    other, theirs = build(seed=5)
    ddp = DistributedDataParallel(other)
    under = thinwire.attach(ddp, dgc(0.005), optimizer=theirs)
    for step in range(6):
        if step == 3:  # they change places
            saved, others = wire.state_dict(), under.state_dict()
            weights = {name: x.clone() for name, x in model.state_dict().items()}
            model.load_state_dict(other.state_dict())
            other.load_state_dict(weights)
            wire.load_state_dict(others)
            under.load_state_dict(saved)
        for net, opt in ((model, optimizer), (ddp, theirs)):
            opt.zero_grad()
            loss_of(net, batch(rank, step)).backward()
            opt.step()
    end(wire)
    end(under)
    unbroken, opt, wire = start(0, dgc(0.005))
    for step in range(6):
        opt.zero_grad()
        loss_of(unbroken, batch(rank, step)).backward()
        opt.step()
    end(wire)
    return torch.equal(flat_parameters(other), flat_parameters(unbroken))


def test_a_checkpoint_does_not_know_the_wrapper(world2):
    assert all(world2.run(_moves_house))


def _bad(rank, what):
    model, optimizer = build()
    group, options, method = dist.group.WORLD, {}, dgc(0.05)
    if what == "ddp inside":
        model = nn.Sequential(DistributedDataParallel(model))
    elif what == "ddp":
        model = DistributedDataParallel(model)
    elif what == "adam":
        optimizer, options, method = torch.optim.Adam(model.parameters()), {"sparse_gradients": True}, topk(0.05)
    elif what == "momentum":
        options, method = {"sparse_gradients": True}, topk(0.05)
    elif what == "outsider":
        group = dist.GroupMember.NON_GROUP_MEMBER
    elif what == "meta":
        model = Net().to("meta")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elif what == "embedding":
        model = nn.Embedding(10, 10, sparse=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elif what == "buffers":
        model.register_buffer("extra", torch.zeros(3 + rank))
    elif what == "frozen":
        model.requires_grad_(False)
    elif what == "twice":
        thinwire.attach(model, method, optimizer=optimizer, process_group=group)
    elif what == "fused":
        optimizer, options = build(fused=True)[1], {"sparse_gradients": True}
        optimizer.add_param_group({"params": list(model.parameters())})
    elif what == "shared":
        model.register_buffer("extra", torch.zeros(1).expand(5))
    elif what == "part":
        thinwire.attach(model, method, optimizer=optimizer, process_group=group)
        model = model.middle
    elif what == "replicate":
        options = {"fsdp2": thinwire.Fsdp2Options(dist.device_mesh.init_device_mesh("cpu", (2,)))}
    try:
        thinwire.attach(model, method, optimizer=optimizer, process_group=group, **options)
    except ThinwireError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("ddp inside", "0 is a DistributedDataParallel, which averages gradients itself"),
        ("ddp", "process_group= and sparse_gradients= are for a model without a wrapper"),
        ("adam", "needs an optimizer that takes sparse gradients: SGD, Adagrad, not Adam"),
        ("momentum", "with topk the optimizer has momentum=0.9"),
        ("fused", "the optimizer is fused"),
        ("shared", "the elements of 'extra' share memory"),
        ("part", "dgc is attached to this model ('weight')"),
        ("outsider", "this rank must be in the group"),
        ("meta", "is on the meta device"),
        ("embedding", "has sparse gradients, which need DDP"),
        ("buffers", "ranks differ: rank 0 has tensor 'extra': of shape (3,)"),
        ("frozen", "no parameter that requires a gradient"),
        ("twice", "is attached to this model"),
        ("replicate", "fsdp2= is for a model that went through fully_shard"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(world2, what, message):
    for said in world2.run(_bad, what):
        assert message in said


def _changed_later(rank):
    model, _, wire = start(rank, dgc(0.05), sparse_gradients=True)
    said = []
    try:
        wire.set_method(topk(0.05))  # would give momentum back to the optimizer
    except ThinwireError as error:
        said.append(str(error))
    for change in (
        lambda: (model.frozen.requires_grad_(True), model.first.requires_grad_(False)),
        lambda: setattr(model.last, "bias", nn.Parameter(torch.zeros(4))),
    ):
        change()
        try:
            model(batch(rank, 0))
        except ThinwireError as error:
            said.append(str(error))
        model.frozen.requires_grad_(False)
    wire.detach()
    model(batch(rank, 0)).sum().backward()  # as if nothing had been
    try:
        with thinwire.attach(DistributedDataParallel(build()[0]), dense()).no_sync():
            pass
    except ThinwireError as error:
        said.append(str(error))
    return said


def test_what_changes_while_attached(world2):
    for said in world2.run(_changed_later):
        assert "'frozen.weight' required no gradient at attach" in said[1]
        assert "with topk the optimizer has momentum=0.9" in said[0]
        assert "'last.bias' was replaced after attach" in said[2]
        assert "use ddp.no_sync()" in said[3]


class Checkpointed(nn.Module):
    """All that trains is run again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64).requires_grad_(False)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.register_buffer("strided", torch.randn(4, 8)[:, ::2])
        self.register_buffer("steps", torch.zeros((), dtype=torch.int16))

    def forward(self, x, again):
        x = self.first(x).requires_grad_()
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=True) if again else layer(x))
        return {"answer": [x]}


def _checkpointed(rank, again):
    torch.manual_seed(rank)
    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    group = dist.group.WORLD
    wire = thinwire.attach(model, dgc(0.005), optimizer=optimizer, process_group=group, sparse_gradients=True)
    for step in range(5):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        model(batch(rank, step).flatten(1)[:, :64], again)["answer"][0].square().mean().backward()
        optimizer.step()
    steps = wire.ledger.steps
    end(wire)
    return flat_parameters(model), steps, model.strided.sum()


def test_reentrant_checkpoints_make_one_exchange(world2):
    (a, steps, strided), (b, _, other) = world2.run(_checkpointed, True)
    assert steps == 5
    assert torch.equal(a, b)
    assert torch.equal(strided, other)
    same(a, world2.run(_checkpointed, False)[0][0], True)


def _lives(rank, wrapped):
    model, optimizer = build()
    run = DistributedDataParallel(model) if wrapped else model
    options = {} if wrapped else {"process_group": dist.group.WORLD, "sparse_gradients": True}
    wire = thinwire.attach(run, dgc(0.05), optimizer=optimizer, **options)
    loss_of(run, batch(rank, 0)).backward()
    optimizer.step()
    gone = weakref.ref(run)
    del model, run, optimizer, wire
    gc.collect()
    return gone() is None


@pytest.mark.parametrize("wrapped", [True, False])
def test_nothing_keeps_a_model(world2, wrapped):
    assert all(world2.run(_lives, wrapped))


def _receivers(rank, wrapped):
    """The threads that receive."""
    threads, receive = set(), pipeline.receive

    def watched(*args, **kwargs):
        threads.add(threading.current_thread())
        return receive(*args, **kwargs)

    pipeline.receive = watched
    try:
        model, optimizer = build()
        run = DistributedDataParallel(model) if wrapped else model
        options = {} if wrapped else {"process_group": dist.group.WORLD}
        wire = thinwire.attach(run, dgc(0.005), optimizer=optimizer, **options)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(run, batch(rank, step)).backward()
            optimizer.step()
        end(wire)
    finally:
        pipeline.receive = receive
    return threads == {threading.current_thread()}


@pytest.mark.alone
def test_who_waits_receives(world2):
    """DDP waits for a future, which another thread completes; without it no thread is woken to receive."""
    assert world2.run(_receivers, False) == [True, True]
    assert world2.run(_receivers, True) == [False, False]


def _waited(rank, method):
    """Seconds of a backward pass over a slow link, what the ledger says was waited for, and the link's own seconds."""
    model, optimizer, wire = start(rank, method, emulate_link="100kbit,1ms")
    for step in range(3):
        dist.barrier()
        optimizer.zero_grad()
        loss = loss_of(model, batch(rank, step))
        begin = time.perf_counter()
        loss.backward()
        seconds = time.perf_counter() - begin
        optimizer.step()
    end(wire)
    row = wire.ledger.rows[-1]
    return seconds, row.exchange_seconds, row.wire_bytes * 8 / 100e3


@pytest.mark.alone
@pytest.mark.parametrize("route", ["all_gather", "two_phase"])
def test_the_ledger_says_what_was_waited_for(world2, route):
    """A part of the pass, which takes at least as long as its messages take on the link."""
    for seconds, waited, due in world2.run(_waited, dgc(0.05, route=route)):
        assert due <= seconds
        assert 0 < waited < seconds


def test_buckets_are_filled_from_the_end(monkeypatch):
    monkeypatch.setattr("thinwire.engines.bare.BUCKET", 8000)
    monkeypatch.setattr("thinwire.engines.bare.ProcessGroup", lambda *_: None)
    owned = Plain(Net(), object(), None, False, None)._owned()  # pyright: ignore[reportArgumentType]
    assert [(one.name, one.bucket) for one in owned] == [
        ("last.bias", 0), ("last.weight", 0), ("middle.bias", 0), ("middle.weight", 0),
        ("first.bias", -1), ("first.weight", -1), ("conv.bias", -1), ("conv.weight", -1),
    ]  # fmt: skip


def _departures(rank, method, link):
    """How often gradients leave in the third step, and what has become of the parameters."""
    bare.BUCKET, before, sends, send = 8000, bare.BUCKET, [], pipeline.send
    pipeline.send = lambda *args: sends.append(wire.step) or send(*args)
    try:
        model, optimizer, wire = start(rank, method, emulate_link=link)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()
        end(wire)
    finally:
        bare.BUCKET, pipeline.send = before, send
    joined = [note for note in wire.ledger.notes if note.startswith("2 buckets are sent as 1")]
    return sends.count(2), len(joined), flat_parameters(model)


def test_buckets_wait_for_each_other_unless_the_link_is_slow(world2):
    """Starting an exchange costs a core 3 ms, in which 1 Gb/s carries all of this model and 100 kb/s 37 bytes."""
    together, alone = (world2.run(_departures, dgc(0.005), link) for link in (None, "100kbit"))
    assert [found[:2] for found in (*together, *alone)] == [(1, 1), (1, 1), (2, 0), (2, 0)]
    assert all(torch.equal(found[2], together[0][2]) for found in (*together, *alone))
    owned = world2.run(_departures, dgc(0.005, route="two_phase"), None)  # what an owner gets depends on the bucket
    assert [found[:2] for found in owned] == [(2, 0), (2, 0)]
    assert torch.equal(owned[0][2], owned[1][2])
