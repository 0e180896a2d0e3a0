"""The demo: the same training three times (dense, fp16 and DGC) over an emulated thin link."""

import multiprocessing
import queue
import statistics
import tempfile
from collections.abc import Callable, Sequence

from thinwire.cli.demo_training import CaseResult, Messages, Settings, train
from thinwire.core.errors import ThinwireError
from thinwire.report.results import Row

CASES = ("dense", "fp16", "dgc")
Progress = Callable[[str, float, int, float], object]
"""Callback that gets the case, seconds trained, steps done and the last training loss."""


def run(settings: Settings, progress: Progress) -> list[CaseResult]:
    """Train each case in turn, with real processes.

    Raises:
        ThinwireError: a worker died.
    """
    with tempfile.TemporaryDirectory() as folder:
        return [_run_case(case, settings, f"file://{folder}/{case}", progress) for case in CASES]


def rows(results: Sequence[CaseResult]) -> list[Row]:
    """List the figures of each case; bytes and ratios are those after the warm-up, if the run got that far."""
    table: list[Row] = []
    for result in results:
        quartiles = statistics.quantiles(result.step_seconds, n=4) if result.steps > 1 else result.step_seconds * 3
        low, middle, high = (seconds * 1e3 for seconds in quartiles)
        table += [
            Row(result.case, "steps", result.steps),
            Row(result.case, "heldout_loss", result.points[-1].held_out_loss),
            Row(result.case, "wire_bytes_per_step", result.wire_bytes),
            Row(result.case, "wire_bytes_total", result.wire_bytes_total),
            Row(result.case, "ratio", result.ratio),
            Row(result.case, "ratio_compressed", result.ratio_compressed),
            Row(result.case, "step_ms", middle, low, high),
            *(Row(result.case, f"{part}_ms", ms) for part, ms in result.split_ms.items()),
            Row(result.case, "rest_ms", max(0.0, middle - sum(result.split_ms.values()))),
            Row(result.case, "warmup_steps", result.warmup),
        ]
    return table


def _run_case(case: str, settings: Settings, rendezvous: str, progress: Progress) -> CaseResult:
    context = multiprocessing.get_context("spawn")
    messages: Messages = context.Queue()
    workers = [
        context.Process(target=train, args=(rank, case, settings, rendezvous, messages), daemon=True)
        for rank in range(settings.workers)
    ]
    for worker in workers:
        worker.start()
    try:
        while True:
            try:
                message = messages.get(timeout=1.0)
            except queue.Empty:
                if dead := [w for w in workers if w.exitcode not in (None, 0)]:
                    raise ThinwireError(f"a worker of case {case} ended with exit code {dead[0].exitcode}") from None
                continue
            if isinstance(message, CaseResult):
                return message
            progress(case, *message)
    finally:
        for worker in workers:
            worker.join(timeout=10)
            worker.kill()
