"""Cells of four processes: nodes, another world size, and FSDP2 on two replicas of two shards."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from benchmarks.same_bits.events import through_file
from benchmarks.same_bits.public import public as tw
from benchmarks.same_bits.training import STEPS, Found, Network, Ranks, start

Event = Callable[[Ranks], Found]
NAMES = ("dense", "dgc-all_gather", "topk-two_phase", "powersgd", "qsgd-two_phase", "ef21_sgdm-all_gather")
REMEMBERING = ("dgc-all_gather", "topk-all_gather", "ef21_sgdm-all_gather", "econtrol-all_gather", "powersgd")
SHARDED_NAMES = (*NAMES, "dgc-clip", "dgc-two_phase", "topk-all_gather", "onebit_adam-two_phase", "demo")
SHARDED: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    **{name: (name, dict) for name in SHARDED_NAMES},
    "scatter": ("dense", lambda: {"reduce_scatter": tw.QSGD(8)}),
    "scatter-topk": ("topk-all_gather", lambda: {"reduce_scatter": tw.Quantize(8, rounding="stochastic")}),
    "scatter-feedback": ("dense", lambda: {"reduce_scatter": tw.Rule(tw.QSGD(8), tw.ErrorFeedback())}),
    "gather": ("dense", lambda: {"all_gather": tw.Quantize(8)}),
    "both": (
        "dgc-all_gather",
        lambda: {"reduce_scatter": tw.Quantize(8, rounding="stochastic"), "all_gather": tw.Quantize(8)},
    ),
    "policy": ("topk-all_gather", lambda: {"policy": tw.LGreCo(every=4, looks=2)}),
}
"""The method between replicas, and further options of attach."""


def _sharded(method: str, more: Callable[[], dict[str, Any]], ranks: Ranks, resumed: bool = False) -> Found:
    inner = Network()
    mesh = ranks.mesh
    for part in (inner.first, inner.norm, inner.last, inner):
        fully_shard(part, mesh=mesh["shard"])
    run = start(ranks, "fsdp2", method, inner, replicate=mesh["replicate"], **more())
    run.train(*range(STEPS // 2))
    if resumed:  # back to where it is now, from two steps on
        state = run.wire.state_dict()
        run.train(3, 4)
        run.wire.load_state_dict(state)
    run.train(*range(STEPS // 2, STEPS))
    return run.found()


def _nodes(method: str, engine: str, ranks: Ranks) -> Found:
    run = start(ranks, engine, method, group=ranks.four, ranks_per_node=2)
    run.train(*range(STEPS))
    return run.found()


def _four(method: str, engine: str, ranks: Ranks) -> Found:
    """Without a sum, whose order is gloo's own with more than two."""
    run = start(ranks, engine, method, group=ranks.four)
    run.train(*range(STEPS))
    return run.found()


def _folded(method: str, how: str, ranks: Ranks) -> Found:
    """From four processes to two."""
    run = start(ranks, "bare", method, group=ranks.four)
    run.train(0, 1, 2)
    state, every = run.saved(), [None] * 4
    dist.all_gather_object(every, through_file(state["wire"]), group=ranks.four)
    left = run.found()
    if ranks.rank >= 2:
        return left
    fewer = start(ranks, "bare", method)
    fewer.load_trained(state)
    fewer.wire.load_state_dict(every, on_world_change=how)
    fewer.train(3, 4, 5)
    return fewer.found()


def _unfolded(method: str, how: str, ranks: Ranks) -> Found:
    """From two processes to four."""
    saved: list[Any] = [None, None]
    if ranks.rank < 2:
        run = start(ranks, "bare", method)
        run.train(0, 1, 2)
        dist.all_gather_object(saved, through_file(run.saved()), group=ranks.pair)
        run.wire.detach()
    dist.broadcast_object_list(saved, src=0, group=ranks.four)
    more = start(ranks, "bare", method, group=ranks.four)
    more.load_trained(saved[0])
    more.wire.load_state_dict([one["wire"] for one in saved], on_world_change=how)
    more.train(3, 4, 5)
    return more.found()


def cells() -> dict[str, Event]:
    found: dict[str, Event] = {f"fsdp2/{name}": partial(_sharded, *SHARDED[name]) for name in SHARDED}
    for method in ("dgc-all_gather", "powersgd", "ef21_sgdm-all_gather"):
        found[f"fsdp2/resumed/{method}"] = partial(_sharded, method, dict, resumed=True)
    for engine in ("ddp", "bare"):
        for method in (
            "dense",
            "dgc-all_gather",
            "topk-two_phase",
            "powersgd",
            "qsgd-two_phase",
            "ef21_sgdm-all_gather",
        ):
            found[f"nodes/{method}/{engine}"] = partial(_nodes, method, engine)
        for method in ("dgc-all_gather", "topk-two_phase", "signsgd-two_phase"):
            found[f"four/{method}/{engine}"] = partial(_four, method, engine)
    for method in REMEMBERING:
        for how in ("fold", "reset"):
            found[f"folded/{method}/{how}"] = partial(_folded, method, how)
        found[f"unfolded/{method}"] = partial(_unfolded, method, "fold")
    return found
