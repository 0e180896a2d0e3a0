"""L-GreCo against the uniform plan: bytes, error, held-out loss, and what planning takes.

    python -m benchmarks.lgreco --data ../shared/data --json lgreco.json

The demo's LSTM and a small ResNet on CIFAR-10 (left out, loudly, where ``--data`` has none), momentum SGD with a cosine
learning rate, simulated workers. Of every method, a run with the policy, and one without it from the same weights and
on the same batches. Both plans are then tried on the compensated gradients of the uniform run in steps that were
*not* looked at for a plan: ``error_ratio`` is the plan's sum of ``||x - C(x)||`` over the uniform one's there.
``lost`` is the share of the energy that a run really left for later. Bytes are the ledger's, of the last step.
``share_here`` is planning, looking included, in the time of this training; ``share`` is that at the default schedule.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from benchmarks.figures import spread
from thinwire import Method, maxmin, powersgd, simulate, topk
from thinwire._version import __version__
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import CharLM, loss_of
from thinwire.core import Compressor, Context
from thinwire.exchange.workers import Probe
from thinwire.policies import LGreCo
from thinwire.policies.lgreco import Snapshot, losses
from thinwire.report.results import Row, meta, write
from thinwire.session.session import Session

CLIP = 1.0
LENGTH = 32
JUDGED_EVERY = 7
"""Steps: odd, so that it meets both steps of PowerSGD's period."""
METHODS: dict[str, Callable[[], Method]] = {
    "topk": lambda: topk(0.01),
    "topk_int4": lambda: topk(0.01, values="int4"),
    "maxmin": lambda: maxmin(4, rounding="stochastic"),
    "powersgd": lambda: powersgd(4),
}
METRICS = ("bytes_uniform", "bytes_plan", "saved", "saved_of_compressed", "error_ratio", "lost_uniform", "lost_plan")
METRICS += ("heldout_uniform", "heldout_plan", "train_uniform", "train_plan", "plan_s", "share_here", "share")


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        stride = 1 if narrow == wide else 2
        self.first = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, wide) for _ in range(2))
        self.shortcut = nn.Identity() if narrow == wide else nn.Conv2d(narrow, wide, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, narrow, side, side] -> [batch, wide, side / stride, ...]
        inner = relu(self.norms[0](self.first(x)))
        return relu(self.norms[1](self.second(inner)) + self.shortcut(x))


def resnet(width: int, blocks: int) -> nn.Sequential:
    """ResNet for 32 x 32 pixels, of ``6 blocks + 2`` layers, with GroupNorm: its workers share no statistics."""
    widths = [width] + [width << stage for stage in range(3) for _ in range(blocks)]
    body = [Residual(*pair) for pair in pairwise(widths)]
    stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
    return nn.Sequential(stem, nn.GroupNorm(8, width), nn.ReLU(), *body, head)


@dataclass(frozen=True)
class Task:
    build: Callable[[], nn.Module]
    lr: float
    batch: Callable[[int, int, int], Any]  # step, worker, seed
    loss: Callable[[nn.Module, Any], Tensor]
    held_out: Any


def lstm(args: argparse.Namespace) -> Task:
    text = demo_text.load()
    return Task(
        lambda: CharLM(len(text.vocabulary), args.hidden // 2, args.hidden),
        1.0,
        lambda step, worker, seed: text.batch(step, worker, 2, LENGTH, seed),
        loss_of,
        text.held_out_batch(256, LENGTH),
    )


def cifar(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Images ``[count, 3, 32, 32]`` in about [-2, 2], and their classes; planes are stored as differences."""
    with numpy.load(path) as file:
        green, red, blue = numpy.cumsum(numpy.cumsum(file["d"][:, :count], 3, dtype="u1"), 2, dtype="u1")
        images = numpy.stack([red + green, green, blue + green], 1)
        return torch.from_numpy(images).float().sub_(122.0).div_(63.0), torch.from_numpy(file["y"][:count]).long()


def vision(args: argparse.Namespace) -> Task | None:
    folder = Path(args.data or "")
    if not args.data or not (folder / "cifar10_train_a.npz").exists():
        print(f"SKIPPED: resnet, since there is no CIFAR-10 in --data {args.data}", flush=True)
        return None
    images, classes = cifar(folder / "cifar10_train_a.npz", 25_000)

    def batch(step: int, worker: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + worker)
        chosen = torch.randint(len(images), (16,), generator=generator)
        return images[chosen], classes[chosen]

    return Task(
        lambda: resnet(args.width, args.blocks),
        0.1,
        batch,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        cifar(folder / "cifar10_test.npz", 1000),
    )


class Judge:
    """A second policy: tries both plans on the compensated gradients, and measures what a run has lost."""

    def __init__(self, inner: LGreCo | None, plans: Mapping[int, Mapping[str, Compressor]]) -> None:
        self.inner, self.plans = inner, plans
        self.errors: list[tuple[float, float]] = []
        """Of the uniform plan and of the other, at each step looked at."""
        self.lost: list[float] = []

    def after_step(self, session: Session) -> None:
        first = min(self.plans, default=session.step)
        if self.inner is None and first < session.step and session.step % JUDGED_EVERY == 1:
            self._try(session, self.plans[max(step for step in self.plans if step < session.step)])
        if session.workers[-1].probe is not None and (error := session.workers[-1].probe.error) is not None:
            self.lost.append(error)
        if self.inner is not None:
            self.inner.after_step(session)
        due = session.step % JUDGED_EVERY == 0 and self.plans
        session.workers[-1].probe = Probe() if due else None
        likes = {unit.name: unit.like for unit in session.units if unit.compressed}
        for worker in session.workers if self.inner is None else ():
            worker.watch = Snapshot(likes) if due else None

    def _try(self, session: Session, plan: Mapping[str, Compressor]) -> None:
        sums = [0.0, 0.0]
        for worker in session.workers:
            for unit in session.units:
                if unit.name in plan:
                    ctx = Context(session.seed, session.step, unit.name, worker.rank)
                    x = worker.watch.mean(unit.name)
                    for i, compressor in enumerate((unit.method_compressor, plan[unit.name])):
                        sums[i] += losses(x, [compressor], ctx)[0] ** 0.5 / len(session.workers)
        self.errors.append((sums[0], sums[1]))


@dataclass(frozen=True)
class Run:
    sent: float
    plain: float
    """Of the bytes sent, those of what the method as it was attached leaves alone: vectors, and heads."""
    held_out: float
    train: float
    seconds: float
    judge: Judge


def train(task: Task, method: Method, judge: Judge, seed: int, args: argparse.Namespace) -> Run:
    torch.manual_seed(seed)
    model = task.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    def after_step(step: int, loss: float) -> None:
        schedule.step()
        if judge.inner is not None and judge.inner.plan not in judge.plans.values():
            judge.plans[step + 1] = judge.inner.plan

    started = time.perf_counter()
    result = simulate(
        model, replace(method, clip=CLIP), optimizer=optimizer, loss=task.loss, workers=args.workers, steps=args.steps,
        batches=lambda worker, step: task.batch(step, worker, seed), seed=seed, policy=judge, after_step=after_step,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    with torch.no_grad():
        held_out = task.loss(model.eval(), task.held_out).item()
    late = result.losses[-max(1, args.steps // 10) :]
    rows = list(result.ledger.rows)
    sent = [row.wire_bytes for row in rows[-2:]]  # PowerSGD's sides differ
    plain = rows[0].wire_bytes - rows[0].compressed_wire_bytes
    return Run(sum(sent) / len(sent), plain, held_out, sum(late) / len(late), seconds, judge)


def compare(task: Task, method: Method, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """One seed's figures."""
    policy = LGreCo(every=args.every, looks=args.looks, error=args.error)
    plan = train(task, method, Judge(policy, {}), seed, args)
    uniform = train(task, method, Judge(None, plan.judge.plans), seed, args)
    errors = [sum(column) for column in zip(*uniform.judge.errors, strict=True)]
    each, step = policy.seconds / (args.steps // args.every), (plan.seconds - policy.seconds) / args.steps
    lost = [sum(run.judge.lost) / len(run.judge.lost) for run in (uniform, plan)]
    fewer = uniform.sent - plan.sent
    values = [uniform.sent, plan.sent, fewer / uniform.sent, fewer / (uniform.sent - uniform.plain)]
    values += [errors[1] / errors[0], *lost]
    values += [uniform.held_out, plan.held_out, uniform.train, plan.train]
    values += [each, policy.seconds / plan.seconds, each / (LGreCo().every * step + each)]
    return dict(zip(METRICS, values, strict=True))


def report(case: str, runs: Sequence[Mapping[str, float]]) -> list[Row]:
    rows = [spread(case, metric, [run[metric] for run in runs]) for metric in METRICS]
    print(f"| {case} | " + " | ".join(f"{row.value:.4g}" for row in rows) + " |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["lstm", "resnet"], choices=["lstm", "resnet"])
    parser.add_argument("--methods", nargs="+", default=["topk", "maxmin", "powersgd"], choices=list(METHODS))
    parser.add_argument("--data", help="a folder with CIFAR-10")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100, help="steps between plans; the published code's default")
    parser.add_argument("--looks", type=int, default=10)
    parser.add_argument("--error", default="l2", choices=["l2", "l2sq"])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="of the LSTM")
    parser.add_argument("--width", type=int, default=16, help="of the ResNet's first stage")
    parser.add_argument("--blocks", type=int, default=1, help="in each of the ResNet's three stages")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {"lstm": lstm, "resnet": vision}
    rows: list[Row] = []
    print(f"| case | {' | '.join(METRICS)} |\n|---{'|---:' * len(METRICS)}|")
    for name in args.tasks:
        if (task := tasks[name](args)) is not None:
            for method in args.methods:
                runs = [compare(task, METHODS[method](), seed, args) for seed in range(args.seeds)]
                rows += report(f"{name}/{method}", runs)
    if args.json:
        write(args.json, meta(__version__, **vars(args)), rows)


if __name__ == "__main__":
    main()
