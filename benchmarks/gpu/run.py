"""Tests and benchmarks that need CUDA, in less than eight minutes, and one page of what they found.

    make gpu PYTHON=python3
    python -m benchmarks.gpu --out page.md --json gpu.json

Every section is a process with a time of its own: one that fails or hangs leaves the others as they are. At the end
stand all failures with their tracebacks, and the exit code is 1 if there are any. ``--device cpu --tiny`` tries the
same code where there is no GPU; its figures mean nothing.
"""

import argparse
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import several
from benchmarks.gpu import page
from benchmarks.gpu.sections import ROOT, Outcome, Section, run_all
from thinwire._version import __version__
from thinwire.report import results

WHOLE = 450.0
"""Seconds for everything, so that eight minutes suffice with the start and the end of it."""
TESTS_END = 235.0
QUIET = ["-q", "-W", "default", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.reports"]


def sections(device: str, tiny: bool) -> dict[str, list[Section]]:
    """By kind, in the order in which they run."""
    env = {"THINWIRE_TEST_DEVICE": device}
    tests = [
        Section(
            f"tests/gpu/{path.name}",
            ["-m", "pytest", *QUIET, "-o", "faulthandler_timeout=100", f"tests/gpu/{path.name}"],
            200.0, True, env,
        )
        for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    ]  # fmt: skip
    interpreted = {"TRITON_INTERPRET": "1"}
    tests.append(
        Section(
            "tests/kernels/test_waits.py", ["-m", "pytest", *QUIET, "tests/kernels/test_waits.py"], 120.0, True,
            interpreted,
        )
    )  # fmt: skip
    more = ["--device", device, *(["--tiny"] if tiny else [])]
    env = interpreted if device == "cpu" else {}
    measured = [
        Section("kernels", ["-m", "benchmarks.gpu.kernels", *more], 60.0, env=env),
        Section("step of the mlp", ["-m", "benchmarks.gpu.step", "--model", "mlp", *more], 80.0, env=env),
        Section("step of the gpt", ["-m", "benchmarks.gpu.step", "--model", "gpt", *more], 110.0, env=env),
    ]
    return {"machine": [Section("machine", ["-m", "benchmarks.gpu.machine", *more], 60.0)],
            "tests": tests, "benchmarks": measured}  # fmt: skip


def described(device: str) -> dict[str, Any]:
    """Return what a reader needs to run it again."""
    meta = results.meta(__version__, device=torch.cuda.get_device_name(0) if device == "cuda" else device)
    meta["command"] = " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    for name in ("triton", "numba"):
        try:
            meta["versions"][name] = __import__(name).__version__
        except Exception:  # not there, or not for this machine
            meta["versions"][name] = "not there"
    meta["versions"]["cuda"] = str(torch.version.cuda)
    return meta


def printed(outcomes: list[Outcome]) -> int:
    """Print all failures; answers how many there are."""
    failed = [pair for one in outcomes for pair in one.failed]
    for what, said in failed:
        print(f"\n{'=' * 100}\nFAILED {what}\n{said}")
    for what, _ in failed:
        print(f"FAILED {what}")
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the page; by default in benchmarks/results, named after the device")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--only", type=several, help="machine, tests, benchmarks, or how sections' names begin")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print(f"make gpu: no CUDA here (torch {torch.__version__} sees no device), so nothing was run")
        return 0
    start = time.monotonic()
    chosen = {
        kind: [
            one
            for one in each
            if not given.only or any(part == kind or one.name.startswith(part) for part in given.only)
        ]
        for kind, each in sections(given.device, given.tiny).items()
    }
    together = max(1, min(4, (os.cpu_count() or 1) // 4))
    groups = [
        (chosen["machine"], 1, start + WHOLE),
        (chosen["tests"], together, start + TESTS_END),
        (chosen["benchmarks"], 1, start + WHOLE),
    ]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_all(groups, Path(folder))
    meta = described(given.device)
    out = given.out
    if out is None and given.device == "cuda":
        name = f"gpu_{page.slug(meta['device'])}_{datetime.now(UTC):%Y%m}.md"
        out = ROOT / "benchmarks" / "results" / name
    if out is not None:
        page.write(out, meta, outcomes)
    if given.json is not None:
        failed = [pair for one in outcomes for pair in one.failed]
        meta["failed"] = [what for what, _ in failed]
        results.write(given.json, meta, [row for one in outcomes for row in one.rows])
    print("\n".join(page.tables([row for one in outcomes for row in one.rows])))
    failures = printed(outcomes)
    print(f"\n{failures} failed; {time.monotonic() - start:.0f} s; {out or 'no page was written'}")
    return int(failures > 0)
