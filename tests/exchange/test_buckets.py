import torch

from thinwire import dense, dgc, topk
from thinwire.comm.link import Link
from thinwire.exchange.buckets import plan_bucket, start_bytes, travel_together
from thinwire.exchange.units import resolve, set_stage


def bucket(shapes, method, world, dtypes=None, **link):
    named = [(f"p{i}", torch.zeros(s, dtype=(dtypes or {}).get(i, torch.float32))) for i, s in enumerate(shapes)]
    units = resolve(named, method, {})
    set_stage(units, None, world, **link)
    return plan_bucket(units, world)


def test_small_dense_payloads_are_gathered_too():
    planned = bucket([(100, 100), (100,)], dgc(0.01), 4)
    assert [route.kind for route in planned.routes] == ["all_gather"]


def test_what_saves_turns_may_take_more_bytes():
    """12,000 elements gathered by 4 workers are 72 kB more, and 6 turns less; what those are worth, the link says."""
    shapes = [(1000, 1000), (12_000,)]
    assert [route.kind for route in bucket(shapes, dgc(0.01), 4).routes] == ["all_gather"]
    for turn_bytes, kinds in ((12_000, 1), (11_999, 2)):
        assert len(bucket(shapes, dgc(0.01), 4, turn_bytes=turn_bytes).routes) == kinds


def test_large_dense_payloads_take_their_own_all_reduce():
    planned = bucket([(100, 100), (100_000,)], dgc(0.01), 32)
    assert [(route.kind, route.units) for route in planned.routes] == [("all_gather", (0,)), ("all_reduce", (1,))]


def test_what_can_be_summed_is_summed_in_one_message_for_each_dtype():
    planned = bucket([(8,), (9,), (7,)], dense(), 2, {1: torch.bfloat16})
    assert [(route.kind, route.units, route.dtype) for route in planned.routes] == [
        ("all_reduce", (0, 2), torch.float32),
        ("all_reduce", (1,), torch.bfloat16),
    ]
    assert planned.routes[0].layout.nbytes == 60, "an all-reduce of an odd size is not padded, and has no head"


def test_bytes_of_a_bucket():
    planned = bucket([(100, 100), (100,)], topk(0.01), 4)
    total, compressed = planned.wire_bytes(4)
    assert compressed == total - 3 * planned.routes[0].layout.unit_nbytes[1], "the head and the padding count"
    assert total == 3 * planned.routes[0].layout.nbytes
    assert total < 6 * 10_100


def test_small_messages_wait_until_they_fill_a_turn():
    """One rule for messages that are ready and for plans: the head of the queue goes once it has enough bytes."""
    assert travel_together([], 10) == 0
    assert travel_together([3, 4], 10) == 0
    assert travel_together([3, 7, 5], 10) == 2
    assert travel_together([12, 7, 5], 10) == 1
    assert travel_together([0, 7], 0) == 1, "a link without latency, so none waits"
    assert start_bytes(None) == start_bytes(Link(1e9, 0.1)) == 375_000
