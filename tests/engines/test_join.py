"""DDP's ``join()``, where some ranks have fewer batches than others."""

import re

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import batch, build, flat_parameters, loss_of
from thinwire import ThinwireError, Warmup, dense, dgc, onebit_adam, topk
from thinwire.optim import OneBitAdam


def train(rank, ddp, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()


def state_of(wire, optimizer):
    """Everything that must be the same on all ranks."""
    shared = [x for unit in wire.units for x in unit.shared.now.values()]
    held = [x for group in optimizer.param_groups for p in group["params"] for x in optimizer.state[p].values()]
    return [
        wire.step,
        *(float(torch.as_tensor(x, dtype=torch.float64).sum()) for x in (*shared, *held) if x is not None),
    ]


def _uneven(rank, counts, method, kind):
    model, optimizer = build()
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    elif kind == "1-bit":
        optimizer = OneBitAdam(model.parameters(), lr=0.01, freeze_step=4)
    ddp = DistributedDataParallel(model, find_unused_parameters=kind == "adamw")
    wire = thinwire.attach(ddp, method, optimizer=optimizer, timeout=30.0, kernels="reference")
    with ddp.join():
        train(rank, ddp, optimizer, counts[rank])
    found = [(state_of(wire, optimizer), flat_parameters(model))]
    train(rank, ddp, optimizer, 2, 10)
    found.append((state_of(wire, optimizer), flat_parameters(model)))
    wire.detach()
    return found


@pytest.mark.parametrize(
    ("counts", "method", "kind"),
    [
        ((5, 2), dgc(0.05), "sgd"),
        ((0, 3), topk(0.05, warmup=Warmup(5)), "adamw"),
        ((3, 6), onebit_adam(), "1-bit"),
        ((4, 1), dense(), "sgd"),
        ((3, 3), topk(0.05), "sgd"),
    ],
)
def test_a_rank_that_has_joined_goes_on_with_the_others(world2, counts, method, kind):
    for (left, a), (right, b) in zip(*world2.run(_uneven, counts, method, kind), strict=True):
        assert left == right
        assert torch.equal(a, b)
    assert left[0] == max(counts) + 2, "a step of any rank is one of all"


def _scheduled(rank, kind):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, topk(0.1), optimizer=optimizer, timeout=30.0, kernels="reference", check_every=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with ddp.join():
        for step in range((3, 9)[rank]):
            optimizer.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            if kind in ("clip", "both"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            if kind != "clip":
                scheduler.step()
    notes = [note for note in wire.ledger.notes if "has joined and steps otherwise" in note]
    wire.detach()
    return wire.step, flat_parameters(model), notes


@pytest.mark.parametrize("kind", ["scheduler", "clip", "both"])
def test_a_rank_that_has_joined_may_step_otherwise_until_ddp_replaces_its_parameters(world2, kind):
    (step, a, notes), (last, b, others) = world2.run(_scheduled, kind)
    assert step == last == 9
    assert torch.equal(a, b)
    assert notes == others
    assert len(notes) == 1
    assert "rank 0 has joined" in notes[0]


def _refused(rank, what):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    options = {"scaler": torch.amp.GradScaler("cpu")} if what == "scaler" else {}
    wire = thinwire.attach(ddp, topk(0.1), optimizer=optimizer, timeout=30.0, kernels="reference", **options)
    with pytest.raises(ThinwireError) as raised, ddp.join(divide_by_initial_world_size=what == "scaler"):
        train(rank, ddp, optimizer, 3 * rank)  # with no batch a rank is in join() at once
    wire.detach()
    return str(raised.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [("divisor", r"join\(divide_by_initial_world_size=False\).* leave it at True"), ("scaler", "as many batches")],
)
def test_what_join_cannot_do_is_refused_before_anything_is_exchanged(world2, what, message):
    for text in world2.run(_refused, what):
        assert re.search(message, text)
