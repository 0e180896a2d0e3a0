"""Mixed precision, and checkpoints that go on bit for bit."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import thinwire
from tests.engines.models import flat_parameters
from tests.gpu.training import CUDA, DEVICE, METHODS, apart, attached, build, data, loss_of, simulated, train

SHORT = torch.float16 if CUDA else torch.bfloat16
SCALE = 2.0**10


def states(wire):
    return {f"{u}/{key}": x.clone() for u, state in wire.workers[0].local.items() for key, x in state.now.items()}


@pytest.mark.parametrize("name", ["topk", "dgc", "powersgd"])
@pytest.mark.parametrize("where", ["ddp", "bare"])
def test_a_scaler_leaves_out_a_step_and_nothing_else(group, where, name):
    """Autocast with a loss scale; one gradient overflows, and that step never happened."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE, growth_interval=1000)
    model, optimizer, wire = attached(where, name, scaler=scaler)
    start, nonfinite = flat_parameters(model).cpu(), False
    named = dict(model.named_parameters())
    param = next(p for n, p in named.items() if n.endswith("first.weight"))
    param.register_hook(lambda g: torch.full_like(g, torch.inf) if nonfinite else None)
    for step in range(13):
        nonfinite = step == 5
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=SHORT):
            loss = loss_of(model, data(0, step - (step > 5)))
        before = flat_parameters(model), states(wire), scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat_parameters(model), before[0]) == nonfinite
        if nonfinite:
            assert all(torch.equal(x, before[1][key]) for key, x in states(wire).items())
        assert scaler.get_scale() == before[2] * (0.5 if nonfinite else 1.0)
    assert wire.ledger.skipped == 1
    assert wire.ledger.rows[0].error > 0
    found = flat_parameters(model).cpu()
    wire.detach()
    assert apart(found, simulated(name), start) < 0.5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["ddp", "bare"])
def test_autocast_in_bfloat16(group, where, name):
    model, optimizer, wire = attached(where, name)
    start = flat_parameters(model).cpu()
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = loss_of(model, data(0, step))
        loss.backward()
        optimizer.step()
    found = flat_parameters(model).cpu()
    wire.detach()
    assert apart(found, simulated(name), start) < (1.5 if name in ("qsgd", "signsgd") else 0.6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_few_bits(group, dtype):
    """A model whose parameters are of that dtype: the kernel reads the gradients as they are."""
    model, optimizer = build(lr=0.01)
    start = flat_parameters(model).cpu()
    model.to(dtype)
    wire = thinwire.attach(model, METHODS["dgc"], optimizer=optimizer, process_group=dist.group.WORLD)
    for step in range(12):
        optimizer.zero_grad()
        x = data(0, step)
        (model(x.to(dtype)).float() - x.mean((2, 3)).sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    found, error = flat_parameters(model).float().cpu(), wire.ledger.rows[0].error
    wire.detach()
    assert error > 0
    assert found.isfinite().all()
    assert (found - start).norm() > 0


@pytest.mark.parametrize("name", ["topk", "dgc", "powersgd", "signsgd"])
@pytest.mark.parametrize("how", ["torch.save", "through the CPU", "dcp"])
def test_a_checkpoint_goes_on_bit_for_bit(group, tmp_path, how, name):
    model, optimizer, wire = attached("bare", name)
    train(model, optimizer, 6)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if how == "dcp":
        dcp.save({"model": model.state_dict(), "wire": wire}, checkpoint_id=str(tmp_path / "dcp"))
        torch.save(saved, tmp_path / "file")
    else:
        torch.save({**saved, "wire": wire.state_dict()}, tmp_path / "file")
    expected = train(model, optimizer, 6, first=6)
    remembered = states(wire)
    wire.detach()
    model, optimizer, wire = attached("bare", name)
    location = "cpu" if how == "through the CPU" else DEVICE
    loaded = torch.load(tmp_path / "file", map_location=location, weights_only=True)
    if how == "dcp":
        dcp.load({"model": model.state_dict(), "wire": wire}, checkpoint_id=str(tmp_path / "dcp"))
    else:
        model.load_state_dict(loaded["model"])
        wire.load_state_dict(loaded["wire"])
    optimizer.load_state_dict(loaded["optimizer"])
    found = train(model, optimizer, 6, first=6)
    after = states(wire)
    wire.detach()
    assert torch.equal(found, expected)
    assert after.keys() == remembered.keys()
    assert all(torch.equal(after[key], x) for key, x in remembered.items())
    assert any(x.any() for x in after.values())
