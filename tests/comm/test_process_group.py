"""One contract for every collective: real, simulated, paced."""

import threading

import pytest
import torch
import torch.distributed as dist

from thinwire import ThinwireError
from thinwire.comm.emulated import Paced
from thinwire.comm.link import Link
from thinwire.comm.process_group import ProcessGroup
from thinwire.comm.simulated import Local


def contract(collectives):
    """What every rank must see; ``collectives`` are those of the ranks that live in this process."""
    world = collectives[0].world
    for nbytes in (1, 8, 1000):
        messages = [torch.arange(nbytes, dtype=torch.uint8) + c.rank for c in collectives]
        in_flight = [c.all_gather(m) for c, m in zip(collectives, messages, strict=True)]
        for pending in in_flight:
            pending.future.wait()
            expected = torch.stack([torch.arange(nbytes, dtype=torch.uint8) + rank for rank in range(world)])
            assert torch.equal(pending.answer(), expected)
        rows = [torch.arange(world * nbytes, dtype=torch.uint8).view(world, -1) + 3 * c.rank for c in collectives]
        in_flight = [c.all_to_all(m) for c, m in zip(collectives, rows, strict=True)]
        for c, pending in zip(collectives, in_flight, strict=True):
            pending.future.wait()
            mine = torch.arange(c.rank * nbytes, (c.rank + 1) * nbytes, dtype=torch.uint8)
            assert torch.equal(pending.answer(), torch.stack([mine + 3 * rank for rank in range(world)]))
        source = world - 1
        in_flight = [c.broadcast(m.clone(), source) for c, m in zip(collectives, messages, strict=True)]
        for pending in in_flight:
            pending.future.wait()
            assert torch.equal(pending.answer(), torch.arange(nbytes, dtype=torch.uint8) + source)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        in_flight = [c.all_reduce(torch.arange(5, dtype=dtype) + c.rank) for c in collectives]
        for pending in in_flight:
            pending.future.wait()
            assert torch.equal(pending.result, world * torch.arange(5, dtype=dtype) + sum(range(world)))
    for c in collectives:
        gathered, reduced = (world - 1) * 1009, 2 * (world - 1) / world * 5 * (4 + 8 + 2 + 2)
        passed_on = (world - 1) / world * 1009
        assert c.sent == pytest.approx(2 * gathered + reduced + passed_on), "all-to-all sends what a gathered row does"
        c.exchange_text("same")
    return True


def _real(rank):
    return contract([ProcessGroup(dist.group.WORLD)])


def _paced(rank):
    before = threading.active_count()
    paced = Paced(ProcessGroup(dist.group.WORLD), Link(1e9))
    assert "emulated 1 Gb/s" in paced.label
    contract([paced])
    paced.close()
    assert threading.active_count() == before
    return True


class Clock:
    """Time that passes where somebody sleeps; it remembers until when, and on which thread."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append((self.now, threading.current_thread().name))


def _time_on_link(rank):
    clock = Clock()
    paced = Paced(ProcessGroup(dist.group.WORLD), Link(8e6, 0.01), clock)  # 1 MB/s
    in_flight = [paced.all_gather(torch.zeros(50_000, dtype=torch.uint8)) for _ in range(2)]
    for pending in in_flight:
        pending.future.wait()
    paced.close()
    return clock.slept


@pytest.mark.parametrize("fn", [_real, _paced])
def test_contract_of_processes(world2, world4, fn):
    assert all(world2.run(fn))
    assert all(world4.run(fn))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_contract_of_the_simulator(workers):
    contract(Local.of(workers))


def test_the_link_carries_one_message_after_the_other(world2):
    for slept in world2.run(_time_on_link):
        assert [until for until, _ in slept] == pytest.approx([0.06, 0.12])
        assert {thread for _, thread in slept} == {"thinwire-paced-link"}, "starting an exchange must not wait"


def test_workers_out_of_turn():
    with pytest.raises(ThinwireError, match="worker 1 of a simulation speaks out of turn"):
        Local.of(2)[1].all_gather(torch.zeros(1, dtype=torch.uint8))
