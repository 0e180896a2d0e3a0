"""Overlap: the time of a round of local steps with its exchange in the background, over that without an exchange.

    python -m benchmarks.overlap --link 100mbit --json overlap.json

Two hosts of the lab exchange dense updates of one model. An inner step is a pause (as a GPU's step is for the CPU) of
such a length that the exchange alone takes ``--share`` of a round. The rounds of all forms run in turn in one process;
the seconds of a round are those of the slowest rank, the ratio is to the median round without an exchange.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import thinwire
from benchmarks.lab import report, run_ranks
from thinwire import methods
from thinwire.report import results

FORMS = {
    "local": None,
    "blocking": lambda every: methods.diloco(every),
    "delayed": lambda every: methods.local(every=every, delay=every - 1),
    "co2": lambda every: methods.co2(every, penalty=None, clip=None),
}


def exchange_seconds(numbers: int, rounds: int) -> float:
    """Return the median seconds of one dense all-reduce."""
    message, found = torch.zeros(numbers), list[float]()
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(message)
        found.append(time.perf_counter() - start)
    slowest = torch.tensor(found)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest.median())


def rounds_of(form: str, task: dict[str, Any], pause: float) -> list[float]:
    """Return the seconds of each round on the slowest rank."""
    torch.manual_seed(0)
    every, width = task["every"], task["width"]
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(task["layers"])))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    wire, make = None, FORMS[form]
    if make is not None:
        wire = thinwire.attach(model, make(every), optimizer=optimizer, process_group=dist.group.WORLD, timeout=120.0)
    found: list[float] = []
    for _ in range(task["rounds"] + 1):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(every):
            time.sleep(pause)
            optimizer.step()
        found.append(time.perf_counter() - start)
    if wire is not None:
        wire.detach()
    slowest = torch.tensor(found[1:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.tolist()


def rank(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    numbers = task["layers"] * task["width"] ** 2
    takes = exchange_seconds(numbers, 3)
    pause = takes / task["share"] / task["every"]
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(task["turns"]):
        for form in FORMS:
            found[form] += rounds_of(form, task, pause)
    report({"exchange_s": takes, "rounds": found})
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", default="100mbit", help="none for the loopback")
    parser.add_argument("--share", type=float, default=0.8, help="seconds of an exchange over those of the inner steps")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    task = {key: value for key, value in vars(args).items() if key not in ("json", "link")}
    found = run_ranks("benchmarks.overlap", task, 2, args.link, timeout=900.0)[0]
    rows = [results.Row("exchange", "seconds", found["exchange_s"])]
    local = statistics.median(found["rounds"]["local"])
    for form, seconds in found["rounds"].items():
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        rows.append(results.Row(form, "round_s", median, low, high))
        rows.append(results.Row(form, "over_local", median / local, low / local, high / local))
        print(  # a line
            f"{form:<10} {median:7.3f} s a round, {median / local:.3f} of local ({low / local:.3f}-{high / local:.3f})"
        )
    if args.json:
        results.write(args.json, results.meta(thinwire.__version__), rows)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        rank(json.loads(sys.argv[1]))
    else:
        main()
