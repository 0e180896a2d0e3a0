"""The JSON format of all measurements: a description of the run, and a row for each figure."""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch

from thinwire.core import files


@dataclass(frozen=True)
class Row:
    """One figure; ``low`` and ``high`` are its spread if it has one (quartiles, or the range over seeds)."""

    case: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None


def meta(version: str, **more: Any) -> dict[str, Any]:
    """Return what a reader needs to repeat the run: command, versions, machine, date."""
    versions = {
        "thinwire": version,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    command = " ".join([name, *sys.argv[1:]])
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "command": command, "versions": versions, "cpu": cpu(), "cores": os.cpu_count(), "date": date, **more
    }  # fmt: skip


def cpu() -> str:
    """Return the processor's name as far as the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(path: str | Path, meta: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write ``{"meta": ..., "rows": [...]}``."""
    files.write_text(path, json.dumps({"meta": meta, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
