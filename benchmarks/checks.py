"""Cost of checks: hashes of parameters relative to a training step, checksums to a save and a load.

    python -m benchmarks.checks --json checks.json

One process, one thread. In each round take turns: a step of plain training, without an exchange; the hashes of one look
at the replicas; and a save and a load of a session's state with ``torch.save`` and ``torch.load``, with and without
checksums. ``look_share`` is the look over the steps from one to the next; ``save_ratio`` and ``load_ratio`` are with
over without, within a round. Medians over the rounds, with quartiles; the first round is not counted.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import thinwire
from benchmarks.contenders import MODELS, sgd
from benchmarks.figures import several, spread
from thinwire.report import results
from thinwire.report.results import Row
from thinwire.session.fingerprint import fingerprint
from thinwire.session.replicas import EVERY


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def measure(name: str, rounds: int, file: Path) -> list[Row]:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build()
    optimizer = sgd(model, 0.9)
    attached = build()
    session = thinwire.attach(
        attached, thinwire.dgc(0.001), optimizer=sgd(attached, 0.9), process_group=dist.group.WORLD
    )

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()

    found: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        once = {
            "step_ms": milliseconds(step),
            "look_ms": milliseconds(lambda: [fingerprint(param) for param in model.parameters()]),
            "save_ms": milliseconds(lambda: torch.save(session.state_dict(), file)),
            "load_ms": milliseconds(lambda: session.load_state_dict(torch.load(file))),
        }
        with mock.patch("thinwire.session.checksums.checksum", return_value=0):
            once["bare_save_ms"] = milliseconds(lambda: torch.save(session.state_dict(), file))
            once["bare_load_ms"] = milliseconds(lambda: session.load_state_dict(torch.load(file)))
        once["look_share"] = once["look_ms"] / (EVERY * once["step_ms"])
        once |= {f"{what}_ratio": once[f"{what}_ms"] / once[f"bare_{what}_ms"] for what in ("save", "load")}
        for metric, value in once.items():
            found.setdefault(metric, []).append(value)
    return [spread(name, metric, values[1:]) for metric, values in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__)
    parser.add_argument("--models", type=several, default=["mlp", "lstm"], help="of benchmarks.contenders")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            rows += measure(name, given.rounds, Path(folder) / "wire.pt")
    dist.destroy_process_group()
    for row in rows:
        print(f"{row.case:6} {row.metric:14} {row.value:10.4f} [{row.low:.4f}..{row.high:.4f}]")
    if given.json is not None:
        results.write(given.json, results.meta(thinwire.__version__), rows)


if __name__ == "__main__":
    main()
