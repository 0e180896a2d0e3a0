"""The command line. Needs the extra ``thinwire[cli]``."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column, Table
except ModuleNotFoundError as missing:  # pragma: no cover
    sys.exit(f"the command line needs {missing.name}; install it with: pip install 'thinwire[cli]'")

import torch

import thinwire
from thinwire.cli import demo_report, demo_runs
from thinwire.cli.demo_training import Settings
from thinwire.cli.simulate import SimulationSettings, simulate_text
from thinwire.comm.link import Link
from thinwire.core import files
from thinwire.core.errors import ThinwireError
from thinwire.kernels.select import choose
from thinwire.report import html, results


def _link(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        Link.parse(value)
    except ThinwireError as error:
        raise click.BadParameter(str(error)) from error
    return value


class Finite(click.FloatRange):
    """A float range without nan and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value!r} is not a finite number", param, ctx)


SHARE = Finite(0.0, 1.0, min_open=True)
DENSITY = click.option("--density", type=SHARE, default=0.001, help="Share of the gradient DGC sends.")
FILE = click.Path(dir_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(thinwire.__version__, prog_name="thinwire")
def cli() -> None:
    """Train PyTorch over thin wires."""


@cli.command()
@click.option("--seconds", type=Finite(1.0), default=80.0, help="Training time, each.")
@click.option("--link", metavar="LINK", callback=_link, default="100mbit", help="Emulated, e.g. 1gbit,0.5ms.")
@click.option("--workers", type=click.IntRange(2), default=2, help="Worker processes.")
@DENSITY
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo"))
@click.option("--json", "json_file", type=FILE, help="Also write the results here.")
@click.option("--quick", is_flag=True, help="A small model for a few seconds; the figures mean nothing.")
def demo(out: Path, json_file: Path | None, quick: bool, **given: Any) -> None:
    """Train a language model on two workers over a thin link: dense, fp16 and DGC, side by side."""
    written = [out / "results.json", *([json_file] if json_file else [])]
    for path in written:
        files.check_writable(path)  # fail before hours of work, not after
    settings = Settings(**given)
    if quick:
        settings = dataclasses.replace(settings, seconds=min(settings.seconds, 5.0), hidden=128, evaluations=3)
    console = Console(stderr=True)
    console.print(demo_report.setting(settings), highlight=False)
    if (note := choose("auto", torch.device("cpu"))[1]) is not None:
        console.print(note, highlight=False)
    with _progress(console) as bars:
        tasks = {case: bars.add_task(case, total=settings.seconds, info="waits") for case in demo_runs.CASES}

        def progress(case: str, trained: float, step: int, loss: float) -> None:
            stage = "  warm-up" if step <= settings.warmup(case) else ""
            info = f"{trained:4.0f} s  step {step:>5}  loss {loss:.3f}{stage}"
            bars.update(tasks[case], completed=trained, info=info)

        cases = demo_runs.run(settings, progress)
    rows = demo_runs.rows(cases)
    meta = results.meta(thinwire.__version__, settings=dataclasses.asdict(settings), link=f"emulated {settings.link}")
    for path in written:
        results.write(path, meta, rows)
    files.write_text(out / "report.html", demo_report.html_page(cases, settings, rows, meta))
    _print(settings.wire, demo_report.table(rows))
    click.echo(demo_report.verdict(cases, settings))
    click.echo(f"{out / 'results.json'}  {out / 'report.html'}")


@cli.command()
@click.option("--workers", type=click.IntRange(1), default=32, help="Virtual workers.")
@DENSITY
@click.option("--steps", type=click.IntRange(1), default=200)
@click.option("--hidden", type=click.IntRange(8), default=128, help="Width of the LSTM.")
@click.option("--seed", type=int, default=0)
@click.option("--json", "json_file", type=FILE, help="Write the results here.")
def simulate(json_file: Path | None, **given: Any) -> None:
    """Train as many workers in this one process, dense and with DGC, and compare the held-out loss."""
    if json_file:
        files.check_writable(json_file)
    settings = SimulationSettings(**given)
    with _progress(Console(stderr=True)) as bars:
        tasks = {case: bars.add_task(case, total=settings.steps, info="waits") for case in ("dense", "dgc")}

        def progress(case: str, step: int, loss: float) -> None:
            bars.update(tasks[case], completed=step + 1, info=f"step {step + 1:>5}  loss {loss:.3f}")

        rows = simulate_text(settings, progress)
    if json_file:
        results.write(json_file, results.meta(thinwire.__version__, settings=dataclasses.asdict(settings)), rows)
    title = f"N = {settings.workers} simulated workers, {settings.steps} steps"
    _print(title, demo_report.table(rows, demo_report.SIMULATED))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; an error is printed as one line that says what is allowed, with exit code 2."""
    try:
        cli.main(args, prog_name="thinwire", standalone_mode=False)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "thinwire"
        click.echo(f"thinwire: {error.format_message()} (see {path} --help)", err=True)
        sys.exit(2)
    except (click.ClickException, ThinwireError) as error:
        click.echo(f"thinwire: {error}", err=True)
        sys.exit(2)
    except click.Abort:
        sys.exit(130)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<6}"), BarColumn(), TextColumn("{task.fields[info]}"), console=console
    )


def _print(title: str, table: html.Table) -> None:
    printed = Table(table.header[0], *(Column(name, justify="right") for name in table.header[1:]), title=title)
    for line in table.rows:
        printed.add_row(*line)
    Console().print(printed)
