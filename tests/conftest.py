import logging

import pytest
import torch

from tests.world import World


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    logging.getLogger("thinwire").setLevel(logging.ERROR)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world2():
    world = World(2)
    yield world
    world.stop()


@pytest.fixture(scope="session")
def world4():
    world = World(4)
    yield world
    world.stop()
