"""The simulator alone; that it equals the real run is tested with the engine."""

import pytest
import torch
from torch import nn

import thinwire
from tests.engines.models import batch, build, flat_parameters, loss_of, simulated
from thinwire import ThinwireError, dense, dgc, topk


@pytest.mark.parametrize("workers", [1, 3])
def test_dense_is_sgd_on_the_whole_batch(workers):
    got, _ = simulated(dense(), workers, 8)
    model, optimizer = build()
    for step in range(8):
        optimizer.zero_grad()
        sum(loss_of(model, batch(worker, step)) for worker in range(workers)).div(workers).backward()
        optimizer.step()
    torch.testing.assert_close(got, flat_parameters(model), rtol=1e-4, atol=1e-6)


def test_many_workers_send_less_and_still_learn():
    _, result = simulated(topk(0.05), 16, 30)
    assert result.ledger.ratio > 1.2
    assert result.ledger.rows[0].error > 0
    assert result.losses[-1] < result.losses[0]


def test_buffers_follow_the_first_worker():
    def trained(workers):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        thinwire.simulate(
            model,
            dense(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            batches=lambda worker, step: torch.randn(16, 8, generator=torch.Generator().manual_seed(worker)),
            loss=lambda m, x: m(x).sum(),
            workers=workers,
            steps=3,
        )
        return model[1]

    alone, three = trained(1), trained(3)
    assert torch.equal(alone.running_mean, three.running_mean)
    assert three.num_batches_tracked == 3


def test_the_optimizer_is_left_as_it_was():
    model, optimizer = build(nesterov=True, weight_decay=0.1)
    thinwire.simulate(
        model, dgc(0.1), optimizer=optimizer, batches=batch, loss=loss_of, workers=2, steps=2
    )  # fmt: skip
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0.1)


def test_no_workers():
    with pytest.raises(ThinwireError, match="workers is 0"):
        simulated(dense(), 0, 1)
