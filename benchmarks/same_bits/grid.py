"""The cells: every method through the simulator and between two processes, and single events."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.same_bits import events, worlds
from benchmarks.same_bits.methods import METHODS
from benchmarks.same_bits.training import STEPS, Found, Ranks, simulated, start


@dataclass(frozen=True)
class Cell:
    """A run on the first ``ranks`` processes at once; with 1, on any process."""

    name: str
    ranks: int
    run: Callable[[Ranks], Found]


def _simulated(method: str, workers: int, kernels: str, ranks: Ranks) -> Found:
    return simulated(method, workers, kernels)


def _trained(engine: str, method: str, kernels: str, ranks: Ranks) -> Found:
    run = start(ranks, engine, method, kernels=kernels)
    run.train(*range(STEPS))
    return run.found()


def cells() -> dict[str, Cell]:
    """By name: method, engine, kernels; or event, method, engine."""
    found = [Cell(name, 4, run) for name, run in worlds.cells().items()]
    found += [Cell(name, 2, run) for name, run in events.cells().items()]
    for name in METHODS:
        for engine, kernels in (("ddp", "reference"), ("bare", "cpu")):
            found.append(Cell(f"{name}/{engine}/{kernels}", 2, partial(_trained, engine, name, kernels)))
        for workers, kernels in ((3, "reference"), (2, "cpu")):
            found.append(Cell(f"{name}/sim{workers}/{kernels}", 1, partial(_simulated, name, workers, kernels)))
    assert len({cell.name for cell in found}) == len(found)
    return {cell.name: cell for cell in found}
