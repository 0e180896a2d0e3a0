"""What users do between backward and step, and with their optimizers."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import batch, build, flat_parameters, loss_of
from tests.engines.test_control import start as begin
from tests.engines.test_ddp import SMALL_BUCKETS
from tests.engines.test_safety import Experts, states
from thinwire import ThinwireError, Warmup, dense, dgc, scalecom, topk
from thinwire.engines.names import sparse_weights
from thinwire.exchange.status import StepStatus
from thinwire.methods import randk
from thinwire.report.ledger import Ledger
from thinwire.session.transaction import Transaction


def start(method, **options):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    return model, optimizer, ddp, thinwire.attach(ddp, method, optimizer=optimizer, **options)


def poison(model):
    return model.middle.weight.register_hook(lambda g: g * float("nan"))


def _between(rank):
    model, optimizer, ddp, wire = start(dgc(0.05))
    loss_of(ddp, batch(rank, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(ddp, batch(rank, 1)).backward()
    with pytest.raises(ThinwireError, match=r"waiting for optimizer.step\(\); call it"):
        wire.set_method(topk(0.1))
    before = states(wire)
    optimizer.step()
    kept = states(wire)["middle.weight.residual"].abs().max() > 0
    saved = wire.state_dict()
    handle, weights = poison(model), flat_parameters(model)
    optimizer.zero_grad()
    loss_of(ddp, batch(rank, 2)).backward()
    handle.remove()
    wire.load_state_dict(saved)  # drops the bad gradients too
    optimizer.step()
    same = torch.equal(weights, flat_parameters(model))
    handle = poison(model)
    optimizer.zero_grad()
    loss_of(ddp, batch(rank, 3)).backward()
    handle.remove()
    wire.detach()
    optimizer.step()
    return bool(before) and bool(kept) and same and bool(flat_parameters(model).isfinite().all()), wire.ledger.skipped


def test_between_backward_and_step(world2):
    assert world2.run(_between) == [(True, 2)] * 2


def _optimizers(rank):
    model, optimizer, ddp, wire = start(topk(0.1))
    with pytest.raises(ThinwireError, match=r"step\(closure\) runs backward inside the step"):
        optimizer.step(lambda: 0.0)
    other, _ = build()
    optimizer.add_param_group({"params": list(other.parameters())})
    with pytest.raises(ThinwireError, match="attached to another model"):
        thinwire.attach(DistributedDataParallel(other), topk(0.1), optimizer=optimizer)
    wire.detach()
    again = thinwire.attach(ddp, topk(0.1), optimizer=optimizer)
    again.detach()
    part = torch.optim.SGD(model.first.parameters(), lr=0.1)
    with pytest.raises(ThinwireError, match="one optimizer must hold all of them"):
        thinwire.attach(ddp, topk(0.1), optimizer=part)
    wire.detach()  # a second time does no harm


def test_one_optimizer_for_one_model(world2):
    world2.run(_optimizers)


def _carried(rank, scale):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    wire = thinwire.attach(ddp, topk(0.02), optimizer=optimizer, scaler=scaler)
    seen = []
    for step in range(6):
        if step == 4:
            wire.set_method(dense())
        optimizer.zero_grad()
        scaler.scale(loss_of(ddp, batch(rank, step))).backward()
        scaler.unscale_(optimizer)
        seen.append(model.middle.weight.grad.clone())
        scaler.step(optimizer)
        scaler.update()
    wire.detach()
    return torch.stack(seen)


def test_a_carried_residual_has_no_loss_scale(world2):
    plain, scaled = world2.run(_carried, 1.0)[0], world2.run(_carried, 4096.0)[0]
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)
    assert plain[4].abs().max() > 0


def _idle(rank, options, set_to_none):
    """An expert used once; then its weights must stand still, and its residual stay."""
    torch.manual_seed(0)
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ddp = DistributedDataParallel(model, find_unused_parameters=True, **options)
    wire = thinwire.attach(ddp, topk(0.05), optimizer=optimizer)
    for step in range(5):
        optimizer.zero_grad(set_to_none=set_to_none)
        ddp(batch(rank, step), 0 if step == 0 else 1).square().mean().backward()
        optimizer.step()
        if step == 0:
            weight, residual = model.experts[0].weight.detach().clone(), states(wire)["experts.0.weight.residual"]
    same = torch.equal(weight, model.experts[0].weight) and torch.equal(
        residual, states(wire)["experts.0.weight.residual"]
    )
    wire.detach()
    return same, float(residual.abs().max()) > 0


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("view", [True, False])
def test_what_nobody_uses_stands_still(world2, view, set_to_none):
    assert world2.run(_idle, {"gradient_as_bucket_view": view}, set_to_none) == [(True, True)] * 2


def _wrong_files(rank, folder):
    _, optimizer, ddp, wire = start(dgc(0.05))
    for step in range(2):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
        torch.save(wire.state_dict(), f"{folder}/{step}-{rank}.pt")
    torch.distributed.barrier()
    before = states(wire)

    def load(name):
        with pytest.raises(ThinwireError) as caught:
            wire.load_state_dict(torch.load(f"{folder}/{name}.pt", weights_only=True))
        return str(caught.value)

    messages = [load("1-0" if rank == 1 else "1-1"), load(f"{rank}-{rank}")]
    kept = all(torch.equal(a, b) for a, b in zip(before.values(), states(wire).values(), strict=True))
    for junk in (None, 42, object(), [], [1]):
        with pytest.raises(ThinwireError):
            wire.load_state_dict(junk)
    wire.detach()
    return messages, kept


def test_files_of_other_ranks_or_steps(world2, tmp_path):
    for rank, (messages, kept) in enumerate(world2.run(_wrong_files, tmp_path)):
        assert f"this is the state of rank {1 - rank}, and rank {rank} loads it" in messages[0]
        assert "ranks differ: rank 0 has checkpoint: step 1" in messages[1]
        assert kept


def _one_rank_skips(rank, method, skipped):
    """What ends a run in which rank 1 alone leaves out one optimizer step, and the weights before and after it."""
    model, optimizer = build()
    ddp = DistributedDataParallel(model, **SMALL_BUCKETS)
    wire = thinwire.attach(ddp, method, optimizer=optimizer)
    for step in range(skipped + 3):
        optimizer.zero_grad()
        loss = loss_of(ddp, batch(rank, step))
        before = flat_parameters(model)
        try:
            loss.backward()
        except ThinwireError as error:
            optimizer.step()
            assert torch.equal(before, flat_parameters(model)), "stepped on gradients of two different steps"
            assert wire.ledger.rows[0].error > 0
            assert wire.ledger.ratio > 1
            return step, str(error)
        if rank == 0 or step != skipped:
            optimizer.step()
    return None


STAGES = Warmup(4)  # each step has a density of its own, so messages of parted ranks differ in size


@pytest.mark.parametrize(
    ("method", "skipped"),
    [
        (dgc(0.02), 2),
        (topk(0.05), 0),
        (topk(0.001, warmup=STAGES), 1),
        (dgc(0.01, warmup=STAGES), 3),
        (randk(0.05), 1),
        (randk(0.05, feedback=False, warmup=STAGES), 4),  # one rank is where a stage ends, and one is beyond
        (thinwire.powersgd(1, min_compression_rate=1.0), 0),  # factors of two lengths
        (thinwire.powersgd(2), 1),
        (scalecom(0.05), 2),
        (thinwire.qsgd(4), 0),
        (topk(0.05, route="two_phase"), 1),
    ],
)
def test_step_clocks_that_part_are_an_error_on_all_ranks(world2, method, skipped):
    for rank, (step, error) in enumerate(world2.run(_one_rank_skips, method, skipped)):
        assert step == skipped + 1
        assert error.startswith(f"step {skipped + 1 - rank}: ranks are at different steps")
        assert f"rank 0 is at step {skipped + 1}, rank 1 at {skipped}." in error
        assert "Restart from the last checkpoint, and call optimizer.step() on all ranks or on none" in error


def test_all_ranks_that_are_at_another_step_are_named():
    nothing = torch.zeros(3, 0) > 0
    transaction = Transaction(Ledger("topk", 3, "simulated"))
    transaction.statuses.append(StepStatus((), nothing, nothing, torch.tensor(True)))
    with pytest.raises(ThinwireError, match=r"rank 0 is at step 512, rank 2 at 511\."):
        transaction.end(512, steps=lambda: [512, 512, 511])


def _left_out(rank, engine):
    """What is said where a step was left out and its gradients are gone, and then where they are not."""
    model, optimizer, attach = begin(engine, dist.group.WORLD, topk(0.1), timeout=60.0)
    wire = attach()

    def train(step, quiet):
        pause = {"ddp": lambda: model.no_sync(), "plain": lambda: wire.no_sync(), "fsdp2": nullcontext}[engine]
        if engine == "fsdp2":
            model.set_requires_gradient_sync(not quiet)
        with pause() if quiet else nullcontext():
            model(torch.randn(4, 6, generator=torch.Generator().manual_seed(2 * step + rank))).square().sum().backward()

    said = []
    for gone in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(0, quiet=False)  # and no step of the optimizer
            if gone:
                optimizer.zero_grad()
            train(1, quiet=gone)
            train(2, quiet=False)
        optimizer.step()
        optimizer.zero_grad()
        said.append([one for one in caught if "already averaged" in str(one.message)])
    error = wire.ledger.rows[0].error > 0
    fewer = wire.ledger.wire_bytes < wire.ledger.dense_bytes
    wire.detach()
    return [len(one) for one in said], error and fewer


@pytest.mark.parametrize("engine", ["ddp", "plain", "fsdp2"])
def test_gradients_of_a_step_that_was_left_out_are_not_said_to_be_added_to_once_they_are_gone(world2, engine):
    assert world2.run(_left_out, engine) == [([0, 1], True)] * 2


def test_a_model_that_is_a_sparse_embedding_names_its_weight_as_pytorch_does():
    assert [name for name, _ in sparse_weights(torch.nn.Embedding(4, 3, sparse=True))] == ["weight"]
