"""Results of a section so far: written after each case, so that one that is cut keeps what it has."""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import spread
from thinwire.core import files
from thinwire.report.results import Row


class Found:
    """Rows, notes and failures of one section.

    Args:
        path: of the file that is written.
        seconds: that the section may take; ``left`` tells how many are left.
    """

    def __init__(self, path: str | None, device: str, seconds: float) -> None:
        self.path, self.device = path, device
        self.end = time.monotonic() + seconds
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.write()

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def put(self, case: str, metric: str, values: Sequence[float]) -> None:
        self.rows.append(spread(case, metric, values))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
        self.write()

    def attempt(self, case: str, work: Callable[[], Any]) -> Any:
        """Return its answer; None if it fails, which is written down.

        Raises:
            SystemExit: the device does not answer any more, so nothing else can be tried in this process.
        """
        try:
            return work()
        except Exception:
            self.failed.append((case, traceback.format_exc()))
            self.write()
        if self.device == "cuda":
            try:
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
            except Exception:
                self.note(f"after {case} the GPU did not answer; what would have followed is missing")
                raise SystemExit(1) from None
        return None

    def write(self) -> None:
        if self.path:
            content = {"rows": [asdict(row) for row in self.rows], "notes": self.notes, "failed": self.failed}
            files.write_text(self.path, json.dumps(content))


def begin(doc: str | None) -> tuple[argparse.Namespace, Found]:
    """The options that all sections have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model", default="mlp")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.json:
        Path(args.json).unlink(missing_ok=True)
    return args, Found(args.json, args.device, args.seconds)


def milliseconds(device: str, work: Callable[[], object], times: int = 1) -> float:
    """Of one turn, from start to end: by CUDA events, or on CPUs by the clock."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - start) * 1e3 / times
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def peak(device: str, work: Callable[[], object]) -> float:
    """Bytes that are allocated at most while it runs, on CUDA; 0 elsewhere."""
    if device != "cuda":
        work()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated())
