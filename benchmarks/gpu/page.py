"""The page of results: the latest run first, then its command, versions and device, and what failed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import Outcome
from thinwire.core import files
from thinwire.report.results import Row

TABLES = [
    ("Kernels", ("ms", "gb_per_s", "ratio_to_floor"), ("ms", "GB/s", "x floor"), ".3f"),
    ("Step", ("step_ms", "ratio_to_local", "ratio_to_dense", "peak_mb"),
     ("step, ms", "this / local", "dense / this", "peak memory, MB"), ".2f"),
]  # fmt: skip
READ = """\
Medians of rounds in which all cases take turns, with quartiles. The floor is what the bytes that the pass must move
(20 an element, 12 with bfloat16 states, 4 more where the gradient is cleared) take at the speed of the copy; `kernel`
is the Triton kernel alone, `dgc` a whole message: selected, coded, decoded and added. A step is that of one NCCL rank,
which sends nothing: it shows what compression costs the GPU, not what it saves on a link. What ends in `1gbit` takes
as long as two workers would on an emulated link of 1 Gb/s. Peak memory is that of building a model and of its first
steps, beyond what the others hold."""


def slug(name: str) -> str:
    """``NVIDIA H200`` as ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cell(row: Row | None, form: str) -> str:
    if row is None:
        return "-"
    form = ",.0f" if row.metric == "peak_mb" else form
    spread = f" [{row.low:{form}}..{row.high:{form}}]" if row.low != row.high else ""
    return f"{row.value:{form}}{spread}"


def tables(rows: Sequence[Row]) -> list[str]:
    """A table of kernels and one of steps, as far as there are figures."""
    lines: list[str] = []
    for title, metrics, heads, form in TABLES:
        cases = list(dict.fromkeys(row.case for row in rows if row.metric == metrics[0]))
        if not cases:
            continue
        lines += [f"| {title} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
        for case in cases:
            own = {row.metric: row for row in rows if row.case == case}
            lines.append(f"| {case} | {' | '.join(_cell(own.get(metric), form) for metric in metrics)} |")
        lines.append("")
    return lines


def text(meta: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The results of one run."""
    lines = [*tables([row for one in outcomes for row in one.rows]), READ, "", f"    {meta['command']}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    lines += [f"{meta['date'][:10]}. {versions}; {meta['device']}; {meta['cpu']}, {meta['cores']} cores.", ""]
    lines += ["| section | outcome | s |", "|---|---|---|"]
    lines += [f"| {one.name} | {one.summary} | {one.seconds:.0f} |" for one in outcomes]
    failed = [pair for one in outcomes for pair in one.failed]
    lines += ["", f"**{len(failed)} failed.**" if failed else "Nothing failed.", ""]
    for what, said in failed:
        last = [line.strip() for line in said.splitlines() if line.strip()] or ["-"]
        errors = [line.removeprefix("E ").strip() for line in last if line.startswith("E ")] or last[-1:]
        lines.append(f"- `{what}`: {errors[0][:300]}")
    lines += [f"- {note}" for one in outcomes for note in one.notes]
    return "\n".join(lines) + "\n"


def write(path: Path, meta: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Put the run at the top of the page; what stood there before comes after it."""
    page = f"# On a GPU: tests, kernels and training steps, {meta['device']}\n\n{text(meta, outcomes)}"
    if path.exists():
        before = path.read_text().partition("\n")[2].strip("\n")
        page += f"\n## Earlier\n\n{before}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, page)
