"""Error feedback on logistic regression: the figures that separate EF14, EF21, EF21-SGDM, EF21-W and EControl.

    python -m benchmarks.convex --json convex.json --plot convex.png

20 workers, a logistic loss with a non-convex regulariser, float64, the library's memories and Top-k; learning rates are
multiples of ``thinwire.methods.theory.ef21_step``. Three tables: exact gradients; mini-batches on data sorted by label;
one worker whose data is ten times larger. A data set that is not in ``--data`` is skipped, and that is said.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import several
from thinwire import Memory
from thinwire._version import __version__
from thinwire.compressors import TopK
from thinwire.core import NOWHERE
from thinwire.core.interfaces import local_state, shared_state
from thinwire.core.tensors import Sparse
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.units import payload_nbytes
from thinwire.memories import EF21, EControl, ErrorFeedback, NoMemory
from thinwire.methods.theory import Mean, ef21_step, logistic_smoothness, xi
from thinwire.report.results import Row, meta, write

WORKERS, REGULARIZER, BATCH = 20, 0.1, 4
SETS = {"phishing": 1, "mushrooms": 2, "a9a": 4, "w8a": 1}
"""Elements that a worker sends of each data set's gradient."""
DETERMINISTIC = ("ef21", "ef14", "econtrol", "ef21_w")
STOCHASTIC = {1: 16_000, 4: 8_000}
"""Steps at each multiple of the learning rate."""


def memory_of(name: str, alpha: float) -> Memory:
    return {
        "sgd": NoMemory(),
        "ef14": ErrorFeedback(),
        "ef21": EF21(),
        "ef21_w": EF21(),
        "ef21_sgdm": EF21(0.1),
        "econtrol": EControl(alpha),
        "econtrol_tenth": EControl(alpha / 10),
        "econtrol_5x": EControl(min(1.0, 5 * alpha)),
    }[name]


@dataclass(frozen=True)
class Problem:
    """``f = mean f_i``, each the mean over the rows of a shard; a padded row counts for nothing."""

    features: Tensor  # [workers, rows, d]
    labels: Tensor  # [workers, rows], -1 or 1
    weights: Tensor  # [workers, rows], 1 / rows of the shard, 0 where padded
    sizes: Tensor  # int64 [workers]

    @staticmethod
    def of(features: Tensor, labels: Tensor) -> "Problem":
        """Contiguous shards; the last one takes the remainder."""
        n, d = features.shape
        each = n // WORKERS
        starts = [i * each for i in range(WORKERS)] + [n]
        most = n - starts[-2]
        a = torch.zeros(WORKERS, most, d, dtype=torch.float64)
        y, w = torch.ones_like(a[..., 0]), torch.zeros_like(a[..., 0])
        sizes = [stop - start for start, stop in pairwise(starts)]
        for i, size in enumerate(sizes):
            rows = slice(starts[i], starts[i] + size)
            a[i, :size], y[i, :size], w[i, :size] = features[rows], labels[rows], 1.0 / size
        return Problem(a, y, w, torch.tensor(sizes))

    @property
    def dim(self) -> int:
        return self.features.shape[-1]

    @cached_property
    def smoothness(self) -> tuple[float, list[float]]:
        """``L`` and all ``L_i``."""
        each = [logistic_smoothness(a[:n], REGULARIZER) for a, n in zip(self.features, self.sizes, strict=True)]
        whole = self.features * self.weights.sqrt().unsqueeze(-1) / WORKERS**0.5  # its Gram matrix is f's
        gram = torch.einsum("nrd,nre->de", whole, whole)
        return torch.linalg.eigvalsh(gram)[-1].item() / 4 + 2 * REGULARIZER, each

    def step(self, k: int, mean: Mean = "quadratic") -> float:
        return ef21_step(*self.smoothness, k / self.dim, mean)

    def gradients(self, x: Tensor) -> Tensor:
        """Of every worker, exactly: ``[workers, d]``."""
        return self._of_rows(self.features, self.labels, self.weights, x)

    def sampled(self, x: Tensor, generator: np.random.Generator) -> Tensor:
        """Of ``BATCH`` rows of every worker."""
        rows = torch.from_numpy(generator.integers(0, self.sizes[:, None].numpy(), (WORKERS, BATCH)))
        who = torch.arange(WORKERS)[:, None]
        share = torch.full((WORKERS, BATCH), 1.0 / BATCH, dtype=torch.float64)
        return self._of_rows(self.features[who, rows], self.labels[who, rows], share, x)

    @staticmethod
    def _of_rows(a: Tensor, y: Tensor, w: Tensor, x: Tensor) -> Tensor:
        slope = -w * y * torch.sigmoid(-y * (a @ x))  # [workers, rows]
        return torch.bmm(slope.unsqueeze(1), a).squeeze(1) + 2 * REGULARIZER * x / (1 + x * x).square()


def train(
    problem: Problem,
    memory: Memory,
    k: int,
    lr: float,
    steps: int,
    look: Callable[[int, Tensor, Tensor], object],
    generator: np.random.Generator | None = None,
) -> None:
    """``look(step, x, g)`` sees parameters and gradients before each step; without a ``generator`` these are exact.

    Memories are elementwise, so all workers are the rows of one tensor.
    """
    n, d = WORKERS, problem.dim
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(d))
    first = problem.gradients(x)
    local, shared = TwoCopies.of(local_state(memory, first)), TwoCopies.of(shared_state(memory, x))
    for key in ("estimate", "average"):  # from the exact gradient, as the papers do
        if key in local.now:
            local.now[key].copy_(first)
        if key in shared.now:
            shared.now[key].copy_(first.mean(0))
    offsets = (torch.arange(n) * d)[:, None]
    for step in range(steps):
        g = problem.gradients(x) if generator is None else problem.sampled(x, generator)
        look(step, x, g)
        compensated = memory.compensate(g, x, local.now, local.next)
        chosen = compensated.abs().topk(k, dim=1).indices
        own = Sparse((chosen + offsets).flatten(), compensated.gather(1, chosen).flatten(), k / d)
        sent = torch.empty_like(compensated)
        own.write_to(sent)
        if step < 2 and k < d:
            check_selection(compensated, sent, k)
        memory.sent(own, local.next)
        h = memory.receive(sent.mean(0), x, shared.now, shared.next)
        local.commit()
        shared.commit()
        x = x - lr * h


def check_selection(compensated: Tensor, sent: Tensor, k: int) -> None:
    """Check that the selection of all rows at once is that of TopK for each, to its wire form and back."""
    compressor = top(k, compensated.shape[1])
    for row, ours in zip(compensated, sent, strict=True):
        compressor.decompress(compressor.compress(row, {}, NOWHERE), row, {}, NOWHERE).write_to(out := row.clone())
        if out.count_nonzero() and not torch.equal(out, ours):
            raise AssertionError(f"TopK sends {out.nonzero().flatten().tolist()}, not {ours.nonzero().tolist()}")


def top(k: int, d: int) -> TopK:
    return TopK((k - 0.5) / d)  # rounded up, it is k


def exact(problem: Problem, name: str, k: int, multiple: float, rounds: int) -> list[float]:
    """``||grad f||^2`` before each round, with exact gradients."""
    norms: list[float] = []
    lr = multiple * problem.step(k, "arithmetic" if name == "ef21_w" else "quadratic")
    memory = memory_of(name, k / problem.dim)
    train(problem, memory, k, lr, rounds + 1, lambda _, x, g: norms.append(norm2(g)))
    return norms


def stochastic(problem: Problem, name: str, k: int, lr: float, steps: int, tail: int) -> float:
    """Mean ``||grad f||^2`` over every tenth of the last ``tail`` steps, with mini-batches."""
    norms: list[float] = []

    def look(step: int, x: Tensor, _: Tensor) -> None:
        if step >= steps - tail and step % 10 == 0:
            norms.append(norm2(problem.gradients(x)))

    kept = problem.dim if name == "sgd" else k
    train(problem, memory_of(name, k / problem.dim), kept, lr, steps, look, np.random.default_rng(1))
    return sum(norms) / len(norms)


def norm2(gradients: Tensor) -> float:
    """``||grad f||^2``, from the gradients of all workers."""
    return gradients.mean(0).square().sum().item()


def load(name: str, folder: Path) -> tuple[Tensor, Tensor] | None:
    """Features and labels of a data set; None, and a line that says so, where it is not there."""
    if name == "synthetic":
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(1000, 30, generator=generator, dtype=torch.float64)
        return a, (a[:, 0] + torch.randn(1000, generator=generator) > 0).double() * 2 - 1
    path = folder / f"libsvm_{name}.npz"
    if not path.exists():
        print(f"!! {name} IS SKIPPED: {path} is not there; give its folder with --data")
        return None
    data = np.load(path)
    split = "train"
    indptr, labels = data[f"indptr_{split}"], data[f"y_{split}"]
    features = np.zeros((len(labels), int(data["n_features"])))
    features[np.repeat(np.arange(len(labels)), np.diff(indptr)), data[f"indices_{split}"]] = data[f"data_{split}"]
    return torch.from_numpy(features), torch.from_numpy(np.where(labels == labels.min(), -1.0, 1.0))


def table_exact(problem: Problem, name: str, k: int, args: argparse.Namespace, curves: dict[str, list[float]]):
    d, (whole, each) = problem.dim, problem.smoothness
    quadratic = (sum(value * value for value in each) / WORKERS) ** 0.5
    print(f"\n{name}: top {k} of {d}, L {whole:.4f}, L_QM {quadratic:.4f}, L_AM {sum(each) / WORKERS:.4f}, ", end="")
    print(f"xi {xi(k / d):.1f}, step {problem.step(k):.6g}; {payload_nbytes(top(k, d), torch.empty(d).double())} bytes")
    seen = [r for r in (100, 500, 600, 1500) if r <= args.rounds] or [args.rounds]
    print(f"| step | method | {' | '.join(f'after {r}' for r in seen)} |\n|---|---|{'---|' * len(seen)}")
    rows: list[Row] = []
    for multiple in args.multiples:
        for method in DETERMINISTIC:
            norms = exact(problem, method, k, multiple, args.rounds)
            curves[f"{name}/{multiple:g}x/{method}"] = norms
            case = f"exact/{name}/{multiple:g}x/{method}"
            rows += [Row(case, f"grad_norm2_{r}", norms[r]) for r in seen]
            print(f"| {multiple:g}x | {method} | {' | '.join(f'{norms[r]:.1e}' for r in seen)} |", flush=True)
    return rows


def table_stochastic(features: Tensor, labels: Tensor, name: str, k: int, lr: float, args: argparse.Namespace):
    problem = Problem.of(*sorted_by_label(features, labels))
    methods = ("sgd", "ef14", "ef21", "ef21_sgdm", "econtrol_tenth", "econtrol", "econtrol_5x")
    print(f"\n{name}, batches of {BATCH} from shards of one label: mean over the last quarter, or 2,000 steps")
    print(f"| step | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    rows: list[Row] = []
    for multiple, steps in STOCHASTIC.items():
        count = min(steps, args.steps)
        found = [stochastic(problem, m, k, multiple * lr, count, min(2000, -(-count // 4))) for m in methods]
        rows += [
            Row(f"stochastic/{name}/{multiple}x/{m}", "grad_norm2", v) for m, v in zip(methods, found, strict=True)
        ]
        print(f"| {multiple}x | {' | '.join(f'{value:.1e}' for value in found)} |", flush=True)
    return rows


def sorted_by_label(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    order = labels.argsort(stable=True)
    return features[order], labels[order]


def table_uneven(features: Tensor, labels: Tensor, name: str, k: int, args: argparse.Namespace) -> list[Row]:
    """Rounds to a hundredth of the gradient, each at its own step, where one worker's features are ten times larger."""
    larger = features.clone()
    larger[: len(larger) // WORKERS] *= 10.0
    problem = Problem.of(larger, labels)
    rows: list[Row] = []
    for method in ("ef21", "ef21_w"):
        norms = exact(problem, method, k, 1.0, 10 * args.rounds)
        rounds = next((r for r, value in enumerate(norms) if value < 1e-2 * norms[0]), None)
        said = f"{rounds} rounds" if rounds is not None else f"not in {10 * args.rounds} rounds"
        print(f"{name}, one worker's data 10x: {method} at its own step: {said}; ends at {norms[-1]:.1e}", flush=True)
        case = f"uneven/{name}/{method}"
        rows += [Row(case, "rounds", rounds)] if rounds is not None else []
        rows += [Row(case, "grad_norm2_end", norms[-1])]
    return rows


def plot(path: str, curves: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({case.rpartition("/")[0] for case in curves})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for case, norms in curves.items():
            if case.startswith(f"{panel}/"):
                axis.semilogy(norms, label=case.rpartition("/")[2])
        axis.set(title=panel, xlabel="round", ylabel="squared norm of the gradient")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with libsvm_*.npz")
    parser.add_argument("--sets", type=several, default=list(SETS), help=f"of {', '.join(SETS)}, synthetic")
    parser.add_argument("--stochastic", type=several, default=["phishing"], help="sets for the table of mini-batches")
    parser.add_argument("--uneven", type=several, default=["phishing", "mushrooms"], help="sets for one larger worker")
    parser.add_argument("--multiples", type=lambda text: [float(m) for m in several(text)], default=[1.0, 16.0])
    parser.add_argument("--rounds", type=int, default=1500, help="with exact gradients")
    parser.add_argument("--steps", type=int, default=16_000, help="with mini-batches, at most")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    curves: dict[str, list[float]] = {}
    for name in args.sets:
        if (data := load(name, Path(args.data))) is None:
            continue
        k, problem = SETS.get(name, 1), Problem.of(*data)
        rows += table_exact(problem, name, k, args, curves)
        if name in args.uneven:
            rows += table_uneven(*data, name, k, args)
        if name in args.stochastic:
            rows += table_stochastic(*data, name, k, problem.step(k), args)
        if args.json:  # what is done is kept
            write(args.json, meta(__version__, **vars(args)), rows)
    if args.json and not rows:
        write(args.json, meta(__version__, **vars(args)), rows)
    if args.plot and curves:
        plot(args.plot, curves)


if __name__ == "__main__":
    main()
