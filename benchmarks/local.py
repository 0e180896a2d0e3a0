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
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.frontier import CLIP, LENGTH, TASKS
from thinwire import Method, dense, methods, simulate, topk
from thinwire._version import __version__
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import loss_of
from thinwire.report.results import Row, meta, write

PERIODS = (1, 8, 30)
SENT = topk(64 / 4096, values="int4")
RECIPES: dict[str, Callable[[int], Method]] = {
    "mean": lambda every: methods.local(every=every),
    "mean_topk": lambda every: methods.local(SENT, every=every),
    "slowmo": lambda every: methods.slowmo(every),
    "diloco": lambda every: methods.diloco(every),
    "diloco_topk": lambda every: methods.diloco(every, exchange=SENT),
    "streaming": lambda every: methods.streaming_diloco(every, fragments=min(4, every), delay=every // 8),
    "sparse_loco": lambda every: methods.sparse_loco(every),
    "quantized": lambda every: methods.muloco(every),
    "co2": lambda every: methods.co2(every),
}
RATES = {"lstm": (0.5, 1.0, 2.0, 4.0), "transformer": (0.001, 0.002, 0.003, 0.004)}


@dataclass(frozen=True)
class Case:
    """One recipe at one period; ``every`` is 0 for dense data parallelism."""

    task: str
    recipe: str
    every: int = 0

    @property
    def name(self) -> str:
        return f"{self.task}/{self.recipe}" + (f"/{self.every}" if self.every else "")

    def method(self) -> Method:
        return RECIPES[self.recipe](self.every) if self.every else dense(clip=CLIP)


def train(case: Case, rate: float, seed: int, steps: int, workers: int) -> tuple[float, float]:
    """Return the held-out loss after the last step, and the bits sent per parameter and inner step."""
    text, task = demo_text.load(), TASKS[case.task]
    torch.manual_seed(seed)
    model = task.build(len(text.vocabulary))
    optimizer = task.optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = rate
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    clipped = [*model.parameters()]

    def clip(*_: object) -> None:  # as dense(clip=) does on each worker
        if case.every:
            torch.nn.utils.clip_grad_norm_(clipped, CLIP * workers**0.5)

    hook = optimizer.register_step_pre_hook(clip)
    result = simulate(
        model, case.method(), optimizer=optimizer, workers=workers, steps=steps, seed=seed, loss=loss_of,
        batches=lambda worker, step: text.batch(step, worker, 2, LENGTH, seed),
        after_step=lambda step, loss: schedule.step(),
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
        """Measure all rates with one seed, and the best with all."""
        best = min(rates, key=lambda rate: self.loss(case, steps, rate, 0))
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
            cases = [Case(task, "dense"), *(Case(task, r, every) for every in args.periods for r in args.recipes)]
            for case in cases:
                book.tuned(case, steps, rates, args.seeds)
    book.write()


if __name__ == "__main__":
    main()
