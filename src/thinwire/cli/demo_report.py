"""The demo's table and page."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from thinwire.cli.demo_training import CaseResult, Settings
from thinwire.report.html import Bars, Plot, Table, page
from thinwire.report.results import Row

COLUMNS = {
    "steps": ("steps", ",.0f"),
    "held-out loss": ("heldout_loss", ".3f"),
    "bytes per step and worker": ("wire_bytes_per_step", ",.0f"),
    "ratio": ("ratio", ",.1f"),
    "ms per step": ("step_ms", ",.0f"),
}
"""Metric and format of each column."""
SPLIT = {part: (f"{part}_ms", ",.0f") for part in ("step", "compute", "compress", "decompress", "rest")}
SIMULATED = {
    "held-out loss": ("heldout_loss", ".3f"),
    "training loss": ("train_loss", ".3f"),
    "ratio over all steps": ("ratio", ",.1f"),
}


def table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]] = COLUMNS, caption: str = "") -> Table:
    """Make one line of text for each case; with its steps, a case that ended in its warm-up is marked."""
    figures = {(row.case, row.metric): row.value for row in rows}
    lines = [
        [case, *(format(figures[case, metric], form) for metric, form in columns.values())]
        for case in dict.fromkeys(row.case for row in rows)
    ]
    for line in lines:
        if "steps" in columns and figures[line[0], "steps"] <= figures[line[0], "warmup_steps"]:
            line[0] += " (warm-up)"
    return Table(("method", *columns), lines, caption)


def setting(settings: Settings) -> str:
    """Describe the conditions of the figures; every link here is emulated."""
    return (
        f"The same model, text, seed and {settings.seconds:g} seconds for each method; {settings.wire} link. Bytes and "
        "ratio are those after the warm-up; steps and loss include it. Ratio is dense fp32 bytes over the method's."
    )


def verdict(results: Sequence[CaseResult], settings: Settings) -> str:
    """State the result in a sentence or two: the best method on this link."""
    dense, best = results[0], min(results, key=lambda r: r.points[-1].held_out_loss)
    losses = ", ".join(f"{r.case} {r.points[-1].held_out_loss:.3f}" for r in results)
    where = f"In {settings.seconds:g} seconds each ({settings.wire})"
    if short := [
        f"{r.case} did {r.steps} steps and its warm-up takes {r.warmup}: its bytes and ratio are those of the warm-up, "
        "which sends more. Give it more --seconds."
        for r in results
        if r.in_warmup
    ]:
        return f"Too short for a verdict. {' '.join(short)} Held-out losses so far: {losses}."
    if best is dense:
        return f"{where}, dense reached the lowest held-out loss ({losses}): leave compression off on such a link."
    return (
        f"{where}, {best.case} reached the lowest held-out loss ({losses}): it did {best.steps / dense.steps:.1f} "
        f"times the steps of dense and sent {best.ratio:,.0f} times fewer bytes in each."
    )


def html_page(results: Sequence[CaseResult], settings: Settings, rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    """Build the page: result, tables, held-out loss against seconds and against steps, bytes per step, ledgers."""
    loss = "held-out loss (nats per character)"
    losses = {r.case: [p.held_out_loss for p in r.points] for r in results}
    by_seconds = {r.case: ([p.seconds for p in r.points], losses[r.case]) for r in results}
    by_steps = {r.case: ([float(p.step) for p in r.points], losses[r.case]) for r in results}
    by_bytes = {r.case: (r.wire_bytes, _bar_label(r)) for r in results}
    wire = f"emulated, {settings.wire.partition(', emulated ')[2]}"
    plots = [
        Plot("Loss against seconds", f"seconds of training ({wire})", loss, by_seconds, "At equal time."),
        Plot("Loss against steps", "steps", loss, by_steps, "At equal steps."),
        Bars("Bytes per step", "bytes per worker and step", by_bytes, "On a linear scale."),
    ]
    split = table(rows, SPLIT, "Milliseconds of a step. Rest: waiting for the link, and the optimizer.")
    footer = [
        f"Command: {meta['command']}",
        f"Versions: {', '.join(f'{name} {version}' for name, version in meta['versions'].items())}",
        f"Machine: {meta['cpu']}, {meta['cores']} cores, {platform.system()}; {settings.workers} processes",
        f"Date: {meta['date']}",
    ]
    ledgers = {f"ledger: {r.case}": r.report for r in results}
    tables = [table(rows), split]
    return page("thinwire demo", verdict(results, settings), setting(settings), tables, plots, ledgers, footer)


def _bar_label(result: CaseResult) -> str:
    fewer = f"\n {result.ratio:,.1f} times fewer" if result.ratio > 1.0 else ""
    return f"{result.wire_bytes:,.0f}{fewer}{' (warm-up)' if result.in_warmup else ''}"
