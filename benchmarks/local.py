"""Local updates: held-out loss against bits per parameter and step, at periods of 1, 8 and 30 inner steps.

    python -m benchmarks.local --json local.json

The demo's LSTM (momentum SGD) and a character transformer (AdamW), simulated workers, cosine learning rate to 0. The
inner learning rate is tuned for each recipe and period, and for dense data parallelism, on a grid with one seed; the
best is trained with all seeds. Bits are what a worker sent to each other one, on average over the whole run, per
parameter and inner step; a dense all-reduce of N workers sends 64/N. Figures that the file holds already are not
measured again.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.frontier import CLIP, LENGTH, TASKS
from thinwire import Method, dense, methods, simulate, topk
from thinwire._version import __version__
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import loss_of
from thinwire.optim import MeanAdamW
from thinwire.report.results import Row, meta, write

PERIODS = (1, 8, 30)
SENT = topk(64 / 4096, values="int4")
RATES = {"lstm": (0.5, 1.0, 2.0, 4.0), "transformer": (0.001, 0.002, 0.003, 0.004)}


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)]


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), momentum=0.9, fused=True)]


def mean_adamw(model: nn.Module) -> list[Optimizer]:
    return [MeanAdamW(model.parameters(), weight_decay=0.01, per="row")]


def muon(model: nn.Module) -> list[Optimizer]:
    """Muon for the matrices of the blocks, with updates of AdamW's size; AdamW for the rest."""
    matrices = {name for name, param in model.named_parameters() if name.startswith("blocks") and param.ndim == 2}
    named = dict(model.named_parameters())
    rest = [param for name, param in named.items() if name not in matrices]
    inner = torch.optim.Muon([named[name] for name in matrices], weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [inner, torch.optim.AdamW(rest, weight_decay=0.01, fused=True)]


@dataclass(frozen=True)
class Recipe:
    """A method at a period, and its inner optimizers for each task; a task without one is left out."""

    method: Callable[[int], Method]
    inner: dict[str, Callable[[nn.Module], list[Optimizer]]] = field(
        default_factory=lambda: {"lstm": sgd, "transformer": adamw}
    )


RECIPES = {
    "mean": Recipe(lambda every: methods.local(every=every)),
    "post_local_sgd": Recipe(lambda every: methods.post_local_sgd(every, start=60)),
    "mean_topk": Recipe(lambda every: methods.local(SENT, every=every)),
    "mean_adamw_topk": Recipe(lambda every: methods.local(SENT, every=every), {"transformer": mean_adamw}),
    "sparse_loco": Recipe(lambda every: methods.sparse_loco(every)),
    "diloco": Recipe(lambda every: methods.diloco(every)),
    "streaming": Recipe(
        lambda every: methods.streaming_diloco(every, fragments=min(4, every), delay=every // 8)
    ),
    "slowmo": Recipe(lambda every: methods.slowmo(every)),
    "muloco": Recipe(lambda every: methods.muloco(every), {"transformer": muon}),
    "co2": Recipe(lambda every: methods.co2(every)),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One recipe at one period; ``every`` is 0 for dense data parallelism."""

    task: str
    recipe: str
    every: int = 0

    @property
    def name(self) -> str:
        return f"{self.task}/{self.recipe}" + (f"/{self.every}" if self.every else "")

    @property
    def method(self) -> Method:
        return RECIPES[self.recipe].method(self.every) if self.every else dense(clip=CLIP)

    @property
    def inner(self) -> Callable[[nn.Module], list[Optimizer]]:
        return RECIPES[self.recipe if self.every else "mean"].inner[self.task]


def train(case: Case, rate: float, seed: int, steps: int, workers: int) -> tuple[float, float]:
    """Return the held-out loss after the last step, and the bits sent per parameter and inner step."""
    text = demo_text.load()
    torch.manual_seed(seed)
    model = TASKS[case.task].build(len(text.vocabulary))
    inner = case.inner(model)
    for group in (group for one in inner for group in one.param_groups):
        group["lr"] = rate
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, steps) for one in inner]
    clipped = [*model.parameters()]

    def clip(*_: object) -> None:  # as dense(clip=) does on each worker
        if case.every:
            torch.nn.utils.clip_grad_norm_(clipped, CLIP * workers**0.5)

    def after(step: int, loss: float) -> None:
        for schedule in schedules:
            schedule.step()

    hook = inner[0].register_step_pre_hook(clip)
    result = simulate(
        model, case.method, optimizer=inner, workers=workers, steps=steps, seed=seed, loss=loss_of,
        batches=lambda worker, step: text.batch(step, worker, 2, LENGTH, seed), after_step=after,
    )  # fmt: skip
    hook.remove()
    with torch.no_grad():
        held_out = loss_of(model, text.held_out_batch(256, LENGTH)).item()
    numbers = sum(param.numel() for param in model.parameters())
    return held_out, 8.0 * result.ledger.wire_bytes / ((workers - 1) * numbers * steps)


class Book:
    """The figures so far, in a file that is written after every training."""

    def __init__(self, path: Path | None, args: argparse.Namespace) -> None:
        self.path, self.args = path, args
        self.found: dict[str, dict[str, tuple[float, float]]] = {}  # case at schedule: rate and seed: loss, bits
        if path is not None and path.exists():
            self.found = json.loads(path.read_text())["meta"]["found"]

    def loss(self, case: Case, steps: int, rate: float, seed: int) -> float:
        known = self.found.setdefault(f"{case.name}@{steps}", {})
        key = f"{rate:g}/{seed}"
        if key not in known:
            known[key] = train(case, rate, seed, steps, self.args.workers)
            print(f"{case.name}@{steps} {key}: {known[key][0]:.3f}, {known[key][1]:.4f} bits", flush=True)
            self.write()
        return known[key][0]

    def tuned(self, case: Case, steps: int, rates: tuple[float, ...], seeds: int) -> None:
        """Measure all rates with one seed, and the best with all; a best rate at the grid's edge asks for one more."""
        edges = {rates[0]: rates[0] / 2, rates[-1]: rates[-1] * 1.5}
        best = min(rates, key=lambda rate: self.loss(case, steps, rate, 0))
        if seeds > 1 and best in edges:
            best = min(best, edges[best], key=lambda rate: self.loss(case, steps, rate, 0))
        for seed in range(1, seeds):
            self.loss(case, steps, best, seed)

    def rows(self) -> list[Row]:
        """One row a case: the mean over the seeds at its best rate."""
        rows: list[Row] = []
        for key, runs in self.found.items():
            best = min((run for run in runs if run.endswith("/0")), key=lambda run: runs[run][0]).partition("/")[0]
            losses = [loss for run, (loss, _) in runs.items() if run.startswith(f"{best}/")]
            bits = runs[f"{best}/0"][1]
            rows.append(Row(key, "held_out", statistics.mean(losses), min(losses), max(losses)))
            rows.append(Row(key, "bits", bits))
            rows.append(Row(key, "rate", float(best)))
        return rows

    def table(self) -> str:
        """Return the figures as Markdown, those of one task and length together, by bits."""
        rows = self.rows()
        found = {(row.case, row.metric): row for row in rows}
        lines: list[str] = []
        groups = dict.fromkeys(row.case.partition("/")[0] + " @ " + row.case.partition("@")[2] for row in rows)
        for group in groups:
            task, _, steps = group.partition(" @ ")
            cases = {row.case for row in rows if row.case.startswith(task + "/") and row.case.endswith("@" + steps)}
            dense = found[f"{task}/dense@{steps}", "held_out"].value
            lines += [
                f"\n{task}, {steps} steps\n",
                "| method | H | bits | rate | held-out loss (of all seeds) | over dense |",
            ]
            lines.append("|---|---:|---:|---:|---|---:|")
            for case in sorted(cases, key=lambda case: (-found[case, "bits"].value, case)):
                name, _, every = case.partition("@")[0].removeprefix(task + "/").partition("/")
                loss, bits, rate = (found[case, metric] for metric in ("held_out", "bits", "rate"))
                lines.append(
                    f"| {name} | {every or '-'} | {bits.value:.4f} | {rate.value:g} | {loss.value:.3f} "
                    f"({loss.low:.3f} to {loss.high:.3f}) | {loss.value - dense:+.3f} |"
                )
        return "\n".join(lines)

    def write(self) -> None:
        if self.path is not None:
            settings = {key: value for key, value in vars(self.args).items() if key != "json"}
            write(self.path, meta(__version__, **settings, found=self.found), self.rows())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=[*TASKS])
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES], choices=[*RECIPES])
    parser.add_argument("--periods", nargs="+", type=int, default=PERIODS)
    parser.add_argument("--steps", nargs="+", type=int, default=[600, 1800])
    parser.add_argument("--rates", nargs="+", type=float, help="instead of the grid of the task")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    book = Book(args.json, args)
    for steps in args.steps:
        for task in args.tasks:
            rates = tuple(args.rates or RATES[task])
            recipes = [recipe for recipe in args.recipes if task in RECIPES[recipe].inner]
            for case in [Case(task, "dense"), *(Case(task, r, every) for r in recipes for every in args.periods)]:
                book.tuned(case, steps, rates, args.seeds)
    book.write()
    print(book.table())


if __name__ == "__main__":
    main()
