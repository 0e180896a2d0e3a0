"""A training step before and after a change: both revisions in one run, in turns of a second.

    python -m benchmarks.before_after 22f5d74 --methods dgc,dgc_ddp,dense_bare --json before_after.json

The revision is checked out in a folder of its own. Each side has its own ranks on the loopback, one thread a process;
while one side trains, the other waits. In a turn each method trains for ``--steps`` steps; a step is that of the
slowest rank, and the fastest of them counts, since what disturbs a step only adds to it.
``after_over_before`` is the ratio within a round, with quartiles; the first round is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import several, spread
from benchmarks.lab.processes import Hosts
from benchmarks.lab.ranks import KEEP, ROOT
from benchmarks.revisions import checked_out


def rank_main(model: str, methods: Sequence[str], steps: int) -> None:
    """One rank of one side: trains when it reads a line, and says how long a step took of each method."""
    import torch
    import torch.distributed as dist

    from benchmarks.contenders import MODELS, build

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found, x = build(model, methods), torch.randn(MODELS[model][1])
    print("ready", flush=True)
    for _ in sys.stdin:
        took: dict[str, list[float]] = {}
        for name, contender in found.items():
            contender.enter()
            contender.step(x)  # what is in no cache, after the other side
            for _ in range(steps):
                dist.barrier()
                start = time.perf_counter()
                contender.step(x)
                took.setdefault(name, []).append(1000 * (time.perf_counter() - start))
        print(json.dumps(took), flush=True)
    os._exit(0)  # nobody else waits for a farewell


class Side:
    """The ranks that train with the package in ``source``."""

    def __init__(self, hosts: Hosts, source: Path, arguments: Sequence[str]) -> None:
        argv = [sys.executable, "-m", "benchmarks.before_after", "--rank", *arguments]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        here = KEEP | {"PYTHONPATH": f"{source}:{ROOT}"}
        self.ranks = [
            hosts.popen(rank, argv, env | here, **pipes) for rank, env in enumerate(hosts.rendezvous(hosts.hosts))
        ]

    def read(self) -> list[str]:
        lines = [rank.stdout.readline() for rank in self.ranks]
        if not all(lines):
            raise SystemExit("a rank has ended; what it said stands above")
        return lines

    def turn(self) -> dict[str, float]:
        """Milliseconds of the fastest step, by method; a step is that of the slowest rank."""
        for rank in self.ranks:
            print("go", file=rank.stdin, flush=True)
        each: list[dict[str, list[float]]] = [json.loads(line) for line in self.read()]
        return {name: min(map(max, zip(*(one[name] for one in each), strict=True))) for name in each[0]}


def measure(before: Path, given: Any) -> dict[tuple[str, str], list[float]]:
    """Of each method: milliseconds before and after, and their ratio, in each round."""
    arguments = ["--model", given.model, "--methods", ",".join(given.methods), "--steps", str(given.steps)]
    found: dict[tuple[str, str], list[float]] = {}
    with Hosts(given.workers) as hosts:
        sides = [Side(hosts, source, arguments) for source in (before / "src", ROOT / "src")]
        for side in sides:
            side.read()
        for turn in range(given.rounds + 1):
            took = {id(side): side.turn() for side in (sides if turn % 2 else sides[::-1])}
            for name in given.methods if turn else ():
                old, new = (took[id(side)][name] for side in sides)
                for metric, value in (("before_ms", old), ("after_ms", new), ("after_over_before", new / old)):
                    found.setdefault((name, metric), []).append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_after", description=__doc__)
    parser.add_argument("revision", nargs="?", default="HEAD")
    parser.add_argument("--model", default="mlp", help="of benchmarks.contenders")
    parser.add_argument("--methods", type=several, default=["dgc", "dgc_ddp"], help="of benchmarks.contenders")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        rank_main(given.model, given.methods, given.steps)
        return
    import thinwire
    from thinwire.report import results

    with checked_out(given.revision) as before:
        found = measure(before, given)
    rows = [spread(name, metric, values) for (name, metric), values in found.items()]
    for row, values in zip(rows, found.values(), strict=True):
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        print(f"{row.case:12} {row.metric:18} {row.value:9.4f} [{row.low:.4f}..{row.high:.4f}] mean +- {error:.4f}")
    if given.json is not None:
        results.write(given.json, results.meta(thinwire.__version__), rows)


if __name__ == "__main__":
    main()
