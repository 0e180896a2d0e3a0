import logging
import os
import shutil
import subprocess

import pytest
import torch

from tests.world import World

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by the tests of its kernels


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    logging.getLogger("thinwire").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as the ranks of a world, whose sums must be those of a simulator


@pytest.fixture(scope="session")
def _worlds():
    worlds = {2: World(2), 4: World(4)}
    yield worlds
    for world in worlds.values():
        world.stop()


@pytest.fixture(scope="module")
def world2(_worlds):
    yield _worlds[2]
    _worlds[2].stop_if_crowded()


@pytest.fixture(scope="module")
def world4(_worlds):
    yield _worlds[4]
    _worlds[4].stop_if_crowded()


@pytest.fixture
def chromium(tmp_path):
    """``chromium(page)`` opens a file in a headless browser; answers its DOM and what it wrote to the console."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here; Debian's package chromium makes this test run")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

    def opened(page):
        done = subprocess.run(
            [program, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--no-first-run", "--disable-quic",
             "--enable-logging=stderr",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    return opened
