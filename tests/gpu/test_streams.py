"""What overlaps with the backward pass waits for what it needs, and is waited for."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import flat_parameters
from tests.gpu.training import CUDA, DEVICE, apart, attached, build, train
from thinwire.engines.scheduler import Scheduler

STEPS = 30 if CUDA else 3
WIDTH = 512 if CUDA else 32
DELAY = 2_000_000
"""Cycles, about a millisecond: longer than a bucket's backward pass."""


class Delayed(torch.autograd.Function):
    """The identity, whose gradient is late on the stream of the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if CUDA:
            torch.cuda._sleep(DELAY)
        return grad


class Deep(nn.Module):
    """Enough layers that buckets leave while others are still to come."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.late = late

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
            x = Delayed.apply(x) if self.late else x
        return x


def loss_of(model, x):
    return (model(x) - x.roll(1, 1)).square().mean()


def batch(step):
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step)).to(DEVICE)


def deep(late=False):
    torch.manual_seed(0)
    model = Deep(late).to(DEVICE)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def reference(method):
    """On one stream, by plain PyTorch."""
    model, optimizer = deep()
    start = flat_parameters(model).cpu()
    thinwire.simulate(
        model, method, optimizer=optimizer, batches=lambda worker, step: batch(step), loss=loss_of, workers=1,
        steps=STEPS, kernels="reference",
    )  # fmt: skip
    return flat_parameters(model).cpu(), start


@pytest.mark.parametrize("delayed", ["nothing", "backward", "exchange"])
@pytest.mark.parametrize("where", ["ddp", "bare", "sparse"])
def test_overlap_changes_nothing(group, monkeypatch, where, delayed):
    """Whichever stream is late, thirty steps end where one stream alone ends."""
    method = thinwire.dgc(0.01, warmup=None)
    expected, start = reference(method)
    if delayed == "exchange" and CUDA:
        plain = Scheduler.side_stream

        @contextlib.contextmanager
        def late(self, tensor):
            with plain(self, tensor):
                torch.cuda._sleep(DELAY)
                yield

        monkeypatch.setattr(Scheduler, "side_stream", late)
    model, optimizer = deep(delayed == "backward")
    options = {"process_group": dist.group.WORLD, "sparse_gradients": where == "sparse"}
    if where == "ddp":
        model, options = DistributedDataParallel(model, bucket_cap_mb=1), {}
    wire = thinwire.attach(model, method, optimizer=optimizer, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
    found, error = flat_parameters(model).cpu(), wire.ledger.rows[0].error
    wire.detach()
    assert error > 0
    assert apart(found, expected, start) < 1e-3


@pytest.mark.cuda
@pytest.mark.parametrize("where", ["ddp", "bare"])
def test_a_side_stream_ends_as_the_default_one(group, where):
    ends = []
    for stream in (None, torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            model, optimizer, wire = attached(where, "dgc")
            ends.append(train(model, optimizer))
            wire.detach()
        torch.cuda.synchronize()
    assert apart(ends[1], ends[0], flat_parameters(build()[0]).cpu()) < 1e-4


@pytest.mark.cuda
def test_gradients_of_another_stream_are_waited_for(group):
    """The forward pass on a stream of its own, so that backward runs there too."""
    ends = []
    for stream in (None, torch.cuda.Stream()):
        model, optimizer = deep()
        wire = thinwire.attach(model, thinwire.dgc(0.01), optimizer=optimizer, process_group=dist.group.WORLD)
        for step in range(6):
            x = batch(step)
            optimizer.zero_grad()
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = loss_of(model, x)
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
            loss.backward()
            optimizer.step()
            torch.cuda.synchronize()
        ends.append(flat_parameters(model).cpu())
        wire.detach()
    assert apart(ends[1], ends[0], flat_parameters(deep()[0]).cpu()) < 1e-4
