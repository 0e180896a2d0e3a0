"""What the tests of the frameworks share. Frameworks are imported in the children alone: it takes them seconds."""

import contextlib
import importlib.util
import io
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
STEPS, MORE = 20, 5


def needs(*modules):
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: pip install 'thinwire[frameworks]'")


def snippet(heading: str, number: int = 0) -> str:
    """A Python block under a heading of docs/engines.md."""
    text = (ROOT / "docs" / "engines.md").read_text()
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]


def environment(rank: int, port: int) -> None:
    """What torchrun would have set, and a machine without accelerators."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in found.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.modules.setdefault("numba", None)  # kernels take 4 s to compile in each process, and others test them


def small_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64))


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(2 * step + rank))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def memory(wire) -> torch.Tensor:
    """All that this rank remembers, in one vector."""
    states = [wire.workers[0].local[unit.name].now for unit in wire.units]
    return torch.cat([state[key].detach().flatten().clone() for state in states for key in sorted(state)])


def example(name: str, *arguments: str) -> str:
    """What a script of examples/ prints when it is started here, as ``__main__``."""
    before, printed = sys.argv, io.StringIO()
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
    return printed.getvalue()


def written(path: str) -> torch.Tensor:
    """What ``memory`` was when this file was saved."""
    local = torch.load(path, weights_only=True)["local"]
    return torch.cat([state[key].flatten() for state in local.values() for key in sorted(state)])


@contextlib.contextmanager
def loads():
    """Collects what is remembered just after each load, while the framework loads by itself."""
    from thinwire.integrations import per_rank_files

    found, load = [], per_rank_files.load
    per_rank_files.load = lambda wire, *rest: (load(wire, *rest), found.append(memory(wire)))
    try:
        yield found
    finally:
        per_rank_files.load = load


def facts(ledger, saved, loaded, unbroken: nn.Module, resumed: nn.Module) -> dict:
    """What ``check`` asks of a rank."""
    sent = {"sent": ledger.wire_bytes, "dense": ledger.dense_bytes}
    return sent | {"saved": saved, "loaded": loaded, "unbroken": flat(unbroken), "resumed": flat(resumed)}


def check(results: list[dict]) -> None:
    """What must be true of a run of ``STEPS + MORE`` steps, and of one resumed after ``STEPS``, on two ranks."""
    one, two = results
    for result in results:
        assert result["sent"] < result["dense"] / 3
        assert torch.equal(result["saved"], result["loaded"])  # no rank's memory is lost, or another's
        assert result["saved"].norm() > 0
        assert torch.equal(result["resumed"], result["unbroken"])
    assert torch.equal(one["unbroken"], two["unbroken"])
    assert not torch.equal(one["saved"], two["saved"])


def check_example(name: str, printed: list[str]) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 120
    assert float(re.search(r"ratio of the compressed units *\| ([\d.,]+)", printed[0])[1].replace(",", "")) > 3
