"""First contact with ``attach``, ``simulate`` and a session: each wrong argument is said, and what is plain works."""

import copy
import logging
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import batch, build, flat_parameters, loss_of
from thinwire import Rule, ThinwireError, dgc, topk
from thinwire.compressors import PowerSGD, Quantize, RandK, TopK
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.memories import ErrorFeedback, MomentumCorrection


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped():
    model, optimizer = build()
    return model, DistributedDataParallel(model), optimizer


OPTIONS = [
    (lambda m, d, o: (dgc(), d), {}, r"model is a method, dgc; the model comes first and the method second"),
    (lambda m, d, o: ("dgc", d), {}, "model is 'dgc'; the model comes first"),
    (lambda m, d, o: (TopK(0.01), d), {}, "model is a method, TopK; the model comes first"),
    (lambda m, d, o: (o, dgc()), {}, "model is an optimizer, SGD; the model comes first"),
    (lambda m, d, o: (d.parameters(), dgc()), {}, r"model is a generator, such as model.parameters\(\)"),
    (lambda m, d, o: (list(d.parameters()), dgc()), {}, "model is a list of 10; pass the model itself"),
    (lambda m, d, o: (nn.Linear, dgc()), {}, "model is the class Linear; make a model of it"),
    (lambda m, d, o: (None, dgc()), {}, "model is None"),
    (lambda m, d, o: (nn.DataParallel(m), dgc()), {}, "the model is a DataParallel, which is one process"),
    (lambda m, d, o: (nn.Sequential(d), dgc()), {}, r"attach to the DistributedDataParallel inside of it, model\.0"),
    (lambda m, d, o: (m, dgc()), {}, r"pass process_group=dist\.group\.WORLD"),
    (lambda m, d, o: (d, "dgc"), {}, r"method is the text 'dgc'; pass thinwire\.dgc\(\)"),
    (lambda m, d, o: (d, dgc), {}, r"method is the function thinwire\.dgc itself; call it"),
    (lambda m, d, o: (d, o), {}, "method is an optimizer, SGD; pass it by name"),
    (lambda m, d, o: (d, d), {}, "method is a model, DistributedDataParallel; the model comes first"),
    (lambda m, d, o: (d, dgc()), {"optimizer": torch.optim.SGD}, r"the class SGD; call it: SGD\(model\.parameters"),
    (lambda m, d, o: (d, dgc()), {"optimizer": "sgd"}, "'sgd'; pass the optimizer that steps"),
    (lambda m, d, o: (d, dgc()), {"optimizer": dgc()}, "pass the optimizer that steps"),
    (lambda m, d, o: (d, dgc()), {"optimizer": nn.Linear(2, 2)}, "a model, Linear; pass the optimizer that steps"),
    (lambda m, d, o: (d, dgc()), {"optimizer": (x for x in ())}, "a generator, such as model.parameters"),
    (lambda m, d, o: (d, dgc()), {"seed": "0"}, "seed is the text '0'; write 0, without quotes"),
    (lambda m, d, o: (d, dgc()), {"seed": 0.5}, "seed is 0.5; it must be a whole number"),
    (lambda m, d, o: (d, dgc()), {"seed": True}, "seed is True, which is no number"),
    (lambda m, d, o: (d, dgc()), {"timeout": "300"}, "timeout is the text '300'"),
    (lambda m, d, o: (d, dgc()), {"timeout": timedelta(0)}, "timeout is 0.0; it must be above 0"),
    (lambda m, d, o: (d, dgc()), {"timeout": None}, "timeout is None"),
    (lambda m, d, o: (d, dgc()), {"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'; choose one of skip, raise"),
    (lambda m, d, o: (d, dgc()), {"on_nonfinite": True}, "on_nonfinite is True; choose one of skip, raise"),
    (lambda m, d, o: (d, dgc()), {"kernels": "fast"}, "kernels is 'fast'; choose one of auto, reference"),
    (lambda m, d, o: (d, dgc()), {"emulate_link": 1e8}, "emulate_link is 100000000.0; write a bandwidth with its unit"),
    (lambda m, d, o: (d, dgc()), {"emulate_link": "fast"}, "link 'fast' is not understood"),
    (lambda m, d, o: (d, dgc()), {"ranks_per_node": "2"}, "ranks_per_node is the text '2'"),
    (lambda m, d, o: (d, dgc()), {"ranks_per_node": 0}, "ranks_per_node is 0; it is the ranks of a node"),
    (lambda m, d, o: (d, dgc()), {"scaler": True}, "scaler is True; pass the GradScaler of the run"),
    (lambda m, d, o: (d, dgc()), {"policy": thinwire.policies.LGreCo}, "policy is .*pass a policy"),
    (lambda m, d, o: (m, dgc()), {"process_group": [0]}, r"process_group is a list; pass the ranks that train"),
    (lambda m, d, o: (d, dgc()), {"fsdp2": 2}, "fsdp2 is a int; pass thinwire.Fsdp2Options"),
]


def test_what_attach_refuses(alone):
    """Each with one sentence, and nothing is changed: afterwards the same model and optimizer can be attached."""
    model, ddp, optimizer = wrapped()
    for make, options, says in OPTIONS:
        with pytest.raises(ThinwireError, match=says):
            thinwire.attach(*make(model, ddp, optimizer), **{"optimizer": optimizer, **options})
    with pytest.raises(ThinwireError, match="sparse_gradients is 1; it must be True or False"):
        thinwire.attach(model, dgc(), optimizer=optimizer, process_group=dist.group.WORLD, sparse_gradients=1)
    other = torch.optim.SGD(build()[0].parameters(), lr=0.1)
    with pytest.raises(ThinwireError, match="the optimizer holds none of the model's parameters"):
        thinwire.attach(ddp, topk(0.1), optimizer=other)
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ThinwireError, match=r"lean owns the momentum and needs .*SGD, not AdamW; .*momentum=False"):
        thinwire.attach(ddp, thinwire.lean(), optimizer=adamw)
    thinwire.attach(ddp, thinwire.lean(momentum=False), optimizer=adamw).detach()
    thinwire.attach(ddp, dgc(), optimizer=optimizer).detach()


def test_no_process_group():
    model, optimizer = build()
    for options in ({}, {"process_group": dist.group.WORLD}):
        with pytest.raises(ThinwireError, match=r"no process group; call torch\.distributed\.init_process_group\("):
            thinwire.attach(model, dgc(), optimizer=optimizer, **options)


def test_fsdp2_with_an_optimizer_from_before(alone):
    model, optimizer = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for method in (thinwire.dense(), topk(0.1)):
        with pytest.raises(ThinwireError, match=r"built before fully_shard\(\).*build the optimizer after"):
            thinwire.attach(model, method, optimizer=optimizer)
    right = torch.optim.SGD(model.parameters(), lr=0.1)
    thinwire.attach(model, thinwire.dense(), optimizer=right).detach()


def test_a_compiled_ddp_model_is_the_ddp_model(alone):
    _, ddp, optimizer = wrapped()
    wire = thinwire.attach(torch.compile(ddp, backend="eager"), topk(0.1), optimizer=optimizer)
    loss_of(ddp, batch(0, 0)).backward()
    optimizer.step()
    assert wire.step == 1


def _own(rank, bare):
    """Trains with parts that are no method, and with the one that each stands for: the same bits."""
    answers = []
    for given, meant in OWN:
        runs = []
        for method in (given, meant):
            model, optimizer = build()
            engine = {"process_group": dist.group.WORLD} if bare else {}
            trained = model if bare else DistributedDataParallel(model)
            options = {"timeout": timedelta(minutes=1), "seed": np.int64(3), "optimizer": optimizer, **engine}
            wire = thinwire.attach(trained, method, **options)
            for step in range(3):
                optimizer.zero_grad()
                loss_of(trained, batch(rank, step)).backward()
                optimizer.step()
            row = wire.ledger.rows[-1]
            probe = wire.ledger.rows[0].error
            wire.set_method(given)  # is read as in attach
            runs.append((flat_parameters(model), row.wire_bytes, row.dense_bytes, probe))
            wire.detach()
        same = torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
        answers.append((same, runs[0][1] < runs[0][2], runs[0][3] > 0))
    return answers


REST = Rule(thinwire.compressors.Cast(), thinwire.memories.NoMemory())
OWN = [
    (TopK(0.05), topk(0.05)),
    (
        TopK(0.05) >> Quantize(4),
        thinwire.Method("own", (Rule(TopK(0.05) >> Quantize(4), ErrorFeedback(), min_ndim=2), REST)),
    ),
    (PowerSGD(1), thinwire.Method("own", (Rule(PowerSGD(1), ErrorFeedback(), min_ndim=2), REST))),
    (RandK(0.2), thinwire.Method("own", (Rule(RandK(0.2), thinwire.memories.NoMemory(), min_ndim=2), REST))),
    (Rule(TopK(0.05), MomentumCorrection(), min_ndim=2), dgc(0.05)),
]


@pytest.mark.parametrize("bare", [False, True], ids=["ddp", "no wrapper"])
def test_a_compressor_or_a_rule_is_a_method(world2, bare):
    assert world2.run(_own, bare, timeout=240.0) == [[(True, True, True)] * len(OWN)] * 2


def _one_rank_is_wrong(rank):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    wrong = [
        {"emulate_link": 5}, {"seed": "0"}, {"timeout": "1"}, {"policy": 1}, {"scaler": 1}, {"kernels": None},
        {"optimizer": torch.optim.SGD}, {"method": "dgc"}, {"method": thinwire.dgc},
    ]  # fmt: skip
    said = []
    for options in wrong:
        given = {"method": dgc(), "optimizer": optimizer} | (options if rank == 1 else {})
        try:
            thinwire.attach(ddp, given.pop("method"), **given)
        except ThinwireError as error:
            said.append(str(error))
    thinwire.attach(ddp, dgc(), optimizer=optimizer).detach()
    return said


def test_what_is_wrong_on_one_rank_is_heard_by_the_other(world2):
    first, second = world2.run(_one_rank_is_wrong, timeout=240.0)
    assert len(first) == len(second) == 9
    for heard, own in zip(first, second, strict=True):
        assert own[:40] in heard


def simulated(**options):
    model, optimizer = build()
    given = {
        "model": model, "method": topk(0.1), "optimizer": optimizer, "workers": 2, "steps": 1,
        "batches": lambda worker, step: batch(worker, step), "loss": loss_of, **options,
    }  # fmt: skip
    return thinwire.simulate(given.pop("model"), given.pop("method"), **given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": dgc()}, "model is a Method; the model comes first"),
        ({"method": "topk"}, "method is the text 'topk'"),
        ({"method": thinwire.topk}, "the function thinwire.topk itself"),
        ({"optimizer": torch.optim.SGD}, "optimizer is the class SGD; call it"),
        ({"optimizer": None}, "optimizer is None"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)])}, "holds none of the model's parameters"),
        ({"workers": "2"}, "workers is the text '2'"),
        ({"workers": 0}, "workers is 0"),
        ({"workers": 1.5}, "workers is 1.5"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": True}, "steps is True"),
        ({"batches": [1]}, "batches is a list; pass a function of worker and step"),
        ({"loss": nn.MSELoss}, "loss is <class .*pass a function of model and batch"),
        ({"seed": None}, "seed is None"),
        ({"kernels": True}, "kernels is True; choose one of"),
        ({"policy": 1}, "policy is 1; pass a policy"),
    ],
)
def test_what_simulate_refuses(options, says):
    with pytest.raises(ThinwireError, match=says):
        simulated(**options)


def test_what_is_plain_simulates():
    def losses(**options):
        return simulated(**options).losses

    assert losses(workers=2.0, steps=np.int64(2)) == losses(steps=2)
    assert losses(method=TopK(0.1)) == losses()
    result = simulated(method=TopK(0.05) >> Quantize(4))
    assert result.ledger.rows[0].wire_bytes < result.ledger.rows[0].dense_bytes
    assert result.ledger.rows[0].error > 0


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (lambda: nn.LayerNorm(8), topk(0.1)),
        (lambda: nn.Linear(8, 1), topk(0.1, keep_dense="*")),
        (lambda: nn.Linear(2, 1), thinwire.powersgd(4)),
        (lambda: nn.Linear(4, 2), topk(0.9)),
    ],
    ids=["vectors", "kept dense", "declined", "more bytes"],
)
def test_a_model_of_which_nothing_is_compressed(make, method, caplog):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    width = 8 if isinstance(model, nn.LayerNorm) else model.in_features
    with caplog.at_level(logging.WARNING, "thinwire"):
        result = thinwire.simulate(
            model, method, optimizer=optimizer, workers=4, steps=2,
            batches=lambda worker, step: torch.ones(3, width), loss=lambda model, x: model(x).square().mean(),
        )  # fmt: skip
    said = f"{method.name} compresses nothing here"
    assert sum(said in note for note in result.ledger.notes) == 1
    assert said in caplog.text
    assert not any("compresses nothing" in note for note in simulated().ledger.notes)


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"weight_decay": 0.1}])
def test_a_method_of_which_some_memories_would_lose_the_momentum(settings):
    method = thinwire.Method("mine", (Rule(TopK(0.05), MomentumCorrection(), min_ndim=2), REST))
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **settings)
    with pytest.raises(
        ThinwireError, match=r"'bias' would lose them, since its memory is NoMemory; .*thinwire.memories.Momentum\(\)"
    ):
        SimulatedWorkers(model, method, optimizer, 2)
    model = nn.Linear(8, 8)
    groups = [{"params": [model.weight], **settings}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    optimizer.param_groups[1]["nesterov"] = True  # of no momentum is nothing
    session = SimulatedWorkers(model, method, optimizer, 2).session
    session.optimizer.param_groups[1]["momentum"] = 0.9
    with pytest.raises(ThinwireError, match="'bias' would lose them"):
        session.check()
    saved = optimizer.state_dict()
    optimizer.param_groups[1]["momentum"] = 0.0
    session.optimizer_link.begin(None)
    optimizer.load_state_dict(saved)
    with pytest.raises(ThinwireError, match="'bias' would lose them"):
        session.check()
    session.set_method(dgc(0.05))  # which has a place for it
    session.check()


def test_after_detach(alone):
    """What can't be done any more is said; training goes on plain, and the report stays."""
    for bare in (False, True):
        model, optimizer = build()
        other = copy.deepcopy(model)
        trained = model if bare else DistributedDataParallel(model)
        engine = {"process_group": dist.group.WORLD} if bare else {}
        wire = thinwire.attach(trained, topk(0.1), optimizer=optimizer, **engine)
        loss_of(trained, batch(0, 0)).backward()
        optimizer.step()
        saved = wire.state_dict()
        wire.detach()
        notes = list(wire.ledger.notes)
        wire.detach()
        assert wire.ledger.notes == notes
        assert "topk" in wire.report()
        for call in (
            lambda wire=wire: wire.set_method(dgc()),
            lambda wire=wire: wire.state_dict(),
            lambda wire=wire, saved=saved: wire.load_state_dict(saved),
            lambda wire=wire: wire.load("somewhere"),
            lambda wire=wire: wire.no_sync(),
        ):
            with pytest.raises(ThinwireError, match=r"after wire\.detach\(\), at step 1: .*call thinwire\.attach\(\)"):
                call()
        optimizer.zero_grad()
        loss_of(trained, batch(0, 1)).backward()
        other.load_state_dict(model.state_dict())
        loss_of(other, batch(0, 1)).backward()
        for one, same in zip(model.parameters(), other.parameters(), strict=True):
            assert one.grad is None or torch.equal(one.grad, same.grad)
        thinwire.attach(trained, topk(0.1), optimizer=optimizer, **engine).detach()


def test_what_is_no_state_of_thinwire(alone, tmp_path):
    model, ddp, optimizer = wrapped()
    wire = thinwire.attach(ddp, topk(0.1), optimizer=optimizer)
    state = wire.state_dict()
    other = nn.Sequential(nn.Linear(7, 9))
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    of_another = thinwire.attach(DistributedDataParallel(other), topk(0.1), optimizer=second).state_dict()
    wide = copy.deepcopy(state)
    wide["plan"]["middle.weight"] = wide["plan"]["middle.weight"].replace("[48, 48]", "[4800, 12]")
    for given, says in (
        ({}, "this state is empty, so it is no state of thinwire"),
        ([{}], "this state is empty"),
        (model.state_dict(), r"no state of thinwire, but a model's, or another's \(it has 'conv\.weight'"),
        (optimizer.state_dict(), "no state of thinwire, but an optimizer's"),
        ({"model": model.state_dict(), "wire": state}, r"a checkpoint that has one under 'wire'; give state\['wire'\]"),
        ("run/checkpoint", r"state is the path 'run/checkpoint'; use wire\.load\(folder\)"),
        (tmp_path / "file.pt", "state is the path .*; use wire"),
        (None, "a checkpoint is a dict, .*, not None"),
        (of_another, r"no unit 'conv\.weight' \(of shape \[16, 3, 3, 3\]\); it is of another model"),
        (wide, r"'middle\.weight' has shape \[48, 48\] here, and \[4800, 12\] in the checkpoint"),
    ):
        with pytest.raises(ThinwireError, match=says):
            wire.load_state_dict(given)
    wire.load_state_dict(state)
    dcp.save({"model": {"w": torch.ones(2)}, "other": {"x": torch.ones(1)}}, checkpoint_id=tmp_path / "saved")
    with pytest.raises(ThinwireError, match=r"no checkpoint under 'wire' can be read .*it has \['model', 'other'\]"):
        wire.load(tmp_path / "saved")
    with pytest.raises(ThinwireError, match=r"no checkpoint under 'wire' can be read from .*nowhere"):
        wire.load(tmp_path / "nowhere")
