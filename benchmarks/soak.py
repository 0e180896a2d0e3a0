"""Train for many steps and watch what a session holds: memory, threads, files.

    python -m benchmarks.soak --steps 10000 --json soak.json

Two gloo processes, DGC with warm-up and sampled selection; figures of the first process, at one tenth and nine tenths.
"""

import argparse
import gc
import os
from pathlib import Path

import torch
from tests.world import World
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.report import results


def held() -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
    }


def soak(rank: int, steps: int) -> tuple[dict[str, int], dict[str, int], float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 480), torch.nn.Tanh(), torch.nn.Linear(480, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.1)
    method = thinwire.dgc(0.001, warmup=thinwire.Warmup(max(4, steps // 100)), selection="sampled")
    wire = thinwire.attach(ddp, method, optimizer=optimizer)
    early = late = held()
    for step in range(steps):
        optimizer.zero_grad()
        ddp(torch.randn(8, 256)).square().mean().backward()
        optimizer.step()
        if step + 1 == steps // 10:
            early = held()
        if step + 1 == steps - steps // 10:
            late = held()
    ratio = wire.ledger.rows[-1].dense_bytes / wire.ledger.rows[-1].wire_bytes
    wire.detach()
    return early, late, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    world = World(2)
    try:
        early, late, ratio = world.run(soak, args.steps, timeout=3600.0)[0]
    finally:
        world.stop()
    rows = [results.Row("soak", "ratio", ratio)]
    for key in early:
        rows += [results.Row("soak", f"{key}_early", early[key]), results.Row("soak", f"{key}_late", late[key])]
        print(f"{key:>15}: {early[key]:>12,} after {args.steps // 10:,} steps, {late[key]:>12,} at nine tenths")
    if args.json:
        results.write(args.json, results.meta(thinwire.__version__), rows)


if __name__ == "__main__":
    main()
