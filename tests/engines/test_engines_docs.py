"""The snippets of docs/engines.md on DDP, FSDP2 and no wrapper, and the example of FSDP2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
ENGINES = ["DistributedDataParallel", "FSDP2", "No wrapper"]
FRAMEWORKS = ["Accelerate", "Hugging Face Trainer", "Lightning", "torchrun", "Ray Train", "torchft"]


def _snippet(rank, code):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 100), nn.Tanh(), nn.Linear(100, 100))
    names = {"model": model, "torch": torch}
    exec(code, names)
    wire, optimizer, run = names["wire"], names["optimizer"], names.get("ddp", model)
    for step in range(20):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2 * step + rank))
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sent = wire.ledger.wire_bytes, wire.ledger.dense_bytes
    saved = wire.state_dict()
    wire.load_state_dict(saved)
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    wire.detach()
    return torch.cat([part.detach().flatten() for part in parts]), sent


def test_snippets(world2):
    sections = (ROOT / "docs" / "engines.md").read_text().split("\n## ")[1:]
    assert [section.split("\n")[0] for section in sections] == ENGINES + FRAMEWORKS
    for section in sections[: len(ENGINES)]:
        (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        (one, (sent, plain)), (other, _) = world2.run(_snippet, code, timeout=120.0)
        assert torch.equal(one, other)
        assert sent < plain / 3


def test_the_example_of_fsdp2(tmp_path):
    assert len((ROOT / "examples" / "train_fsdp2.py").read_text().splitlines()) < 120
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "examples/train_fsdp2.py"]
    command += ["--shards", "2", "--steps", "20", "--width", "32", "--layers", "1", "--folder", str(tmp_path / "saved")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "last loss" in done.stdout
    assert float(re.search(r"ratio of the compressed units *\| ([\d.,]+)", done.stdout)[1]) > 10
    assert (tmp_path / "saved" / ".metadata").exists()
