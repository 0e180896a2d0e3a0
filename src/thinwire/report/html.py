"""A page of tables and plots in one HTML file without network or scripts. Needs the extra ``thinwire[cli]``."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("#4c6a92", "#d08c3f", "#2f8f6b", "#a0527a", "#777777", "#222222")
# On a narrow screen a row of a table becomes a block, with the name of the column before each cell.
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       overflow-wrap: break-word; }
.verdict { font-size: 1.15rem; font-weight: 600; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
caption { text-align: left; font-weight: 600; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; max-width: 42rem; } figcaption { color: #555; } svg { width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 13px; }
footer { color: #555; font-size: .9rem; }
@media (max-width: 40rem) {
  thead { display: none; }
  tr, td, td:first-child { display: block; text-align: left; }
  tr { border-top: 2px solid #999; padding: .3rem 0; }
  td { border: 0; padding: .1rem 0; } td:first-child { font-weight: 600; }
  td:not(:first-child)::before { content: attr(data-column) ": "; color: #555; }
}
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """One line for each case."""

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    caption: str = ""


@dataclass(frozen=True)
class Bars:
    """One bar for each case, on a linear scale, with its label at its end."""

    title: str
    x: str
    bars: Mapping[str, tuple[float, str]]  # length and label
    caption: str = ""


def page(
    title: str,
    verdict: str,
    intro: str,
    tables: Sequence[Table],
    plots: Sequence[Plot | Bars],
    details: Mapping[str, str],
    footer: Sequence[str] = (),
) -> str:
    """Build the page as HTML text; ``details`` are folded texts, keyed by their summary line."""
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
        f'<body><h1>{html.escape(title)}</h1><p class="verdict">{html.escape(verdict)}</p><p>{html.escape(intro)}</p>'
        f"{''.join(map(_table, tables))}{figures}{folded}"
        f"<footer>{'<br>'.join(map(html.escape, footer))}</footer></body></html>\n"
    )


def _table(table: Table) -> str:
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    columns = [html.escape(cell) for cell in table.header]
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-column="{column}">{html.escape(cell)}</td>' for column, cell in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _svg(plot: Plot | Bars) -> str:
    from matplotlib.figure import Figure

    # 5 inches wide: scaled down to 4 inches on a phone, text is still 9 points
    figure: Any = Figure(figsize=(5, 3.2 if isinstance(plot, Plot) else 2.2), layout="constrained")
    axes: Any = figure.subplots()
    if isinstance(plot, Plot):
        axes.set_prop_cycle(color=COLOURS)
        for case, (xs, ys) in plot.lines.items():
            axes.plot(xs, ys, marker="o", markersize=3, label=case)
        axes.legend(frameon=False)
        axes.set(ylabel=plot.y)
        axes.margins(y=0.15)
    else:
        lengths = [length for length, _ in plot.bars.values()]
        drawn = axes.barh(list(plot.bars), lengths, color=COLOURS)
        axes.bar_label(drawn, [f" {label}" for _, label in plot.bars.values()])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.6 * max(lengths, default=1.0))  # room for the labels
        axes.locator_params(axis="x", nbins=4)
    axes.set(title=plot.title, xlabel=plot.x)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
