"""Compress and decode on one machine, relative to the time that merely copying the touched state takes.

    python -m benchmarks.kernels --json kernels.json

REF is a copy of (g, u, v). All cases of one thread count are run in turn, round after round; the figure is the median
of the ratios within a round. ``abs + topk`` is what a direct implementation does.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.figures import spread
from thinwire._version import __version__
from thinwire.compressors import TopK
from thinwire.core import Context, State, files
from thinwire.core.loops import Kernels
from thinwire.exchange.fused import select
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.units import Piece, Unit
from thinwire.exchange.workers import Worker
from thinwire.kernels.cpu import Cpu
from thinwire.kernels.reference import REFERENCE
from thinwire.memories import MomentumCorrection
from thinwire.report.results import Row, meta, write

SETTLE = 0.02
"""Seconds for torch's OpenMP threads to stop spinning for more work, which they do on the cores that a case needs."""
DECODED = 1  # messages that are decoded and added to the gradient; N workers have N of them


class Case:
    """DGC of one unit: what ``pipeline.send`` and ``receive`` do with it, without a network."""

    def __init__(self, n: int, density: float, kernels: Kernels, state: str | None, grad: torch.dtype) -> None:
        self.param = torch.empty(n, dtype=grad)
        self.grad = torch.empty(n, dtype=grad)
        self.fresh = torch.randn(n).to(grad)
        memory = MomentumCorrection(momentum=0.9, **({"state_dtype": state} if state else {}))
        self.unit = Unit("w", self.param, TopK(density), memory, method_compressor=TopK(density))
        self.worker = Worker(0, kernels=kernels)
        self.worker.local["w"] = self.unit.fresh_local()
        self.step = 0
        self.commit: Callable[[], None] = self.worker.local["w"].commit

    def prepare(self) -> None:
        self.grad.copy_(self.fresh)

    def run(self) -> None:
        ctx = Context(0, self.step, "w", 0, self.worker.kernels)
        found = select([self.unit], [Piece(0)], [self.grad], self.worker, [ctx], 1.0)[0]
        local: TwoCopies = self.worker.local["w"]
        x = local.next["residual"]
        payload = self.unit.compressor.encode(*found, x.numel(), ctx)
        self.unit.memory.sent(self.unit.compressor.own(payload, found[0], x, {}, ctx), local.next)
        for _ in range(DECODED):  # the gradient is clear: what arrives is added
            self.unit.compressor.decompress(payload, self.grad, {}, ctx).add_to(self.grad)
        local.commit()
        self.step += 1


class Direct:
    """The same step as a direct implementation writes it: in place, abs, topk, scatter."""

    def __init__(self, n: int, density: float) -> None:
        self.u, self.v, self.fresh = torch.zeros(n), torch.zeros(n), torch.randn(n)
        self.grad = torch.empty(n)
        self.k = max(1, int(n * density))

    def prepare(self) -> None:
        self.grad.copy_(self.fresh)

    def run(self) -> None:
        self.v.add_(self.u.mul_(0.9).add_(self.grad))
        chosen = self.v.abs().topk(self.k, sorted=False).indices
        values = self.v[chosen]
        self.v[chosen] = 0.0
        self.u[chosen] = 0.0
        self.grad.zero_().index_add_(0, chosen, values)


class Copy:
    """REF: what touching the state costs."""

    def __init__(self, n: int) -> None:
        self.source: State = {key: torch.randn(n) for key in "guv"}
        self.target = {key: torch.zeros(n) for key in "guv"}

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        for key, tensor in self.source.items():
            self.target[key].copy_(tensor)


def seconds(case: Copy | Case | Direct) -> float:
    case.prepare()
    time.sleep(SETTLE)
    start = time.perf_counter()
    case.run()
    return time.perf_counter() - start


def measure(n: int, density: float, threads: int, rounds: int) -> list[Row]:
    torch.set_num_threads(threads)
    cpu = Cpu()
    cases: dict[str, Copy | Case | Direct] = {
        "copy": Copy(n),
        "dgc/cpu": Case(n, density, cpu, None, torch.float32),
        "dgc/reference": Case(n, density, REFERENCE, None, torch.float32),
        "dgc/abs_topk": Direct(n, density),
        "dgc/cpu_bf16_grad": Case(n, density, cpu, None, torch.bfloat16),
        "dgc/cpu_bf16_state": Case(n, density, cpu, "bfloat16", torch.float32),
    }
    for case in cases.values():  # compile, and touch the memory
        seconds(case)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            taken[name].append(seconds(case))
    cpu.close()
    rows: list[Row] = []
    for name, times in taken.items():
        ratios = [t / ref for t, ref in zip(times, taken["copy"], strict=True)]
        for metric, values in (("ms", [t * 1e3 for t in times]), ("ratio_to_ref", ratios)):
            rows.append(spread(f"{name}/{threads}", metric, values))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_600_000)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    parser.add_argument("--plot", help="write a bar chart to this file")
    args = parser.parse_args()
    rows: list[Row] = []
    for threads in args.threads:
        rows += measure(args.elements, args.density, threads, args.rounds)
    print("| case / threads | ms | x copy of (g, u, v) | quartiles |\n|---|---|---|---|")
    for ms, ratio in zip(rows[::2], rows[1::2], strict=True):
        print(f"| {ms.case} | {ms.value:.1f} | {ratio.value:.2f} | {ratio.low:.2f} to {ratio.high:.2f} |")
    if args.json:
        write(args.json, meta(__version__, elements=args.elements, density=args.density), rows)
    if args.plot:
        bars(args.plot, [row for row in rows if row.metric == "ratio_to_ref"], "time / copy of (g, u, v)")


def bars(path: str, rows: list[Row], label: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
    axes.barh([row.case for row in rows], [row.value for row in rows])
    axes.set_xlabel(label)
    axes.invert_yaxis()
    kind = Path(path).suffix.removeprefix(".") or "png"
    files.write(path, lambda file: figure.savefig(file, format=kind))
    plt.close(figure)


if __name__ == "__main__":
    main()
