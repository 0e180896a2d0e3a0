"""One rank of ``benchmarks.exchange``: times the exchanges that it is given, all in turn."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.lab import report
from thinwire.comm.link import Kind
from thinwire.comm.link_speed import measure
from thinwire.comm.process_group import ProcessGroup

TIMEOUT = 600.0
TIMES = 3
"""Exchanges in a row whose mean counts: ranks leave the barrier before them up to 3 ms apart."""


def exchange(group: ProcessGroup, stages: Sequence[tuple[Kind, int]]) -> list[float]:
    """The seconds of each stage: from when all ranks are through with the one before until they are with this one."""
    messages = [torch.zeros(nbytes, dtype=torch.uint8) for _, nbytes in stages]
    through: list[float] = []
    dist.barrier()
    start = time.perf_counter()
    for (kind, _), message in [*zip(stages, messages, strict=True)] * TIMES:
        if kind == "all_reduce":
            arrived = group.all_reduce(message.view(torch.float32))
        elif kind == "all_gather":
            arrived = group.all_gather(message)
        else:
            arrived = group.all_to_all(message.view(group.world, -1))
        arrived.wait(TIMEOUT)
        arrived.future.wait()
        through.append(time.perf_counter() - start)
    ends = torch.tensor([0.0, *through], dtype=torch.float64)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return ends.diff().view(TIMES, -1).mean(0).tolist()


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = ProcessGroup(dist.group.WORLD)
    cases: dict[str, list[tuple[Kind, int]]] = task["cases"]
    for stages in cases.values():
        exchange(group, stages)
    link = measure(group, TIMEOUT)
    found: dict[str, list[list[float]]] = {case: [] for case in cases}
    for _ in range(task["rounds"]):
        for case, stages in cases.items():
            found[case].append(exchange(group, stages))
    report({"seconds": found, "latency": link.latency, "bandwidth": link.bandwidth})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
