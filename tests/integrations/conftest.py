import pytest

from tests.world import World, free_port


@pytest.fixture
def world():
    """Processes of this framework alone: each has its own ideas of a process group."""
    world = World(2)
    world.port = free_port()
    yield world
    world.stop()
