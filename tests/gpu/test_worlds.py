"""Several ranks: on all GPUs by NCCL, and two on one GPU by gloo, which carries tensors of a GPU through the host."""

import pytest
import torch
import torch.distributed as dist

from tests.engines import sharded
from tests.engines.models import flat_parameters
from tests.gpu.training import (
    CUDA,
    DEVICE,
    DRAWN,
    METHODS,
    apart,
    build,
    sharded_simulated,
    sharded_trained,
    simulated,
    trained,
)
from tests.world import World

GPUS = torch.cuda.device_count() if CUDA else 0


@pytest.fixture(scope="module")
def several():
    """NCCL wants a GPU for each rank."""
    if GPUS < 2:
        pytest.skip(f"it needs 2 GPUs, here are {GPUS}")
    world = World(min(GPUS, 8), "nccl")
    yield world
    world.stop()


def _carries(rank):
    """What gloo itself can do with tensors on the device; the first thing that fails."""
    for what in (dist.all_reduce, dist.broadcast):
        x = torch.ones(5, device=DEVICE)
        work = what(x, async_op=True) if what is dist.all_reduce else what(x, 0, async_op=True)
        try:
            work.get_future().wait()
        except RuntimeError as error:
            return f"{what.__name__}: {error}"
    x, out = torch.ones(5, device=DEVICE), torch.empty(10, device=DEVICE)
    try:
        dist.all_gather_into_tensor(out, x, async_op=True).get_future().wait()
    except RuntimeError as error:
        return f"all_gather_into_tensor: {error}"
    return ""


@pytest.fixture(scope="module")
def pair():
    """Two ranks of gloo that share a GPU."""
    world = World(2, "gloo")
    try:
        why = world.run(_carries, timeout=120.0)[0]
    except (AssertionError, TimeoutError) as error:
        why = str(error)
    if why:
        world.stop()
        pytest.skip(f"gloo does not carry what DDP needs: {why:.300}")
    yield world
    world.stop()


def check(results, name, expected, start, shards=1):
    """Where a bucket is cut into pieces, or a parameter into shards, other elements are chosen or drawn."""
    parameters, facts = results[0]
    for other, _ in results[1:]:
        assert torch.equal(parameters, other), "replicas drifted apart"
    alike = name == "dense" or (shards == 1 and name not in DRAWN)
    assert apart(parameters, expected, start) < (1e-3 if alike else 1.5)
    if name != "dense":
        assert 0 < facts["wire"] < 0.7 * facts["dense"]
        assert facts["error"] > 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["ddp", "bare"])
def test_two_ranks_on_one_gpu(pair, where, name):
    start = flat_parameters(build()[0]).cpu()
    check(pair.run(trained, where, name, timeout=150.0), name, simulated(name, 2), start)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["ddp", "bare"])
def test_a_rank_on_each_gpu(several, where, name):
    start = flat_parameters(build()[0]).cpu()
    check(several.run(trained, where, name, timeout=150.0), name, simulated(name, several.size), start)


@pytest.mark.parametrize("name", METHODS)
def test_replicas_of_shards(several, name):
    torch.manual_seed(0)
    start = sharded.whole(sharded.Net())
    shards = several.size // 2
    results = several.run(sharded_trained, 2, shards, name, timeout=150.0)
    check(results, name, sharded_simulated(name, 2, groups=shards), start, shards)
