import math

import numpy as np
import pytest
import torch

from thinwire.compressors.sampling import plan_sample, select_by_sample
from thinwire.compressors.sparse import TopK
from thinwire.compressors.threshold import SIDCo
from thinwire.core import Context
from thinwire.core.errors import ThinwireError
from thinwire.kernels.reference import REFERENCE

CTX = Context(seed=0, step=0, unit="w", rank=0)


def by_threshold(magnitude, k, row, ctx, **options):
    chosen, values = select_by_sample(magnitude, plan_sample(magnitude.numel(), k, row, ctx, **options), REFERENCE)
    assert torch.equal(values.nan_to_num(), magnitude[chosen].nan_to_num())
    return chosen


def oracle(magnitude: torch.Tensor, k: int) -> list[int]:
    """Stable sort in NumPy: among equal magnitudes the lower index wins."""
    return sorted(np.argsort(-magnitude.double().numpy(), kind="stable")[:k].tolist())


@pytest.mark.parametrize("k", [0, 1, 7, 99, 100, 200])
@pytest.mark.parametrize("levels", [2, 5, None])
def test_largest_against_numpy(k, levels):
    magnitude = torch.rand(100) if levels is None else torch.randint(0, levels, (100,)).float()
    assert REFERENCE.largest(magnitude, k).tolist() == oracle(magnitude, min(k, 100))


def test_sampled_sends_at_most_k_and_at_least_four_fifths():
    magnitude = torch.randn(400_000).abs()
    for step in range(10):
        ctx = Context(0, step, "w", 0)
        chosen = by_threshold(magnitude, 400, 1, ctx, ratio=0.01, lower=0.8, attempts=10)
        assert 0.8 * 400 <= chosen.numel() <= 400
        assert torch.equal(chosen, chosen.sort().values)


def test_surplus_is_cut_by_magnitude_not_by_position():
    magnitude = torch.zeros(200_000)
    magnitude[100_000:] = torch.rand(100_000) + 1.0  # all that matters stands at the end
    magnitude[-50:] = 10.0
    chosen = by_threshold(magnitude, 100, 1, CTX, ratio=0.01, lower=0.8, attempts=10)
    assert set(range(199_950, 200_000)) <= set(chosen.tolist())


def test_every_position_is_favoured_alike():
    counts = torch.zeros(10)
    for step in range(40):
        magnitude = torch.randn(100_000, generator=torch.Generator().manual_seed(step)).abs()
        chosen = by_threshold(magnitude, 1000, 1, Context(0, step, "w", 0), ratio=0.01, lower=0.8, attempts=10)
        counts += torch.bincount(chosen // 10_000, minlength=10)
    share = counts / counts.sum()
    assert (share - 0.1).abs().max() < 0.01  # the reference code gives 10.4 % to the first and 8.0 % to the last


def test_sample_is_redrawn_each_step_and_crosses_rows():
    magnitude = torch.zeros(512, 512)
    magnitude[:, 3] = 1.0  # one column: a stride that follows the rows would see all of it or nothing
    for step in range(5):
        chosen = by_threshold(
            magnitude.view(-1), 512, 512, Context(0, step, "w", 0), ratio=0.05, lower=0.8, attempts=10
        )
        assert set((chosen % 512).tolist()) == {3}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 5, 60])
def test_what_is_not_finite_is_selected_first_and_never_more_than_k(value, count):
    magnitude = torch.rand(4000)
    magnitude[torch.randperm(4000)[:count]] = value
    for chosen in (
        REFERENCE.largest(magnitude, 20),
        by_threshold(magnitude, 20, 1, CTX, ratio=0.01, lower=0.8, attempts=5),
    ):
        assert chosen.numel() <= 20
        assert (~magnitude[chosen].isfinite()).sum() == min(count, chosen.numel())


@pytest.mark.parametrize("p", [0.2, 0.01, 0.001])
def test_one_exponential_stage_meets_the_density_on_laplace_data(p):
    n, rounds = 20_000, 50
    exponential = torch.distributions.Exponential(1.0)
    counts = []
    for _ in range(rounds):
        magnitude = exponential.sample((n,))
        counts.append(int((magnitude >= SIDCo(p, stages=1).threshold(magnitude, p)).count_nonzero()))
    mean = torch.tensor(counts, dtype=torch.float64)
    # the mean that is fitted adds its own error to that of the counts
    expected_spread = (p * (1 - p) * n + n * (p * math.log(p)) ** 2) ** 0.5
    assert abs(mean.mean() - p * n) < 5 * expected_spread / rounds**0.5


def test_more_values_than_a_message_holds_are_refused():
    with pytest.raises(ThinwireError, match=r"3 values for a message of 2, of 20 elements"):
        TopK(0.1).encode(torch.tensor([1, 2, 3]), torch.ones(3), 20, CTX)


def test_what_is_sent_of_fewer_than_a_message_holds_is_what_arrives():
    compressor, like = TopK(0.1), torch.empty(100)
    chosen, values = torch.tensor([1, 2, 30]), torch.tensor([1.0, -2.0, 3.0])
    payload = compressor.encode(chosen, values, 100, CTX)
    own, got = (torch.zeros(100) for _ in range(2))
    compressor.own(payload, chosen, like, {}, CTX).add_to(own)
    compressor.decompress(payload, like, {}, CTX).add_to(got)
    assert torch.equal(own, got)
    assert torch.equal(own[chosen], values)
    assert 0 < sum(t.nbytes for t in payload) < like.nbytes
