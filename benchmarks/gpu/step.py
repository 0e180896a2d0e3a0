"""A training step on one rank, by method, in turns: what compression costs the GPU, since one rank sends nothing.

``ratio_to_local`` is this / no exchange, and ``ratio_to_dense`` dense DDP / this, with the same optimizer and within a
round. What ends in ``1gbit`` takes as long as two workers would on an emulated link of 1 Gb/s.
"""

import time

import torch
import torch.distributed as dist

from benchmarks.gpu.contenders import OPTIMIZERS, SLOW, Contender, build, let_go
from benchmarks.gpu.found import Found, begin, milliseconds, peak
from benchmarks.gpu.models import TASKS

ROUNDS = 15
WARM_UP = 4
LONG = 300.0
"""Milliseconds of a step, above which it is measured in the first rounds only, one step at a time."""
FIRST = 3


def prepare(found: Found, name: str, way: str, kind: str, task_name: str) -> Contender | None:
    """Built and warm; the peak of memory is that of the warm-up, beyond what the others hold."""
    task = TASKS[task_name]()

    def warm() -> Contender:
        before = torch.cuda.memory_allocated() if found.device == "cuda" else 0
        one: list[Contender] = []

        def run() -> None:
            one.append(build(task, way, kind, found.device))
            x = task.batch().to(found.device)
            for _ in range(1 if way.endswith(SLOW) else WARM_UP):
                one[0].step(x)

        highest = peak(found.device, run)
        found.put(name, "peak_mb", [(highest - before) / 2**20])
        return one[0]

    return found.attempt(name, warm)


def measure(found: Found, model: str, tiny: bool) -> None:
    task_name = f"{model}_tiny" if tiny else model
    pairs = {f"{model}/{kind}/{way}": (way, kind) for kind, ways in OPTIMIZERS[model].items() for way in ways}
    there: dict[str, Contender] = {}
    for name, (way, kind) in pairs.items():
        if there and found.left < 15 and not tiny:
            found.note(f"{name} and what follows was not measured, for want of time")
            break
        if (one := prepare(found, name, way, kind, task_name)) is not None:
            there[name] = one
    some = next(iter(there.values()))
    sizes = sum(p.numel() for p in some.model.parameters())
    found.note(f"{model}: {sizes / 1e6:,.1f} million parameters")
    x = some.task.batch().to(found.device)
    taken: dict[str, dict[int, float]] = {name: {} for name in there}
    before = len(found.rows)
    for turn in range(2 if tiny else ROUNDS):
        names = list(there)
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            if found.left < 5 and taken[name]:
                continue
            slow = name.endswith(SLOW) or max(taken[name].values(), default=0.0) > LONG
            if slow and turn >= FIRST:
                continue
            times = 1 if slow or tiny else 5
            took = found.attempt(name, lambda one=there[name], times=times: turn_of(found, one, x, times))
            if took is None:
                let_go(there.pop(name))
            else:
                taken[name][turn] = took
        del found.rows[before:]  # those of the rounds before this one
        write(found, taken)
    for one in there.values():
        found.attempt("detach", lambda one=one: let_go(one))


def turn_of(found: Found, one: Contender, x: torch.Tensor, times: int) -> float:
    one.step(x)  # what is in no cache, after the others
    return milliseconds(found.device, lambda: one.step(x), times)


def write(found: Found, taken: dict[str, dict[int, float]]) -> None:
    for name, times in taken.items():
        if not times:
            continue
        found.put(name, "step_ms", list(times.values()))
        for other in ("local", "dense"):
            theirs = taken.get(f"{name.rpartition('/')[0]}/{other}", {})
            rounds = [turn for turn in times if turn in theirs]
            ratios = [times[i] / theirs[i] if other == "local" else theirs[i] / times[i] for i in rounds]
            if ratios:
                found.put(name, f"ratio_to_{other}", ratios)
    found.write()


def main() -> None:
    args, found = begin(__doc__)
    cuda = args.device == "cuda"
    options = {"backend": "nccl", "device_id": torch.device("cuda", 0)} if cuda else {"backend": "gloo"}
    dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    start = time.monotonic()
    found.attempt(args.model, lambda: measure(found, args.model, args.tiny))
    found.note(f"{args.model}: {time.monotonic() - start:.0f} s in all")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
