"""The demo's table and page."""

from collections.abc import Sequence

from thinwire.demo.train import CaseResult, Settings
from thinwire.report.html import Plot, page
from thinwire.report.results import Row

HEADER = ("method", "steps", "held-out loss", "bytes per step and worker", "ratio", "ms per step")


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line of text for each case, under ``HEADER``."""
    figures = {(row.case, row.metric): row for row in rows}
    cases = list(dict.fromkeys(row.case for row in rows))
    return [
        [
            case,
            f"{figures[case, 'steps'].value:,.0f}",
            f"{figures[case, 'heldout_loss'].value:.3f}",
            f"{figures[case, 'wire_bytes_per_step'].value:,.0f}",
            f"{figures[case, 'ratio'].value:,.1f}",
            f"{figures[case, 'step_ms'].value:,.0f}",
        ]
        for case in cases
    ]


def setting(settings: Settings) -> str:
    """What the figures hold for; every link here is emulated."""
    return (
        f"The same model, text, seed and {settings.seconds:g} seconds for each method; {settings.wire} link. Bytes and "
        "ratio are after the warm-up; ratio is dense fp32 bytes over the method's."
    )


def html_page(results: Sequence[CaseResult], settings: Settings, rows: Sequence[Row]) -> str:
    """Held-out loss against seconds and against steps, and bytes per step."""
    loss = "held-out loss (nats per character)"
    by_seconds = {r.case: ([p.seconds for p in r.points], [p.held_out_loss for p in r.points]) for r in results}
    by_steps = {r.case: ([float(p.step) for p in r.points], [p.held_out_loss for p in r.points]) for r in results}
    by_bytes = {r.case: ([0.0], [r.wire_bytes]) for r in results}
    plots = [
        Plot(
            "Loss against seconds",
            f"seconds of training ({settings.wire})",
            loss,
            by_seconds,
            caption="What a user waits for.",
        ),
        Plot("Loss against steps", "steps", loss, by_steps, caption="What compression costs at equal steps."),
        Plot(
            "Bytes per step",
            f"after warm-up ({settings.wire})",
            "bytes per worker",
            by_bytes,
            log_y=True,
            caption="Log scale.",
        ),
    ]
    ledgers = {f"ledger: {r.case}": r.report for r in results}
    return page("thinwire demo", setting(settings), plots, HEADER, table(rows), ledgers)
