"""One process of a module on every host: started, given its task, awaited, and ended."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.lab.network import Counters, Lab
from benchmarks.lab.processes import Hosts

ROOT = Path(__file__).parents[2]
MARK = "lab-report "
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""For the malloc of glibc in every rank: memory stays with the process. Otherwise it is given back and faulted in anew,
40 ms for 64 MB, or not, by accidents of layout that have nothing to do with the method."""


def report(answer: Any) -> None:
    """Hand a rank's result to ``run_ranks``: anything that JSON can hold."""
    print(MARK + json.dumps(answer), flush=True)


def nic_counters() -> Counters | None:
    """The counters of this rank's own interface; None where ranks share the loopback."""
    device = os.environ["GLOO_SOCKET_IFNAME"]
    return Counters.read("self", device) if device == Lab.device else None


def run_ranks(module: str, task: Any, world: int, link: str, timeout: float) -> list[Any]:
    """Run ``python -m module TASK`` on every host of a lab, and answer what each rank passed to ``report``.

    Args:
        module: its ``__main__`` part reads the task, in JSON, from its last argument and calls ``report`` once.
        world: ranks, one a host.
        link: of the lab; ``"none"`` means no lab: processes of this machine, on its loopback.
        timeout: seconds for all.

    Raises:
        RuntimeError: a rank failed, with the end of what it wrote; the others have been ended.
    """
    argv = [sys.executable, "-m", module, json.dumps(task)]
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(Hosts(world) if link == "none" else Lab(world, link))
        outs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
        ranks = [
            hosts.popen(rank, argv, env | KEEP, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
            for rank, (env, out) in enumerate(zip(hosts.rendezvous(world), outs, strict=True))
        ]
        while any(rank.poll() is None for rank in ranks):
            if any(rank.returncode for rank in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        texts = [_written(out) for out in outs]
        if failed := [i for i, rank in enumerate(ranks) if rank.returncode != 0]:
            first = max(failed, key=lambda i: ranks[i].returncode is not None)  # the rest may only wait for it
            code = ranks[first].returncode
            state = "is not through in time" if code is None else f"ended with {code}"
            raise RuntimeError(f"rank {first} of {module} {state}:\n{texts[first][-3000:]}")
        return [json.loads(text.rpartition(MARK)[2].splitlines()[0]) for text in texts]


def _written(out: TextIO) -> str:
    out.seek(0)
    return out.read()
