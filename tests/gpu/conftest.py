"""These tests need CUDA. ``THINWIRE_TEST_DEVICE=cpu`` tries what of them a machine without it can run."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.gpu.training import CUDA, DEVICE

if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    missing = CUDA and not torch.cuda.is_available()
    for item in items:
        if "tests/gpu/" not in item.nodeid:
            continue
        if missing:
            item.add_marker(pytest.mark.skip(reason="no CUDA here; `make gpu` runs it where there is"))
        elif not CUDA and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="it needs CUDA itself"))


@pytest.fixture(autouse=True)
def _at_once():
    """Errors of the device are raised in the test that made them."""
    yield
    if CUDA and torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone, on NCCL where there is CUDA."""
    options = {"backend": "nccl", "device_id": torch.device("cuda", 0)} if CUDA else {"backend": "gloo"}
    dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="the CUDA kernels need triton")
    from thinwire.kernels.select import choose

    return choose("cuda", torch.device(DEVICE))[0]
