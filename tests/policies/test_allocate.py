"""The dynamic programme, against all plans there are (spec 18.6)."""

from itertools import product

import numpy as np
import pytest

from thinwire.core.errors import ThinwireError
from thinwire.policies.allocate import allocate, improve, total, undominated


def instance(seed, layers=5, candidates=5):
    """Random tables, errors falling as costs rise but for some, and a uniform plan."""
    random = np.random.default_rng(seed)
    costs = random.integers(1, 1000, (layers, candidates)).astype(float)
    errors = random.random((layers, candidates)) * 10.0 ** random.integers(-1, 2, (layers, 1))
    if seed % 4:
        costs, errors = np.sort(costs, 1), -np.sort(-errors, 1)
    return costs.tolist(), errors.tolist(), [candidates // 2] * layers


def best(costs, errors, budget):
    plans = product(*(range(len(row)) for row in costs))
    return min((total(costs, plan) for plan in plans if total(errors, plan) <= budget), default=None)


def test_against_brute_force():
    for seed in range(200):
        costs, errors, uniform = instance(seed)
        budget = total(errors, uniform)
        plan = improve(costs, errors, uniform)
        assert total(errors, plan) <= budget * (1 + 1e-9)
        assert total(costs, plan) <= total(costs, uniform)
        assert total(costs, plan) <= best(costs, errors, budget), f"instance {seed}"


def test_few_partial_plans_cost_little():
    for seed in range(10):
        costs, errors, uniform = instance(seed, 30, 12)
        budget = total(errors, uniform)
        exact, thinned = (allocate(costs, errors, budget, resolution) for resolution in (10**6, 50))
        assert total(errors, thinned) <= budget * (1 + 1e-9)
        assert total(costs, exact) <= total(costs, thinned) <= 1.05 * total(costs, exact)


def test_one_parameter_takes_the_cheapest_that_fits():
    assert allocate([[5.0, 3.0, 1.0]], [[0.1, 0.5, 0.9]], 0.5) == [1]
    assert allocate([[5.0, 3.0, 1.0]], [[0.1, 0.5, 0.9]], 0.05) is None


@pytest.mark.parametrize("resolution", [10, 100, 10_000])
def test_parameters_alike_stay_uniform(resolution):
    """Rounding would make them dearer; the uniform plan is kept."""
    costs, errors = [[9.0, 4.0, 1.0]] * 7, [[0.1, 0.3001, 0.9]] * 7
    plan = improve(costs, errors, [1] * 7, resolution=resolution)
    assert total(costs, plan) <= 28.0
    flat = [[float(q) for q in (8, 4, 2, 1)]] * 6, [[1.0, 2.0, 4.0, 8.0]] * 6  # convex: nothing is gained by mixing
    assert improve(*flat, [1] * 6, resolution=resolution) == [1] * 6


def test_more_room_and_more_candidates_never_cost_more():
    for seed in range(20):
        costs, errors, uniform = instance(seed, 8, 6)
        spent = [total(costs, improve(costs, errors, uniform, slack)) for slack in (1.0, 2.0, 4.0)]
        assert spent == sorted(spent, reverse=True)
        fewer = total(costs, improve([row[:4] for row in costs], [row[:4] for row in errors], uniform))
        assert spent[0] <= fewer


def test_ties_go_to_the_smaller_error():
    assert allocate([[2.0, 2.0, 3.0]], [[0.5, 0.4, 0.1]], 1.0) == [1]
    assert undominated([2.0, 2.0, 3.0, 9.0], [0.5, 0.4, 0.1, 0.2]) == [1, 2]
    assert allocate([[1.0, 1.0], [1.0, 1.0]], [[0.2, 0.1], [0.3, 0.3]], 1.0) == [1, 0]


def test_no_error_is_allowed_where_the_budget_is_none():
    assert allocate([[4.0, 1.0]] * 3, [[0.0, 0.1]] * 3, 0.0) == [0, 0, 0]
    assert allocate([], [], 1.0) == []


@pytest.mark.parametrize(
    ("costs", "errors", "budget", "resolution"),
    [
        ([[1.0]], [[1.0, 2.0]], 1.0, 10),
        ([[]], [[]], 1.0, 10),
        ([[1.0]], [[float("nan")]], 1.0, 10),
        ([[-1.0]], [[1.0]], 1.0, 10),
        ([[1.0]], [[1.0]], float("inf"), 10),
        ([[1.0]], [[1.0]], 1.0, 0),
    ],
)
def test_bad_tables(costs, errors, budget, resolution):
    with pytest.raises(ThinwireError, match=r"must be|need a row"):
        allocate(costs, errors, budget, resolution)
