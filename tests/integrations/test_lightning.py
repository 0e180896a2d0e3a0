"""Lightning: the snippet of docs/engines.md, resuming, what is warned of, and the example."""

import os
import warnings
from pathlib import Path

import torch

from tests.integrations.common import (
    batch,
    check,
    check_example,
    environment,
    example,
    facts,
    loads,
    needs,
    small_model,
    snippet,
    written,
)

pytestmark = needs("lightning")
QUIET = 'accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False'


def _module(seed):
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = small_model(seed)

        def training_step(self, *_):
            return self.inner(batch(self.global_rank, self.global_step)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Module()


def _begin(code, seed):
    data = torch.utils.data.DataLoader(range(200))
    names = {"module": _module(seed), "torch": torch, "data": data}
    exec(code.replace("devices=2", f"devices=2, {QUIET}"), names)
    return names


def _run(rank, code, folder, port):
    environment(rank, port)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    os.chdir(folder)
    first = _begin(code, 0)
    ledger = first["wired"].wire.ledger
    first["trainer"].save_checkpoint("run/after.ckpt")
    last = torch.load(f"run/after.ckpt.thinwire/thinwire-rank{rank}-of-2.pt", weights_only=True)
    assert last["step"] == 25
    first["trainer"].strategy.remove_checkpoint("run/after.ckpt")
    first["trainer"].strategy.barrier()
    assert not Path("run/after.ckpt.thinwire").exists()
    saved = written(f"run/step=20.ckpt.thinwire/thinwire-rank{rank}-of-2.pt")
    with loads() as found:
        second = _begin(code.replace("data)", "data, ckpt_path='run/step=20.ckpt')"), 1)
    first["wired"].wire.detach()
    second["wired"].wire.detach()
    return facts(ledger, saved, *found, first["module"], second["module"])


def _clipped(rank, code):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = _begin(code.replace("max_steps=25", "max_steps=1, gradient_clip_val=1.0"), 0)
    names["wired"].wire.detach()
    return any("set gradient_clip_val=None" in str(warning.message) for warning in caught)


def _example(rank, *arguments):
    return example("train_lightning", *arguments)


def test_snippet_checkpoint_and_example(world, tmp_path):
    code = snippet("Lightning")
    check(world.run(_run, code, str(tmp_path), world.port, timeout=120.0))
    assert world.run(_clipped, code) == [True, False]
    arguments = ("--steps", "20", "--hidden", "32", "--folder", str(tmp_path / "example"))
    check_example("train_lightning", world.run(_example, *arguments))
