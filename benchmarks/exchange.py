"""Cost of an exchange by its route: bytes and seconds of a worker, measured and modelled.

    python -m benchmarks.exchange --workers 2,4,8 --links 100mbit,1gbit --json exchange.json --plot exchange.png

One bucket of a transformer (``--blocks`` of width ``--hidden``), planned on meta tensors by thinwire itself, so the
messages are those of a training step; their contents do not matter. The seconds of a route are those of its
collectives, one after the other, on the slowest rank; compression is not in them.

Measured for ``--workers``, one process a host, in a lab of shaped links (``--links none``: on the loopback). Modelled
for 16 to 1024 as well: for each collective ``fixed + (N-1) message + bytes * byte``, fitted to the measurements of
one link by relative least squares. From some number of workers on it is the lab's cores that take the time, which all
hosts share and real ones do not: there messages and bytes cost ``N`` times a price of their own, where that explains
more; beyond what was measured it is left out. Where an all-gather would send more than dense, thinwire takes
an all-reduce, whose messages and bytes are taken to cost what those of an all-gather do. ``auto`` is what that route
takes from the link that ``thinwire.comm.link_speed`` fits at attach. Checked, and printed: two phases send at most 1.2
times as much at 1024 workers as at 16; the model is within 15 % of every measured point; ``auto`` takes at most 5 %
longer than the better route.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import thinwire
from benchmarks.figures import several
from benchmarks.lab import run_ranks
from thinwire import dgc
from thinwire.comm.link import Kind, Link, wire_bytes
from thinwire.exchange.buckets import Bucket, Routing, plan_bucket
from thinwire.exchange.units import resolve, set_stage
from thinwire.report import results

ROUTES = ("all_gather", "two_phase")
MODELLED = (16, 32, 64, 128, 256, 512, 1024)
Stages = list[tuple[Kind, int]]


def plan(blocks: int, hidden: int, density: float, route: str, world: int, link: Link | None = None) -> Bucket:
    shapes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "up": (4 * hidden, hidden),
              "down": (hidden, 4 * hidden), "norm": (hidden,)}  # fmt: skip
    named = [
        (f"{i}.{name}", torch.empty(shape, device="meta")) for i in range(blocks) for name, shape in shapes.items()
    ]
    units = resolve(named, dgc(density, route=route), {})
    set_stage(units, None, world, route)
    return plan_bucket(units, world, Routing(route, link=link))


def stages_of(bucket: Bucket) -> Stages:
    return [stage for group in bucket.routes for stage in group.stages]


def fitted(timed: Sequence[tuple[int, int, Kind, float]]) -> dict[Kind, np.ndarray]:
    """Of each collective: ``TERMS``, none below 0, and from how many workers on the cores are the limit."""
    found: dict[Kind, np.ndarray] = {}
    for kind in dict.fromkeys(kind for _, _, kind, _ in timed):
        best: tuple[float, np.ndarray] | None = None
        for crowd in (np.inf, *sorted({world for world, *_ in timed if world > 2})):
            rows = np.array([terms(kind, nbytes, world, crowd) / s for world, nbytes, k, s in timed if k == kind])
            for mask in range(1, 2 ** len(TERMS)):  # of all subsets that fit without a negative one, the best
                some = [i for i in range(len(TERMS)) if mask >> i & 1]
                solved = np.linalg.lstsq(rows[:, some], np.ones(len(rows)), rcond=None)[0]
                lost = float(((rows[:, some] @ solved - 1) ** 2).sum())
                if (solved >= 0).all() and (best is None or lost < best[0]):
                    best = lost, np.append(np.zeros(len(TERMS)), crowd)
                    best[1][some] = solved
        assert best is not None
        found[kind] = best[1]
    return found


TERMS = ("fixed_s", "message_s", "byte_s", "shared_message_s", "shared_byte_s")


def terms(kind: Kind, nbytes: int, world: int, crowd: float) -> np.ndarray:
    """Return the factor of each of ``TERMS``; from ``crowd`` workers on the lab's cores do the work of all."""
    messages = 2 * (world - 1) if kind == "all_reduce" else world - 1
    sent = wire_bytes(kind, nbytes, world)
    if world >= crowd:
        return np.array([0.0, 0.0, 0.0, messages * world, sent * world])
    return np.array([1.0, messages, sent, 0.0, 0.0])


def measured(
    args: argparse.Namespace, link: str
) -> tuple[list[results.Row], Callable[[Stages, int], float], list[str]]:
    """The rows of one link, the model that was fitted to them, and the checks."""
    rows, checks = list[results.Row](), list[str]()
    timed: list[tuple[int, int, Kind, float]] = []
    points: list[tuple[str, int, Stages, float]] = []
    for world in map(int, args.workers):
        buckets = {(r, d): plan(args.blocks, args.hidden, d, r, world) for d in args.densities for r in ROUTES}
        cases = {f"{route}/{link}/{world}/{d:g}": stages_of(bucket) for (route, d), bucket in buckets.items()}
        task = {"rounds": args.rounds, "cases": cases}
        ranks: list[dict[str, Any]] = run_ranks("benchmarks.exchange_rank", task, world, link, args.timeout)
        own = Link(ranks[0]["bandwidth"], ranks[0]["latency"])
        medians: dict[str, float] = {}
        for case, stages in cases.items():
            each = np.array(ranks[0]["seconds"][case])  # the same on all ranks
            low, medians[case], high = np.quantile(each.sum(1), (0.25, 0.5, 0.75))
            rows.append(results.Row(case, "measured_s", medians[case], low, high))
            points.append((case, world, stages, medians[case]))
            timed += [(world, size, kind, s) for (kind, size), s in zip(stages, np.median(each, 0), strict=True)]
        for density in args.densities:
            auto = plan(args.blocks, args.hidden, density, "auto", world, own)
            taken, both = ROUTES[auto.relays], {r: medians[f"{r}/{link}/{world}/{density:g}"] for r in ROUTES}
            slower = both[taken] / min(both.values())
            rows.append(results.Row(f"auto/{link}/{world}/{density:g}", "over_better", slower))
            what = (
                f"auto takes {taken} for {world} workers at {density:g} over {link} ({own}): {slower:.3f} of the better"
            )
            checks.append(f"{'ok  ' if slower <= 1.05 else 'FAIL'} {what}")
    model = fitted(timed)
    for kind, values in model.items():
        for name, value in zip((*TERMS, "crowded_from"), values, strict=True):
            rows += [results.Row(f"{kind}/{link}", name, float(value))] if np.isfinite(value) else []

    def seconds(stages: Stages, world: int) -> float:
        total = 0.0
        for kind, nbytes in stages:
            *values, crowd = model.get(kind, model["all_gather"])
            total += float(terms(kind, nbytes, world, crowd if str(world) in args.workers else np.inf) @ values)
        return total

    for case, world, stages, took in points:
        said = seconds(stages, world)
        rows.append(results.Row(case, "modelled_s", said))
        off = said / took - 1
        checks.append(
            f"{'ok  ' if abs(off) <= 0.15 else 'FAIL'} model of {case}: {said:.4g} s, {off:+.1%} of {took:.4g} s"
        )
    return rows, seconds, checks


def plot(path: Path, rows: Sequence[results.Row], densities: Sequence[float], links: Sequence[str]) -> None:
    """Bytes and seconds over the number of workers; measured points, modelled lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 1 + len(links), figsize=(5 * (1 + len(links)), 4), squeeze=False, layout="constrained"
    )
    for axis, link in zip(axes[0], [None, *links], strict=True):
        for density in densities:
            for route in ROUTES:
                head = f"{route}/" if link is None else f"{route}/{link}/"
                for metric, style in (("bytes", "-"), ("modelled_s", "-"), ("measured_s", "o")):
                    found = sorted(
                        (int(row.case.split("/")[-2]), row.value)
                        for row in rows
                        if row.metric == metric and row.case.startswith(head) and row.case.endswith(f"/{density:g}")
                        and (metric == "bytes") == (link is None)
                    )  # fmt: skip
                    if found:
                        label = None if style == "o" else f"{route}, {density:g}"
                        axis.plot(*zip(*found, strict=True), style, label=label)
        title, unit = ("a worker and step", "bytes sent") if link is None else (f"over {link}", "seconds")
        axis.set(xscale="log", yscale="log", xlabel="workers", ylabel=unit, title=title)
        axis.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=several, default=["2", "4", "8"])
    parser.add_argument("--links", type=several, default=["1gbit"], help="e.g. 1gbit,100mbit; none for the loopback")
    parser.add_argument("--densities", type=lambda t: [float(d) for d in several(t)], default=[0.001, 0.01])
    parser.add_argument("--blocks", type=int, default=10, help="with 12, what 8 workers gather is above malloc's limit")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one link and number of workers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows, checks = list[results.Row](), list[str]()
    models: dict[str, Callable[[Stages, int], float]] = {}
    for link in args.links:
        found, models[link], said = measured(args, link)
        rows += found
        checks += said
    worlds = [*dict.fromkeys([*map(int, args.workers), *MODELLED])]
    for density in args.densities:
        sent: dict[tuple[str, int], float] = {}
        for world in worlds:
            for route in ROUTES:
                stages = stages_of(plan(args.blocks, args.hidden, density, route, world))
                sent[route, world] = sum(wire_bytes(kind, nbytes, world) for kind, nbytes in stages)
                rows.append(results.Row(f"{route}/{world}/{density:g}", "bytes", sent[route, world]))
                if str(world) not in args.workers:
                    for link, seconds in models.items():
                        case = f"{route}/{link}/{world}/{density:g}"
                        rows.append(results.Row(case, "modelled_s", seconds(stages, world)))
        grows = sent["two_phase", 1024] / sent["two_phase", 16]
        what = f"two phases at {density:g}: {sent['two_phase', 1024]:,.0f} bytes at 1024 workers, {grows:.3f} of 16"
        checks.append(f"{'ok  ' if grows <= 1.2 else 'FAIL'} {what}")
    print("\n".join(checks))
    if args.json:
        results.write(args.json, results.meta(thinwire.__version__), rows)
    if args.plot:
        plot(args.plot, rows, args.densities, args.links)


if __name__ == "__main__":
    main()
