"""One rank of ``benchmarks.step``: trains by all methods in turn and times them."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import contenders
from benchmarks.contenders import Contender
from benchmarks.lab import nic_counters, report

WARM_UP = 4
"""Steps of each method before the first round: DDP rebuilds its buckets, PowerSGD begins, kernels are compiled."""
SLOW = 4.0
"""Seconds for a step, above which one step a round is enough."""


def block(contender: Contender, shape: Sequence[int], steps: int) -> dict[str, float]:
    """Train for some steps that begin together on all ranks; the seconds are those of the slowest."""
    batches = [torch.randn(shape) for _ in range(steps)]
    nic = nic_counters()
    dist.barrier()
    start = time.perf_counter()
    for x in batches:
        contender.step(x)
    seconds = torch.tensor((time.perf_counter() - start) / steps, dtype=torch.float64)
    dist.barrier()  # all that was sent has arrived
    measured: dict[str, float] = {}
    if nic is not None:
        measured["nic_bytes"] = (nic_counters() - nic).tx_bytes / steps
    if contender.wire is not None:
        measured["wire_bytes"] = contender.wire.ledger.rows[-1].wire_bytes
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return {"step_ms": seconds.item() * 1e3, **measured}


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    names, shape = task["methods"], contenders.MODELS[task["model"]][1]
    entries = contenders.build(task["model"], names)
    slow: dict[str, bool] = {}
    for name, contender in entries.items():
        contender.enter()
        for _ in range(WARM_UP):
            slow[name] = block(contender, shape, 1)["step_ms"] > SLOW * 1e3  # the same on all ranks
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(task["rounds"]):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            contender = entries[name]
            contender.enter()
            if not slow[name]:
                for _ in range(task["warm_up"]):
                    block(contender, shape, 1)
            found[name].append(block(contender, shape, 1 if slow[name] else task["steps"]))
    report(found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
