"""What all ranks do together between steps, where one does not come, dies, or raises something."""

import re
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.test_faults import finish, start_ranks
from thinwire import ThinwireError, Warmup, dgc, topk
from thinwire.comm.collectives import NoAnswer
from thinwire.comm.control import Together
from thinwire.comm.hierarchical import Nodes
from thinwire.comm.texts import is_known
from thinwire.engines.bare import Plain
from thinwire.session.optimizer_link import OptimizerLink
from thinwire.session.session import Session


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 200), nn.Linear(200, 3))


def start(engine, group, method, **options):
    """A small model, attached to on the ranks of a group that no other test has."""
    options = {"timeout": 1.0, "kernels": "reference", **options}
    model = model_of()
    if engine == "fsdp2":
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        ranks = torch.arange(dist.get_world_size()).view(-1, 1)
        mesh = DeviceMesh.from_group([group, alone], "cpu", ranks, mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return (
            model,
            optimizer,
            lambda: thinwire.attach(
                model, method, optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"]), **options
            ),
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if engine == "ddp":
        ddp = DistributedDataParallel(model, process_group=group)
        return ddp, optimizer, lambda: thinwire.attach(ddp, method, optimizer=optimizer, **options)
    return model, optimizer, lambda: thinwire.attach(
        model, method, optimizer=optimizer, process_group=group, **options
    )  # fmt: skip


def step(model, optimizer, rank=0):
    optimizer.zero_grad()
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()


def error_of(call):
    with pytest.raises(ThinwireError) as raised:
        call()
    return str(raised.value)


def raises(error):
    def instead(*_):
        raise error

    return instead


ENGINES = ("ddp", "plain", "fsdp2")


def _absent(rank, engine):
    """Rank 1 does not come: to attach, to set_method, to a load, to a stage of the warm-up, to detach."""
    found = []
    stages = Warmup(4)
    for what in ("attach", "set_method", "load", "warm-up", "detach"):
        group = dist.new_group([0, 1])
        method = topk(0.1, warmup=stages) if what == "warm-up" else dgc(0.1)
        model, optimizer, attach = start(engine, group, method)
        wire = attach() if what != "attach" else None
        for _ in range(0 if wire is None else 2):  # in the second, DDP itself asks the others about its buckets
            step(model, optimizer)
        calls = {
            "attach": attach,
            "set_method": lambda wire=wire: wire.set_method(topk(0.1)),
            "load": lambda wire=wire: wire.load_state_dict(wire.state_dict()),
            "warm-up": lambda model=model, optimizer=optimizer: step(model, optimizer),
            "detach": lambda wire=wire: wire.detach(),
        }
        if rank == 0:
            found.append(error_of(calls[what]))
        dist.barrier()
        if wire is not None:
            wire.abandon()
    return found


@pytest.mark.alone
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_that_does_not_come_is_an_error_after_the_timeout(world2, engine):
    found, _ = world2.run(_absent, engine, timeout=120.0)
    for text, what in zip(
        found,
        (
            r"attach\(\)",
            r"step 2: set_method\(\)",
            "step 2: loading a checkpoint",
            "step 2: a stage",
            r"step 2: detach",
        ),
        strict=True,
    ):
        assert re.match(what, text), text
        assert "failed on rank 0; rank 1 did not answer: timed out after 1 s" in text
    assert "attach() is called by all ranks" in found[0]


class Clumsy:
    """No value at all: whatever is asked of it raises something else than a ThinwireError."""

    def __getattr__(self, name):
        raise TypeError(f"no {name} here") if not name.startswith("__") else AttributeError(name)

    def __str__(self):
        raise OSError("no text here")


def _raising(rank, engine):
    """Rank 1 raises what it likes, the others hear of it, and the group lives on."""
    found = []

    def raises_alike(call, kind, name):
        with pytest.raises(kind if rank else ThinwireError) as raised:
            call()
        text = str(raised.value)
        assert rank or name in text, text
        found.append(text)

    group = dist.group.WORLD
    wrong = Clumsy() if rank else topk(0.1)
    raises_alike(start(engine, group, wrong, timeout=15.0)[2], ThinwireError, "failed on rank 1: method is ")
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(sys.modules["thinwire.attach"], "method_of", raises(TypeError("no method here")))
        raises_alike(start(engine, group, topk(0.1), timeout=15.0)[2], TypeError, "failed on rank 1: TypeError: no ")
    wrong = {"emulate_link": 5 if rank else None, "kernels": "none" if rank else "reference", "timeout": 15.0}
    raises_alike(start(engine, group, topk(0.1), **wrong)[2], ThinwireError, "failed on rank 1: emulate_link is 5")
    model, optimizer, attach = start(engine, group, dgc(0.1), timeout=15.0)
    settings = dict(optimizer.param_groups[0])
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(Session, "_set_stage", raises(ZeroDivisionError()))
        raises_alike(attach, ZeroDivisionError, "failed on rank 1: ZeroDivisionError")
    now = dict(optimizer.param_groups[0])
    assert now == settings, "an attach that fails leaves the optimizer as it was"
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(OptimizerLink, "prepare", raises(KeyboardInterrupt()))
        raises_alike(attach, KeyboardInterrupt, "failed on rank 1: KeyboardInterrupt")
    wire = attach()
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr("thinwire.session.session.method_of", raises(TypeError("no method here")))
        raises_alike(lambda: wire.set_method(topk(0.2)), TypeError, "set_method() failed on rank 1: TypeError")
    broken = Clumsy() if rank else wire.state_dict()
    raises_alike(
        lambda: wire.load_state_dict(broken), ThinwireError, "loading a checkpoint failed on rank 1: a checkpoint is"
    )
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr("thinwire.session.checkpoint.restore", raises(IndexError()))
        raises_alike(lambda: wire.load_state_dict(wire.state_dict()), IndexError, "failed on rank 1: IndexError")
    raises_alike(
        lambda: wire.load("/nowhere") if rank else wire.load_state_dict(wire.state_dict()), ThinwireError, "/nowhere"
    )
    step(model, optimizer)
    assert wire.step == 1, "the session lives on too"
    wire.detach()
    return found


def _changes_in_part(rank, engine):
    """What is heard where rank 1 raises after memories have been handed over, and of what is tried after that."""
    model, optimizer, attach = start(engine, dist.group.WORLD, dgc(0.1), timeout=60.0)
    wire = attach()
    step(model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(Session, "_set_stage", raises(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError if rank else ThinwireError):
            wire.set_method(topk(0.2))
    uses = (lambda: step(model, optimizer), lambda: wire.set_method(topk(0.2)), wire.state_dict)
    found = [error_of(use) for use in uses]
    wire.detach()
    return found


@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
def test_a_session_that_was_changed_in_part_takes_no_step(world2, engine):
    for found in world2.run(_changes_in_part, engine, timeout=120.0):
        assert all(text.startswith("step 1: set_method() ended in the middle (") for text in found), found


class _Alone:
    """A rank that reaches nobody."""

    def __init__(self):
        self.everyone, self.rank, self.left = self, 1, []
        self.leave = self.left.append

    def exchange_text(self, text, timeout=None):
        raise NoAnswer("connection closed by peer")


def test_an_error_that_could_not_be_told_is_not_taken_for_a_known_one():
    channel, known = _Alone(), []

    def call():
        with Together(channel, "attach()") as together:
            try:
                with together.alone():
                    raise ValueError("of its own")
            except ValueError as error:
                known.append(is_known(error))
                raise

    with pytest.raises(ValueError, match="of its own") as raised:
        call()
    assert known == [False], "whoever cleans up must not ask the others"
    assert is_known(raised.value)
    assert channel.left == ["attach() failed on rank 1: ValueError: of its own"]
    assert "connection closed" in raised.value.__notes__[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_whatever_a_rank_raises_is_told_to_the_others(world2, engine):
    for found in world2.run(_raising, engine, timeout=120.0):
        assert len(found) == 9


def _in_the_middle(rank):
    """What is raised between two exchanges can't be reported by a third: it is left in the store."""
    found = []
    for kind, place in ((ValueError, (Plain, "_held")), (MemoryError, ("thinwire.session.session.migrate",))):
        group = dist.new_group([0, 1])
        _, optimizer, attach = start("plain", group, dgc(0.1), timeout=15.0)
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(*place, raises(kind("of its own")))
            with pytest.raises(kind if rank else ThinwireError) as raised:
                attach()
        found.append(str(raised.value))
        assert optimizer.param_groups[0]["momentum"] == 0.9
        dist.barrier()
    return found


def test_what_is_raised_in_the_middle_of_an_exchange_is_left_for_the_others(world2):
    honest, raised = world2.run(_in_the_middle, timeout=120.0)
    assert raised == ["of its own"] * 2
    for text, kind in zip(honest, ("ValueError", "MemoryError"), strict=True):
        assert f"failed on rank 1: {kind}: of its own" in text, text


DYING = """
import os, signal, sys, time
import torch, torch.distributed as dist
from tests.engines.test_control import start, step
from thinwire import ThinwireError, Warmup, dgc, topk
dist.init_process_group("gloo")
rank = dist.get_rank()
groups = [dist.new_group(range(size)) for size in (4, 3, 2)]  # the last of each is about to die
calls = {
    "attach": lambda attach, wire, model, optimizer: attach(),
    "set_method": lambda attach, wire, model, optimizer: wire.set_method(topk(0.1)),
    "warm-up": lambda attach, wire, model, optimizer: step(model, optimizer),
}
for size, group, what in zip((4, 3, 2), groups, calls):
    method = topk(0.1, warmup=Warmup(4)) if what == "warm-up" else dgc(0.1)
    model, optimizer, attach = start("plain", group, method, timeout=60.0)
    wire = attach() if what != "attach" else None
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2 * rank)
    try:
        calls[what](attach, wire, model, optimizer)
    except ThinwireError as error:
        print(what, "|", error, flush=True)
"""


def test_a_rank_that_is_killed_is_named_in_control_calls_too():
    ranks = start_ranks(4, ["-c", DYING])
    outputs = finish(ranks)
    assert [rank.returncode for rank in ranks] == [0, *[-signal.SIGKILL] * 3], outputs
    for rank, (output, _) in enumerate(outputs[:3]):
        lines = output.splitlines()
        for size, what, line in zip((4, 3, 2), ("attach", "set_method", "warm-up"), lines, strict=False):
            assert line.startswith(what)
            assert f"failed on rank {rank}; rank {size - 1} seems to be gone: " in line, line
        assert len(lines) == min(3, 3 - rank)


LINGERING = """
import sys, time
import torch, torch.distributed as dist
from tests.engines.test_control import start, step
from thinwire import ThinwireError, dgc
dist.init_process_group("gloo")
groups = [dist.new_group([0, 1]) for _ in range(3)]
for group, engine, options in zip(groups, ("plain", "ddp", "plain"), ({}, {"emulate_link": "1gbit"}, {})):
    model, optimizer, attach = start(engine, group, dgc(0.1), **options)
    wire = attach()
    step(model, optimizer)
    if dist.get_rank() == 0:
        try:
            wire.detach()
        except ThinwireError as error:
            print(error, flush=True)
    dist.barrier()
if dist.get_rank():
    time.sleep(200)
sys.exit(3)
"""


@pytest.mark.alone
def test_after_a_detach_that_timed_out_the_process_ends():
    first, second = start_ranks(2, ["-c", LINGERING])
    try:
        output, error = first.communicate(timeout=100)
        assert second.poll() is None, "the other one lives"
    finally:
        for rank in (first, second):
            rank.kill()
        finish([second])
    assert first.returncode == 3, error
    assert len(output.splitlines()) == 3
    assert "std::terminate" not in error
    for line in output.splitlines():
        assert "step 1: detach() failed on rank 0; rank 1 did not answer: timed out after 1 s" in line


def _late(rank):
    """Of three that come and one that is late, nobody is said to be gone; nor after that by another group's word."""
    texts = []
    for late in (2, 1):
        group = dist.new_group(range(4))
        _, _, attach = start("plain", group, topk(0.1), timeout=1.5)
        if rank == late:
            time.sleep(8)
        texts.append(error_of(attach))
        dist.barrier()
    return texts


@pytest.mark.alone
def test_one_who_is_late_is_not_said_to_be_gone(world4):
    found = world4.run(_late, timeout=120.0)
    for texts in found:
        assert all("gone" not in text for text in texts), texts
    for turn, late in enumerate((2, 1)):
        for rank in {0, 1, 2, 3} - {late}:
            assert f"rank {late} did not answer" in found[rank][turn], found[rank][turn]


def _between_nodes(rank):
    group = dist.new_group(range(4))
    mesh = init_device_mesh("cpu", (2, 2))
    _, _, attach = start("plain", group, dgc(0.1), ranks_per_node=mesh, timeout=1.5)
    wire = attach()
    assert isinstance(wire.collective, Nodes)
    text = error_of(wire.detach) if rank else None
    dist.barrier()
    if rank == 0:
        wire.abandon()
    return text


@pytest.mark.alone
def test_nodes_too_name_who_did_not_answer(world4):
    assert all("detach() failed on rank" in text for text in world4.run(_between_nodes, timeout=120.0)[1:])
