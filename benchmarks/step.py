"""Time of a training step, by method, in a lab of hosts on links of known speed.

    python -m benchmarks.step --models mlp,lstm --workers 2,4 --links 1gbit,100mbit --json step.json --plot step.png

One process a host, one thread a process, gloo, DDP with its default buckets. All methods take turns in the same
processes: in each round, each trains for ``--warm-up`` steps that are not counted and ``--steps`` that are (one where a
step takes above 4 seconds). A step is that of the slowest rank; ``ratio_to_dense`` is dense / this and
``ratio_to_local`` this / local, within a round. ``local`` does not exchange gradients, ``dense`` is plain DDP;
``local_sgd`` and ``dense_sgd`` are the same without momentum. ``dgc`` is without a wrapper and gives the optimizer
sparse gradients, ``dgc_bare`` dense ones; ``dgc_ddp`` is under DDP, as all the others.
``--links none`` needs no lab: processes on the loopback.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import thinwire
from benchmarks import contenders
from benchmarks.figures import several, spread
from benchmarks.lab import run_ranks
from thinwire.report import results

DEFAULT = "local,dense,local_sgd,dense_sgd,fp16,bf16,powersgd1,powersgd4,dgc,dgc_ddp"
Rounds = dict[str, list[dict[str, float]]]


def rows_of(prefix: str, ranks: Sequence[Rounds]) -> list[results.Row]:
    """The figures of one run, from what its ranks reported."""
    rows: list[results.Row] = []
    for name, rounds in ranks[0].items():
        case = f"{prefix}/{name}"
        milliseconds = [measured["step_ms"] for measured in rounds]
        rows.append(spread(case, "step_ms", milliseconds))
        for other in ("dense", "local"):
            if other in ranks[0]:
                pairs = zip([m["step_ms"] for m in ranks[0][other]], milliseconds, strict=True)
                over = [theirs / ours if other == "dense" else ours / theirs for theirs, ours in pairs]
                rows.append(spread(case, f"ratio_to_{other}", over))
        for metric in ("wire_bytes", "nic_bytes"):
            if metric in rounds[0]:
                means = [
                    statistics.mean(m[metric] for m in each) for each in zip(*(r[name] for r in ranks), strict=True)
                ]
                rows.append(spread(case, metric, means))
    return rows


def table(rows: Sequence[results.Row]) -> str:
    """Markdown; a case a line."""
    lines = [
        "| case | step, ms | dense / this | this / local | sent a step, kB | by the ledger, kB |",
        "|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row.case for row in rows):
        own = {row.metric: row for row in rows if row.case == case}

        def cell(metric: str, form: str, own: dict[str, results.Row] = own) -> str:
            row = own.get(metric)
            return f"{row.value:{form}} [{row.low:{form}}..{row.high:{form}}]" if row else "-"

        sent, ledger = (f"{own[m].value / 1e3:,.1f}" if m in own else "-" for m in ("nic_bytes", "wire_bytes"))
        times = [cell("step_ms", ".1f"), cell("ratio_to_dense", ".2f"), cell("ratio_to_local", ".2f")]
        lines.append(f"| {' | '.join([case, *times, sent, ledger])} |")
    return "\n".join(lines)


def plot(path: Path, rows: Sequence[results.Row]) -> None:
    """A panel for each model, number of workers and link: milliseconds a step, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in rows if row.metric == "step_ms"]
    panels = list(dict.fromkeys(row.case.rpartition("/")[0] for row in steps))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        bars = [row for row in steps if row.case.rpartition("/")[0] == panel][::-1]
        errors = [[row.value - (row.low or 0) for row in bars], [(row.high or 0) - row.value for row in bars]]
        axis.barh([row.case.rpartition("/")[2] for row in bars], [row.value for row in bars], xerr=errors)
        axis.set(title=panel, xlabel="ms a step, median and quartiles")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=several, default=["mlp"], help=f"of {', '.join(contenders.MODELS)}")
    parser.add_argument("--workers", type=several, default=["2"])
    parser.add_argument("--links", type=several, default=["1gbit"], help="e.g. 1gbit,100mbit; none for the loopback")
    parser.add_argument("--methods", type=several, default=several(DEFAULT), help=f"of {', '.join(contenders.NAMES)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one model, workers and link")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    for given, known in ((args.methods, contenders.NAMES), (args.models, contenders.MODELS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]!r} is not one of {', '.join(known)}")
    rows: list[results.Row] = []
    for model in args.models:
        for workers in args.workers:
            for link in args.links:
                task = {key: getattr(args, key) for key in ("methods", "rounds", "steps", "warm_up")} | {"model": model}
                ranks = run_ranks("benchmarks.step_rank", task, int(workers), link, args.timeout)
                rows += rows_of(f"{model}/{workers}/{link}", ranks)
                if args.json:  # after each, so that a run that is ended leaves what it has
                    results.write(args.json, results.meta(thinwire.__version__), rows)
    print(table(rows))
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    main()
