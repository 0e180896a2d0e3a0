"""Messages that go straight to whom they are for: the same answers as gloo's own, and what happens without one."""

import itertools
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.engines.test_faults import finish, start_ranks
from thinwire.comm import gloo_p2p
from thinwire.comm.process_group import ProcessGroup


def _rows(world, nbytes, seed, rank):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(256, (world, nbytes), dtype=torch.uint8, generator=generator)


def _exchanged(groups, sizes):
    """Whether all get what they should, with everything under way at once."""
    in_flight = []
    for seed, (nbytes, group) in enumerate(itertools.product(sizes, groups)):
        every = [_rows(group.world, nbytes, seed, rank) for rank in range(group.world)]
        rows = every[group.rank]
        in_flight.append((group.all_gather(rows[0].clone()), torch.stack([other[0] for other in every])))
        in_flight.append((group.all_to_all(rows), torch.stack([other[group.rank] for other in every])))
    for pending, _ in in_flight:
        pending.future.wait()
    return all(torch.equal(pending.answer(), expected) for pending, expected in in_flight)


def _every_way(rank, sizes):
    before = threading.active_count()
    for least, few in ((0, 0), (2**40, 16), (2**40, 0)):  # straight, at once, and by gloo's own
        groups = [ProcessGroup(dist.group.WORLD) for _ in range(2)]  # of the same ranks, as two sessions have them
        with mock.patch.object(gloo_p2p, "LEAST", least), mock.patch.object(gloo_p2p, "FEW", few):
            assert _exchanged(groups, sizes)
        assert (threading.active_count() == before) == (least > 0)
        for group in groups:
            group.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("sizes", [[0, 1, 1000], [100_000, 1, 3_000_000, 70_000]], ids=["small", "large"])
def test_everyone_gets_what_was_sent(world2, world4, sizes):
    world2.run(_every_way, sizes)
    world4.run(_every_way, sizes)


def _subgroup(rank):
    ranks = [1, 2, 3]  # whose numbers in the group are others
    made = dist.new_group(ranks)
    if rank in ranks:
        group = ProcessGroup(made)
        assert _exchanged([group], [100_000])
        group.close()


def test_a_group_numbers_its_own_ranks(world4):
    world4.run(_subgroup)


def _let_go(rank):
    """Under way when the group is closed, or dropped."""
    before = threading.active_count()
    group = ProcessGroup(dist.group.WORLD)
    pending = group.all_gather(torch.full((30_000_000,), rank, dtype=torch.uint8))
    group.close()
    assert pending.future.wait()[1 - rank, 0] == 1 - rank
    group = ProcessGroup(dist.group.WORLD)
    group.all_gather(torch.zeros(100_000, dtype=torch.uint8)).future.wait()
    del group
    while threading.active_count() > before:  # a thread that stays is a hang, which the world ends
        time.sleep(0.01)
    dist.barrier()


def test_letting_go_does_no_harm(world2):
    world2.run(_let_go)


def _ways(rank):
    rows = [torch.empty(gloo_p2p.LEAST - 1, dtype=torch.uint8), torch.empty(gloo_p2p.LEAST, dtype=torch.uint8)]
    return [(gloo_p2p.pays(dist.group.WORLD, row), gloo_p2p.at_once(dist.group.WORLD, row)) for row in rows]


def test_long_messages_go_straight_and_short_ones_at_once(world4):
    assert world4.run(_ways) == [[(False, True), (True, False)]] * 4


RANK = """
import os, sys, threading, time
import torch, torch.distributed as dist
from thinwire.comm.process_group import ProcessGroup
dist.init_process_group("gloo")
group = ProcessGroup(dist.group.WORLD)
def start():
    return group.all_gather(torch.zeros(1_000_000, dtype=torch.uint8))
start().future.wait()
what = sys.argv[1]
if group.rank == 1:
    if what in ("is late", "leaves"):
        time.sleep(4)
    os._exit(0)
if what == "is gone":
    time.sleep(0.5)
in_flight = [start(), start()]
if what != "leaves":
    for flight in in_flight:
        try:
            flight.wait(1.0)
        except RuntimeError as error:
            print(error)
        try:
            flight.future.wait()
        except RuntimeError as error:
            print("future:", type(error).__name__)
    lost = group.lost()
    print("lost", lost.gone, lost.silent)
    group.close()
    print("threads", threading.active_count())
"""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("what", "interfaces"),
    [("is gone", "lo"), ("is late", "lo,lo"), ("leaves", "lo")],
)
def test_nobody_waits_for_ever(what, interfaces):
    ranks = start_ranks(2, ["-c", RANK, what], GLOO_SOCKET_IFNAME=interfaces)
    (output, error), _ = finish(ranks)
    assert ranks[0].returncode == 0, error
    if what == "leaves":  # while something is under way
        assert not error
        assert not output
        return
    lines = output.splitlines()
    assert lines[1::2][:2] == ["future: RuntimeError"] * 2, output
    assert ("timed out after 1 s" in output) == (what == "is late")
    assert lines[-1] == "threads 1"
    assert lines[-2] == ("lost [] [1]" if what == "is late" else "lost [1] []")
