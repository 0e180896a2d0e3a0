"""Held-out loss at equal bytes, over density, bits a value, memory and route.

    python -m benchmarks.frontier --json frontier.json --plot frontier.png

The demo's LSTM (momentum SGD) and a character transformer (AdamW), simulated workers, cosine learning rate. A budget is
in bits a parameter and step that a worker sends to each other worker; for every number of bits a value, the density is
the one that meets it. Two phases send less for the same message, so at the same budget theirs is N/2 times as long.
All cases of a seed start from the same weights and see the same batches. The short schedule ranks all cases with one
seed; the best of each model, the published forms and what ``thinwire.lean`` makes of the budget are trained with all
seeds, on a schedule three times as long too.
Figures that the file holds already are not measured again.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from thinwire import Method, Warmup, dense, dgc, simulate, topk
from thinwire._version import __version__
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import CharLM, loss_of, transformer
from thinwire.methods.basic import LEAN_VALUES, density_for
from thinwire.report.results import Row, meta, write

CLIP = 1.0
LENGTH = 32
BUDGETS = (0.3, 0.06, 0.02)
VALUES = (None, "int4", "int2", "sign")
BEST = 5


@dataclass(frozen=True)
class Task:
    """A model, its optimizer, and the memories that fit it."""

    build: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    memories: dict[str, Callable[..., Method]]
    published: str
    """The memory that others are compared with at the same bytes, with float32 values and an all-gather."""
    lean: str
    """The memory of ``thinwire.lean``."""


TASKS = {
    "lstm": Task(
        lambda vocabulary: CharLM(vocabulary, 64, 128),
        lambda model: torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
        {"dgc": dgc, "dgc_unmasked": partial(dgc, masking=False), "ef": topk},
        "dgc",
        "dgc_unmasked",
    ),
    "transformer": Task(
        lambda vocabulary: transformer(vocabulary, width=96, length=LENGTH),
        lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01),
        {"ef": topk},
        "ef",
        "ef",
    ),
}


@dataclass(frozen=True)
class Case:
    """One point: ``method(workers, steps)`` meets the budget; without a budget it is dense."""

    task: str
    budget: float | None = None
    memory: str = ""
    values: str | None = None
    route: str = "all_gather"

    @property
    def name(self) -> str:
        if self.budget is None:
            return f"{self.task}/dense"
        return f"{self.task}/{self.budget:g}/{self.memory}/{self.values or 'float32'}/{self.route}"

    def method(self, workers: int, steps: int) -> Method:
        if self.budget is None:
            return dense(clip=CLIP)
        bits = self.budget * (workers / 2 if self.route == "two_phase" else 1.0)
        options = {"clip": CLIP, "warmup": Warmup(max(4, steps // 10)), "route": self.route, "values": self.values}
        return TASKS[self.task].memories[self.memory](density_for(bits, self.values), **options)


def train(case: Case, seed: int, steps: int, workers: int) -> tuple[float, float]:
    """Held-out loss after the last step, and bytes that a worker sent in it."""
    text, task = demo_text.load(), TASKS[case.task]
    torch.manual_seed(seed)
    model = task.build(len(text.vocabulary))
    optimizer = task.optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    result = simulate(
        model,
        case.method(workers, steps),
        optimizer=optimizer,
        batches=lambda worker, step: text.batch(step, worker, 2, LENGTH, seed),
        loss=loss_of,
        workers=workers,
        steps=steps,
        seed=seed,
        after_step=lambda step, loss: schedule.step(),
    )
    with torch.no_grad():
        return loss_of(model, text.held_out_batch(256, LENGTH)).item(), result.ledger.rows[-1].wire_bytes


class Book:
    """The measurements so far; written down after every training."""

    def __init__(self, path: Path | None, args: argparse.Namespace) -> None:
        self.path, self.args = path, args
        self.found: dict[str, dict[str, tuple[float, float]]] = {}  # case at schedule: seed: loss, bytes
        if path is not None and path.exists():
            self.found = json.loads(path.read_text())["meta"]["found"]

    def losses(self, case: Case, steps: int, seeds: int) -> list[float]:
        """Of each seed; what is missing is trained now."""
        key = f"{case.name}@{steps}"
        known = self.found.setdefault(key, {})
        for seed in range(seeds):
            if str(seed) not in known:
                known[str(seed)] = train(case, seed, steps, self.args.workers)
                print(f"{key} seed {seed}: {known[str(seed)][0]:.3f}, {known[str(seed)][1]:,.0f} bytes", flush=True)
                self.write()
        return [known[str(seed)][0] for seed in range(seeds)]

    def rows(self) -> list[Row]:
        rows: list[Row] = []
        for key, runs in self.found.items():
            losses = [loss for loss, _ in runs.values()]
            rows.append(Row(key, "heldout_loss", statistics.median(losses), min(losses), max(losses)))
            rows.append(Row(key, "seeds", len(losses)))
            rows.append(Row(key, "wire_bytes", next(iter(runs.values()))[1]))
        return rows

    def write(self) -> None:
        if self.path is not None:
            write(self.path, meta(__version__, workers=self.args.workers, found=self.found), self.rows())


def study(task: str, book: Book, args: argparse.Namespace) -> None:
    memories, published, lean = TASKS[task].memories, TASKS[task].published, TASKS[task].lean
    scan: dict[Case, float] = {}
    finals = [Case(task)]
    for budget in args.budgets:
        there = [Case(task, budget, memory, values) for memory in memories for values in VALUES]
        scan |= {case: book.losses(case, args.steps, 1)[0] for case in there}
        best = sorted(there, key=lambda case: scan[case])[:2]  # the other route, for what is worth it
        routed = [replace(case, route="two_phase") for case in best]
        scan |= {case: book.losses(case, args.steps, 1)[0] for case in routed}
        finals += [min([*best, *routed], key=lambda case: scan[case])]
        finals += [Case(task, budget, published), Case(task, budget, lean, LEAN_VALUES)]
    finals += sorted(scan, key=lambda case: scan[case])[:BEST]
    for steps in (args.steps, 3 * args.steps):
        for case in dict.fromkeys(finals):
            book.losses(case, steps, args.seeds)


def plot(path: str, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row.case.partition("/")[0], row.case.rpartition("@")[2]) for row in rows})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (task, steps) in zip(axes[0], panels, strict=True):
        own = [row for row in rows if row.case.startswith(f"{task}/") and row.case.endswith(f"@{steps}")]
        sent = {row.case: row.value for row in own if row.metric == "wire_bytes"}
        for row in own:
            if row.metric == "heldout_loss":
                parts = row.case.partition("@")[0].split("/")
                label = "dense" if parts[1] == "dense" else " ".join(parts[2:])
                axis.scatter(sent[row.case], row.value, s=12)
                axis.annotate(label, (sent[row.case], row.value), fontsize=5)
        axis.set(xscale="log", title=f"{task}, {steps} steps", xlabel="bytes a worker and step", ylabel="held-out loss")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--steps", type=int, default=200, help="of the short schedule")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot")
    args = parser.parse_args()
    torch.set_num_threads(1)
    book = Book(args.json, args)
    for task in args.tasks:
        study(task, book, args)
    book.write()
    rows = book.rows()
    print("| case @ steps | held-out loss, median | range | seeds | bytes a worker and step |\n|---|---|---|---|---|")
    for loss, seeds, sent in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        spread = f"{loss.low:.3f}..{loss.high:.3f}"
        print(f"| {loss.case} | {loss.value:.3f} | {spread} | {seeds.value:g} | {sent.value:,.0f} |")
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    main()
