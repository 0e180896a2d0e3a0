"""Which compressor for each parameter: the fewest bytes at a given error. Pure arithmetic on tables.

Source: M. Alimohammadi, I. Markov, E. Frantar, D. Alistarh, "L-GreCo: Layerwise-Adaptive Gradient Compression for
Efficient and Accurate Deep Learning", MLSys 2024, arXiv:2210.17357, algorithm 1.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from thinwire.tensors import ThinwireError

Table = Sequence[Sequence[float]]
"""A row for each parameter, a column for each of its candidates; rows may differ in length."""
SLIP = 1e-9
"""Relative error that a sum of floats may be above the budget."""


def undominated(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """The candidates that are the cheapest at their error, in order of rising cost and falling error."""
    order = sorted(range(len(costs)), key=lambda q: (costs[q], errors[q]))
    kept: list[int] = []
    for q in order:
        if not kept or errors[q] < errors[kept[-1]]:
            kept.append(q)
    return kept


def allocate(costs: Table, errors: Table, budget: float, resolution: int = 10_000) -> list[int] | None:
    """The candidate of each parameter, so that the costs sum to the least and the errors to no more than ``budget``.

    ``T[l, b] = min over q of T[l-1, b - e_l(q)] + cost_l(q)``, where ``e`` is the error in units of
    ``budget / resolution``: rounded up, so that any plan found is one; and rounded to the nearest, where the plan found
    is checked. The cheaper counts; of equal costs, the smaller error.

    Args:
        costs, errors: of each parameter's candidates, at least 0.
        budget: at least 0.
        resolution: units of the budget; time and memory grow with it.

    Returns:
        An index for each parameter; None where nothing was found within the budget.

    Raises:
        ThinwireError: tables of different shapes, or values that are negative or not finite.

    Departures: the paper rounds errors one way.
    """
    _check(costs, errors, budget, resolution)
    kept = [undominated(*rows) for rows in zip(costs, errors, strict=True)]
    pruned = [[row[q] for q in rows] for row, rows in zip(costs, kept, strict=True)]
    lost = [[row[q] for q in rows] for row, rows in zip(errors, kept, strict=True)]
    found: list[tuple[float, float, list[int]]] = []
    for rounded in (math.ceil, round):
        units = [_units(row, budget, resolution, rounded) for row in lost]
        chosen = _least(pruned, units, resolution)
        if chosen is not None:
            plan = [rows[q] for rows, q in zip(kept, chosen, strict=True)]
            if total(errors, plan) <= budget * (1 + SLIP):
                found.append((total(costs, plan), total(errors, plan), plan))
    return min(found)[2] if found else None


def improve(
    costs: Table, errors: Table, uniform: Sequence[int], slack: float = 1.0, resolution: int = 10_000
) -> list[int]:
    """What ``allocate`` finds within ``slack`` times the error of ``uniform``; or ``uniform`` if no dearer."""
    found = allocate(costs, errors, slack * total(errors, uniform), resolution)
    return found if found is not None and total(costs, found) < total(costs, uniform) else list(uniform)


def total(table: Table, plan: Sequence[int]) -> float:
    """The sum of a plan's entries."""
    return math.fsum(row[q] for row, q in zip(table, plan, strict=True))


def _units(errors: Sequence[float], budget: float, resolution: int, rounded: Callable[[float], float]) -> list[int]:
    if not budget:
        return [0 if error == 0.0 else resolution + 1 for error in errors]
    return [int(rounded(min(error / budget, 2.0) * resolution - 1e-6)) for error in errors]


def _least(costs: Table, units: Sequence[Sequence[int]], resolution: int) -> list[int] | None:
    """The dynamic programme; ``least[b]`` is the least cost within ``b`` units, which never rises with b."""
    least = np.zeros(resolution + 1)
    choices: list[np.ndarray] = []
    for row, needed in zip(costs, units, strict=True):
        before, least = least, np.full(resolution + 1, np.inf)
        choice = np.zeros(resolution + 1, dtype=np.int32)
        for q, (cost, unit) in enumerate(zip(row, needed, strict=True)):
            if unit <= resolution:
                cheaper = before[: resolution + 1 - unit] + cost
                better = cheaper < least[unit:]
                least[unit:][better] = cheaper[better]
                choice[unit:][better] = q
        choices.append(choice)
    if not np.isfinite(least[-1]):
        return None
    b = int(np.argmin(least))  # the fewest units at that cost
    plan: list[int] = []
    for choice, needed in zip(reversed(choices), reversed(units), strict=True):
        plan.append(int(choice[b]))
        b -= needed[plan[-1]]
    return plan[::-1]


def _check(costs: Table, errors: Table, budget: float, resolution: int) -> None:
    if [len(row) for row in costs] != [len(row) for row in errors] or not all(costs):
        raise ThinwireError("costs and errors need a row for each parameter, and a value for each of its candidates")
    if not all(math.isfinite(x) and x >= 0 for table in (costs, errors) for row in table for x in row):
        raise ThinwireError("costs and errors must be finite and at least 0")
    if not 0 <= budget < math.inf or resolution < 1:
        raise ThinwireError(f"budget is {budget} and resolution {resolution}; they must be at least 0 and 1")
