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


def _misused(rank):
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from thinwire.integrations.accelerate import DdpHandler

    accelerator = Accelerator()
    with pytest.raises(thinwire.ThinwireError, match=r"ask for the hook .*fp16"):
        DdpHandler(accelerator, thinwire.cast(), arguments=DistributedDataParallelKwargs(comm_hook="fp16"))
    with pytest.raises(thinwire.ThinwireError, match=r"accelerator.ddp_handler = None first"):
        DdpHandler(Accelerator(kwargs_handlers=[DistributedDataParallelKwargs()]), thinwire.cast())
    before = accelerator.distributed_type
    accelerator.state.distributed_type = type(before).FSDP
    with pytest.raises(thinwire.ThinwireError, match=r"\(FSDP\) does not wrap models in DDP"):
        DdpHandler(accelerator, thinwire.cast())
    accelerator.state.distributed_type = before
    arguments = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handler = DdpHandler(accelerator, thinwire.cast(), arguments=arguments)
    with pytest.raises(thinwire.ThinwireError, match="no model has been prepared"):
        handler.wire  # noqa: B018
    assert accelerator.prepare(small_model(0)).gradient_as_bucket_view
    with pytest.raises(thinwire.ThinwireError, match="this is the second"):
        accelerator.prepare(small_model(1))
    handler.wire.detach()


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
    inside = code.split("model, optimizer = accelerator.prepare")[0] + snippet("Accelerate", 1)
    check(world.run(_run, inside, str(tmp_path / "inside"), world.port, timeout=120.0))
    world.run(_misused)
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
