"""Allocation: a compressor for each parameter, with the fewest bytes at a given error. Pure arithmetic on tables.

Source: M. Alimohammadi, I. Markov, E. Frantar, D. Alistarh, "L-GreCo: Layerwise-Adaptive Gradient Compression for
Efficient and Accurate Deep Learning", MLSys 2024, arXiv:2210.17357, algorithm 1. Bounds by Lagrange multipliers: H.
Everett, "Generalized Lagrange Multiplier Method for Solving Problems of Optimum Allocation of Resources", 1963.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thinwire.core import ThinwireError

Table = Sequence[Sequence[float]]
"""One row per parameter, one column per candidate; rows may differ in length."""
SLIP = 1e-9
"""Relative amount by which a sum of floats may exceed the budget."""
RATES = (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)
"""Multiples of the best rate, for lower bounds on the cost of the remaining parameters."""


def undominated(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Return the candidates that no other beats in cost and error, in order of rising cost and falling error."""
    order = sorted(range(len(costs)), key=lambda q: (costs[q], errors[q]))
    kept: list[int] = []
    for q in order:
        if not kept or errors[q] < errors[kept[-1]]:
            kept.append(q)
    return kept


def allocate(costs: Table, errors: Table, budget: float, resolution: int = 10_000) -> list[int] | None:
    """Choose a candidate for each parameter: the least sum of costs with a sum of errors of at most ``budget``.

    It extends partial plans ``(cost, error)`` parameter by parameter. It drops a plan that another beats in both, or
    whose lower bound ``cost + min over plans of the rest of sum(cost_l + rate e_l) - rate * (budget - error)``, for
    any ``rate``, is above the best plan known. So the result is optimal. With more than ``resolution`` partial plans,
    only the cheapest and the least lossy in each of ``resolution`` equal parts of the budget are kept, and the result
    is close to optimal. Errors are never rounded.

    Time and memory grow with ``resolution``. Returns a candidate's index for each parameter, at equal cost the one with
    the smaller error; None if no plan fits.

    Departures: the paper rounds errors to 10,000 parts of the budget and fits the rounded errors.
    """
    if [len(row) for row in costs] != [len(row) for row in errors] or not all(costs):
        raise ThinwireError("costs and errors need a row for each parameter, and a value for each of its candidates")
    if not all(math.isfinite(x) and x >= 0 for table in (costs, errors) for row in table for x in row):
        raise ThinwireError("costs and errors must be finite and at least 0")
    if not 0 <= budget < math.inf or resolution < 1:
        raise ThinwireError(f"budget is {budget} and resolution {resolution}; they must be at least 0 and 1")
    kept = [undominated(*rows) for rows in zip(costs, errors, strict=True)]
    rows = [
        Candidates(np.array([cost[q] for q in one]), np.array([error[q] for q in one]))
        for cost, error, one in zip(costs, errors, kept, strict=True)
    ]
    limit = budget * (1 + SLIP / 2)
    if sum(row.errors[-1] for row in rows) > limit:
        return None
    rate, known = _relaxed(rows, limit)
    spent = sum(row.costs[q] for row, q in zip(rows, known, strict=True))
    found = [known, _least(rows, limit, resolution, rate, spent)]
    plans = [[one[q] for one, q in zip(kept, plan, strict=True)] for plan in found if plan is not None]
    return min(plans, key=lambda plan: (total(costs, plan), total(errors, plan)))


def improve(
    costs: Table, errors: Table, uniform: Sequence[int], slack: float = 1.0, resolution: int = 10_000
) -> list[int]:
    """Return a plan that costs less than ``uniform`` at up to ``slack`` times its error; ``uniform`` if none does."""
    found = allocate(costs, errors, slack * total(errors, uniform), resolution)
    return found if found is not None and total(costs, found) < total(costs, uniform) else list(uniform)


def total(table: Table, plan: Sequence[int]) -> float:
    """Return the sum of a plan's entries."""
    return math.fsum(row[q] for row, q in zip(table, plan, strict=True))


@dataclass(frozen=True)
class Candidates:
    """The candidates of one parameter, none beaten by another: costs rise and errors fall."""

    costs: np.ndarray
    errors: np.ndarray

    def at(self, rate: float) -> int:
        """Return the cheapest candidate if a unit of error costs ``rate``."""
        return int(np.argmin(self.costs + rate * self.errors))

    def bound(self, rate: float) -> float:
        return float(np.min(self.costs + rate * self.errors))


def _relaxed(rows: Sequence[Candidates], limit: float) -> tuple[float, list[int]]:
    """Find the lowest rate at which the cheapest choices fit; returns it and the choices, cheapened while they fit."""
    low, high = 0.0, 1.0

    def plan(rate: float) -> list[int] | None:
        chosen = [row.at(rate) for row in rows]
        return chosen if sum(row.errors[q] for row, q in zip(rows, chosen, strict=True)) <= limit else None

    if (best := plan(low)) is not None:
        return low, best
    while (best := plan(high)) is None and high < 1e300:
        low, high = high, high * 16
    best = best or [len(row.errors) - 1 for row in rows]  # lossless
    for _ in range(60):  # halve the range of the best exchange rate of error for cost
        middle = (low + high) / 2
        if (found := plan(middle)) is None:
            low = middle
        else:
            high, best = middle, found
    room = limit - sum(row.errors[q] for row, q in zip(rows, best, strict=True))
    for i, row in enumerate(rows):
        q = int(np.argmax(row.errors <= row.errors[best[i]] + room))
        room -= row.errors[q] - row.errors[best[i]]
        best[i] = q
    return high, best


def _least(rows: Sequence[Candidates], limit: float, resolution: int, rate: float, known: float) -> list[int] | None:
    """Return the best plan that costs at most ``known``; None if all were dropped."""
    rates = rate * np.array(RATES)
    rest = np.sum([[row.bound(r) for r in rates] for row in rows], axis=0) if rows else rates
    needed = sum(row.errors[-1] for row in rows)
    cost, error = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # for each partial plan, its predecessor and the added candidate
    for row in rows:
        rest = rest - [row.bound(r) for r in rates]
        needed -= row.errors[-1]
        costs, errors = (cost[:, None] + row.costs).ravel(), (error[:, None] + row.errors).ravel()
        least = costs + np.max(rest - rates * (limit - errors)[:, None], axis=1)
        alive = np.flatnonzero((errors + needed <= limit + SLIP * needed) & (least <= known * (1 + SLIP)))
        alive = alive[np.lexsort((errors[alive], costs[alive]))]
        lowest = np.minimum.accumulate(np.concatenate([[np.inf], errors[alive]]))
        alive = alive[errors[alive] < lowest[:-1]]
        if len(alive) > resolution:
            cell = np.floor(errors[alive] / limit * resolution)
            new = np.flatnonzero(np.diff(cell, prepend=-1.0))
            alive = alive[np.union1d(new, np.append(new[1:], len(alive)) - 1)]
        steps.append((alive // len(row.costs), alive % len(row.costs)))
        cost, error = costs[alive], errors[alive]
    if not len(cost):
        return None
    at, chosen = 0, list[int]()  # costs rise
    for before, added in reversed(steps):
        chosen.append(int(added[at]))
        at = int(before[at])
    return chosen[::-1]
