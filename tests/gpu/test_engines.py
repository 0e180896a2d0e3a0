"""Every engine trains on one NCCL rank as the simulator does, by methods of every kind."""

import pytest
import torch

from tests.engines import sharded
from tests.engines.models import flat_parameters
from tests.gpu.training import (
    CUDA,
    DEVICE,
    DRAWN,
    METHODS,
    apart,
    build,
    sharded_sgd,
    sharded_simulated,
    sharded_trained,
    simulated,
    train,
    trained,
)


def check(name, parameters, facts, plain, simulations, start):
    """Of a run: it ends where it must, was sent in fewer bytes than dense, and lost something.

    Args:
        simulations: on this device, and on the CPU.
    """
    if name == "dense":
        assert apart(parameters, plain, start) < 1e-5
    assert apart(parameters, simulations[0], start) < 1e-3
    assert apart(parameters, simulations[1], start) < (1.5 if name in DRAWN else 0.2)
    dense = 4 * parameters.numel()
    assert facts["skipped"] == 0
    if name != "dense":
        assert 0 < facts["sent"] < 0.7 * dense
        assert facts["error"] > 0
    if name in ("topk", "dgc"):
        assert "cuda" in facts["kernels"] or not CUDA, facts["notes"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["ddp", "bare"])
def test_one_rank_is_the_simulator(group, where, name):
    parameters, facts = trained(0, where, name)
    start = flat_parameters(build()[0]).cpu()
    plain = train(*build())
    check(name, parameters, facts, plain, [simulated(name), simulated(name, device="cpu")], start)


@pytest.mark.parametrize("name", METHODS)
def test_one_shard_is_the_simulator(group, name):
    parameters, facts = sharded_trained(0, 1, 1, name)
    torch.manual_seed(0)
    model = sharded.Net()
    start = sharded.whole(model)
    optimizer = sharded_sgd(model.to(DEVICE), name)
    for step in range(12):
        sharded.loss_of(model, sharded.data(0, step).to(DEVICE)).backward()
        optimizer.step()
        optimizer.zero_grad()
    simulations = [sharded_simulated(name), sharded_simulated(name, device="cpu")]
    check(name, parameters, facts, sharded.whole(model).cpu(), simulations, start)


@pytest.mark.parametrize("kind", ["reference", "auto"])
def test_all_kernels_train_alike(group, kind):
    parameters, facts = trained(0, "bare", "dgc", kernels=kind)
    assert ("cuda" in facts["kernels"]) == (kind == "auto" and CUDA)
    expected = simulated("dgc", kernels="reference")
    assert apart(parameters, expected, flat_parameters(build()[0]).cpu()) < 1e-3
