"""The sections of a run: each is a process of its own with its own time, so that none can take the others with it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinwire.report.results import Row

ROOT = Path(__file__).parents[2]
FAREWELL = 10.0
"""Seconds to write what stands when a section is cut."""


@dataclass
class Section:
    """One process.

    Args:
        name: of the section.
        argv: what runs, after the interpreter.
        seconds: that it may take.
        tests: whether it is pytest, or a benchmark that writes ``--json``.
    """

    name: str
    argv: Sequence[str]
    seconds: float
    tests: bool = False
    env: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Outcome:
    """The results of a section."""

    name: str
    seconds: float
    summary: str
    rows: list[Row] = field(default_factory=list[Row])
    notes: list[str] = field(default_factory=list[str])
    failed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Names of failures, each with its traceback."""


def run(section: Section, folder: Path, deadline: float) -> Outcome:
    """Run it, at most until ``deadline`` of the monotonic clock."""
    limit = min(section.seconds, deadline - time.monotonic())
    if limit < 5:
        return Outcome(section.name, 0.0, "left out, for want of time", failed=[(section.name, "no time was left")])
    stem = section.name.replace("/", "_").replace(" ", "_")
    output, found = folder / f"{stem}.txt", folder / f"{stem}.json"
    env = os.environ | {"THINWIRE_REPORTS": str(found), "PYTHONUNBUFFERED": "1"} | section.env
    argv = [sys.executable, *section.argv]
    if not section.tests:
        argv += ["--json", str(found), "--seconds", f"{max(5.0, limit - 15):.0f}"]
    start = time.monotonic()
    with output.open("w") as file:
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = time.monotonic() - start
    text = output.read_text(errors="replace")
    outcome = (_tests if section.tests else _figures)(section.name, found)
    outcome.seconds = seconds
    if code is None:
        outcome.summary += f", cut after {limit:.0f} s"
        outcome.failed.append((section.name, f"cut after {limit:.0f} s; it ended with:\n{text[-3000:]}"))
    elif code and not outcome.failed:
        outcome.failed.append((section.name, f"exit code {code}; it ended with:\n{text[-6000:]}"))
        outcome.summary += f", exit code {code}"
    return outcome


def _end(process: "subprocess.Popen[bytes]") -> None:
    """First as by Ctrl-C, then for good, with all that it has started."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(FAREWELL)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # ranks that have outlived it
        os.killpg(process.pid, signal.SIGKILL)


def _tests(name: str, found: Path) -> Outcome:
    lines: list[dict[str, Any]] = []
    if found.exists():
        for line in found.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last one of a process that was killed
                lines.append(json.loads(line))
    ended = [line for line in lines if line["outcome"] != "begun"]
    counts = Counter(line["outcome"] for line in ended)
    summary = ", ".join(f"{counts[what]} {what}" for what in ("passed", "failed", "skipped"))
    outcome = Outcome(name, 0.0, summary)
    outcome.failed = [(line["test"], line["said"]) for line in ended if line["outcome"] == "failed"]
    outcome.notes = [
        f"skipped {number} of {name}: {reason.removeprefix('Skipped: ')}"
        for reason, number in Counter(line["said"] for line in ended if line["outcome"] == "skipped").items()
    ]
    if unfinished := sorted({line["test"] for line in lines} - {line["test"] for line in ended}):
        outcome.failed.append((unfinished[-1], "it had begun and did not end"))
    return outcome


def _figures(name: str, found: Path) -> Outcome:
    try:
        content = json.loads(found.read_text())
    except (OSError, ValueError) as error:
        return Outcome(name, 0.0, "nothing measured", failed=[(name, f"it wrote no figures: {error}")])
    rows = [Row(**row) for row in content["rows"]]
    failed = [(f"{name}: {case}", said) for case, said in content["failed"]]
    cases = len({row.case for row in rows})
    return Outcome(name, 0.0, f"{cases} cases measured, {len(failed)} failed", rows, content["notes"], failed)


def run_all(groups: Sequence[tuple[Sequence[Section], int, float]], folder: Path) -> list[Outcome]:
    """Group after group; in each, so many sections at a time, all of them until its own deadline."""
    outcomes: list[Outcome] = []
    for sections, together, deadline in groups:
        with ThreadPoolExecutor(together) as pool:
            for outcome in pool.map(lambda one, end=deadline: run(one, folder, end), sections):
                print(f"{outcome.name}: {outcome.summary}, {outcome.seconds:.0f} s", flush=True)
                outcomes.append(outcome)
    return outcomes
