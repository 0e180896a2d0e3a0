"""Messages that go straight to whom they are for: the same answers as gloo's own, and what happens without one."""

import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.engines.test_faults import finish, start_ranks
from thinwire.exchange import direct
from thinwire.exchange.collectives import ProcessGroup


def _exchanged(groups, sizes):
    """What all ranks get from each other, with everything under way at once."""
    flights = []
    for i, nbytes in enumerate(sizes):
        for j, group in enumerate(groups):
            generator = torch.Generator().manual_seed(100 * group.rank + 10 * i + j)
            rows = torch.randint(256, (group.world, nbytes), dtype=torch.uint8, generator=generator)
            flights += [group.all_gather(rows[0].clone()), group.all_to_all(rows)]
    for flight in flights:
        flight.future.wait()
    return [flight.answer() for flight in flights]


def _alike(rank, sizes):
    before = threading.active_count()
    found = {}
    for least in (0, 2**40):  # straight, and by gloo's own
        groups = [ProcessGroup(dist.group.WORLD) for _ in range(2)]  # of the same ranks, as two sessions have them
        with mock.patch.object(direct, "LEAST", least):
            found[least] = _exchanged(groups, sizes)
        assert (threading.active_count() == before) == (least > 0)
        for group in groups:
            group.close()
    assert threading.active_count() == before
    return all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


@pytest.mark.parametrize("sizes", [[0, 1, 1000], [100_000, 1, 3_000_000, 70_000]], ids=["small", "large"])
def test_it_answers_what_gloo_does(world2, world4, sizes):
    assert all(world2.run(_alike, sizes))
    assert all(world4.run(_alike, sizes))


def _pays(rank):
    rows = [torch.empty(direct.LEAST - 1, dtype=torch.uint8), torch.empty(direct.LEAST, dtype=torch.uint8)]
    return [direct.pays(dist.group.WORLD, row) for row in rows]


def test_short_messages_are_left_to_gloo(world4):
    assert world4.run(_pays) == [[False, True]] * 4


RANK = """
import os, sys, threading, time
import torch, torch.distributed as dist
from thinwire.exchange.collectives import ProcessGroup
dist.init_process_group("gloo")
group = ProcessGroup(dist.group.WORLD)
def start():
    return group.all_gather(torch.zeros(1_000_000, dtype=torch.uint8))
start().future.wait()
what = sys.argv[1]
if group.rank == 1:
    if what != "dies":
        time.sleep(4)
    os._exit(0)
flights = [start(), start()]
if what != "leaves":
    for flight in flights:
        try:
            flight.wait(1.0)
        except RuntimeError as error:
            print(error)
        try:
            flight.future.wait()
        except RuntimeError as error:
            print("future:", type(error).__name__)
    print("lost", group.lost())
    group.close()
    print("threads", threading.active_count())
"""


@pytest.mark.parametrize("what", ["dies", "is late", "leaves"])
def test_nobody_waits_for_ever(what):
    ranks = start_ranks(2, ["-c", RANK, what])
    (output, error), _ = finish(ranks)
    assert ranks[0].returncode == 0, error
    if what == "leaves":  # while something is under way
        return
    lines = output.splitlines()
    assert lines[1::2][:2] == ["future: RuntimeError"] * 2, output
    assert ("timed out after 1 s" in output) == (what == "is late")
    assert lines[-1] == "threads 1"
    if what == "dies":
        assert lines[-2] == "lost [1]"
