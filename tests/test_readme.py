"""What the documentation shows runs."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import thinwire
from thinwire.core import registry

ROOT = Path(__file__).parents[1]


def _readme(rank, code):
    lines = []
    namespace = {"print": lines.append}
    exec(code, namespace)
    namespace["wire"].detach()
    return "\n".join(lines)


def test_the_diff(world2):
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = "\n".join(line[1:] for line in diff.splitlines())
    code = code.replace('dist.init_process_group("gloo")', "")  # the worlds of the tests have done it
    for report in world2.run(_readme, code):
        ratio = float(re.search(r"ratio of the compressed units *\| ([\d.,]+)", report)[1])
        assert ratio > 300


def test_from_deepspeed(world2):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "from-deepspeed.md").read_text(), re.DOTALL)[1]
    for report in world2.run(_readme, code):
        assert "the variance is frozen after 10 steps" in report


PLACES = (
    thinwire.core, thinwire.compressors, thinwire.memories, thinwire.methods, thinwire.optim, thinwire.policies,
    thinwire,
)  # fmt: skip


def test_examples_in_docstrings(monkeypatch):
    monkeypatch.setattr(registry, "COMPRESSORS", dict(registry.COMPRESSORS))  # an example registers one
    names = {
        "torch": torch,
        "thinwire": thinwire,
        **{name: getattr(place, name) for place in PLACES for name in place.__all__},
    }
    tried = 0
    for module in pkgutil.walk_packages(thinwire.__path__, "thinwire."):
        if not module.name.endswith("__main__"):
            result = doctest.testmod(importlib.import_module(module.name), extraglobs=names)
            assert result.failed == 0, module.name
            tried += result.attempted
    assert tried >= 8


@pytest.mark.parametrize(
    ("name", "options"), [("train_ddp.py", ["--hidden", "32"]), ("train_diloco.py", ["--every", "5", "--width", "32"])]
)
def test_the_examples_under_torchrun(name, options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / name), "--steps", "12", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert "ratio of the compressed units" in done.stdout


def test_commands_and_files_named_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:src|docs|benchmarks|examples)/[\w/.]+)`", readme):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"^make (\w+)", readme, re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()
