"""Accelerate: the snippet of docs/engines.md, its checkpoints, mixed precision, and the example."""

import pytest
import torch

import thinwire
from tests.integrations.common import (
    MORE,
    STEPS,
    batch,
    check,
    check_example,
    environment,
    example,
    facts,
    flat,
    memory,
    needs,
    small_model,
    snippet,
)

pytestmark = needs("accelerate")


def _begin(code, seed):
    names = {"model": small_model(seed), "torch": torch}
    exec(code, names)
    return names


def _train(names, rank, steps):
    for step in steps:
        names["accelerator"].backward(names["model"](batch(rank, step)).square().mean())
        names["optimizer"].step()
        names["optimizer"].zero_grad()


def _run(rank, code, folder, port):
    environment(rank, port)
    first = _begin(code, 0)
    _train(first, rank, range(STEPS))
    first["accelerator"].save_state(folder)
    saved = memory(first["wire"])
    _train(first, rank, range(STEPS, STEPS + MORE))
    ledger = first["wire"].ledger
    first["wire"].detach()
    second = _begin(code, 1)
    second["accelerator"].load_state(folder)
    loaded = memory(second["wire"])
    _train(second, rank, range(STEPS, STEPS + MORE))
    second["wire"].detach()
    return facts(ledger, saved, loaded, first["model"], second["model"])


def _handled(rank, code):
    """Attached inside ``prepare``."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from thinwire.integrations.accelerate import DdpHandler

    accelerator, model = Accelerator(), small_model(0)
    with pytest.raises(thinwire.ThinwireError, match=r"ask for the hook .*fp16"):
        DdpHandler(accelerator, thinwire.dgc(0.01), arguments=DistributedDataParallelKwargs(comm_hook="fp16"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    names = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "thinwire": thinwire}
    arguments = "arguments=DistributedDataParallelKwargs(gradient_as_bucket_view=True), "
    names["DistributedDataParallelKwargs"] = DistributedDataParallelKwargs
    exec(code.replace("optimizer=", arguments + "optimizer="), names)
    assert names["model"].gradient_as_bucket_view
    with pytest.raises(thinwire.ThinwireError, match="has a DdpHandler"):
        DdpHandler(accelerator, thinwire.dgc(0.01))
    _train(names, rank, range(STEPS))
    wire = names["wire"]
    wire.detach()
    return flat(names["model"]), (wire.ledger.wire_bytes, wire.ledger.dense_bytes)


def _refused(rank, code, folder):
    names = _begin(code, 0)
    with pytest.raises(thinwire.ThinwireError, match="the checkpoint was saved without an attached session"):
        names["accelerator"].load_state(folder)
    names["wire"].detach()


def _mixed(rank, precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from thinwire.integrations.accelerate import attach

    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", gradient_accumulation_steps=2)
    if precision == "fp16":  # Accelerate has fp16 on accelerators alone; its scaler does what it does there
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model = small_model(0)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    wire = attach(accelerator, model, thinwire.topk(0.02), optimizer=optimizer)
    for step in range(8):
        with accelerator.accumulate(model):
            loss = model(batch(rank, step)).square().mean()
            accelerator.backward(loss * float("inf") if (precision, step, rank) == ("fp16", 5, 1) else loss)
            optimizer.step()
            optimizer.zero_grad()
    steps, skipped = wire.step, wire.ledger.skipped
    wire.detach()
    return flat(model), steps, skipped


def test_snippet_checkpoint_and_example(world, tmp_path):
    code = snippet("Accelerate")
    check(world.run(_run, code, str(tmp_path / "saved"), world.port, timeout=120.0))
    assert {path.name for path in (tmp_path / "saved").glob("thinwire*")} == {
        "thinwire-rank0-of-2.pt",
        "thinwire-rank1-of-2.pt",
    }
    (one, (sent, dense)), (other, _) = world.run(_handled, snippet("Accelerate", 1))
    assert torch.equal(one, other)
    assert sent < dense / 3
    for path in (tmp_path / "saved").glob("thinwire*"):
        path.unlink()
    world.run(_refused, code, str(tmp_path / "saved"))
    for precision, expected in (("bf16", (4, 0)), ("fp16", (3, 1))):
        (one, *counts), (other, _, _) = world.run(_mixed, precision)
        assert torch.equal(one, other)
        assert tuple(counts) == expected
    arguments = ("--steps", "20", "--hidden", "32", "--folder", str(tmp_path / "example"))
    check_example("train_accelerate", world.run(_example, *arguments))
    assert "from step 20" in world.run(_example, *arguments[2:], "--steps", "22", "--resume")[0]


def _example(rank, *arguments):
    return example("train_accelerate", *arguments)
