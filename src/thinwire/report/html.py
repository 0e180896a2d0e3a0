"""A page of plots and a table: one file, no network, no script. Needs the extra ``thinwire[cli]``."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = ("#4c6a92", "#d08c3f", "#2f8f6b", "#a0527a", "#777777", "#222222")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; } figcaption { color: #555; } svg { width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 13px; }
"""


@dataclass(frozen=True)
class Plot:
    """One line for each case, or one bar where a line has a single point."""

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_y: bool = False
    caption: str = ""


def page(
    title: str,
    intro: str,
    plots: Sequence[Plot],
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    details: Mapping[str, str],
) -> str:
    """The page as HTML text."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table)
    figures = "".join(
        f'<figure id="plot{i}">{_svg(plot)}<figcaption>{html.escape(plot.caption)}</figcaption></figure>'
        for i, plot in enumerate(plots)
    )
    folded = "".join(
        f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in details.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{figures}{folded}</body></html>\n"
    )


def write(path: str | Path, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


def _svg(plot: Plot) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Any = figure.subplots()
    for i, (case, (xs, ys)) in enumerate(plot.lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        if len(xs) == 1:
            axes.bar(case, ys[0], color=colour, width=0.6)
            axes.annotate(f"{ys[0]:,.0f}", (case, ys[0]), ha="center", va="bottom")
        else:
            axes.plot(xs, ys, marker="o", markersize=3, color=colour, label=case)
            axes.legend(frameon=False)
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    if plot.log_y:
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
