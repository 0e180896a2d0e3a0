"""On CUDA no step waits for the host: no kernel, nor what stands around it, asks a tensor how large the next must be.

A wait can't be seen without a GPU. Its cause can: an operation whose shape or answer depends on values, or a tensor
that is made from numbers of the host.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from thinwire import dgc, pipeline
from thinwire.core import Absorbed
from thinwire.exchange.local import Local
from thinwire.exchange.routes import plan_bucket
from thinwire.kernels.choose import choose
from thinwire.kernels.reference import REFERENCE
from thinwire.units import Worker, resolve, set_stage

ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")
SHAPES = {"sampled": (250, 400), "exact": (90, 100), "few": (3,)}
WORLD = 2


class Waits(TorchDispatchMode):
    """Writes down what would wait."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        for name in ("tensor", "as_tensor"):
            monkeypatch.setattr(torch, name, self.made(name, getattr(torch, name)))

    def made(self, name, original):
        def make(*args, **kwargs):
            self.found.append(name)
            return original(*args, **kwargs)

        return make

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put_") else ()
        if name in ASKS or any(one is not None and one.dtype == torch.bool for one in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="the CUDA kernels need triton, which interprets them here")
    chosen, _ = choose("cuda", torch.device("cpu"))
    return chosen


def test_what_waits_is_found(monkeypatch):
    x = torch.randn(1000)
    with Waits(monkeypatch) as waits:
        REFERENCE.largest(x, 10)
        x[x > 0]
        bool(x.any())
        torch.tensor(1.0)
    assert {"_local_scalar_dense", "nonzero", "index", "tensor"} <= {*waits.found}


@pytest.mark.parametrize(
    ("values", "state"),
    [*((values, "float32") for values in ("float16", "int4", "int2", "sign")), (None, "bfloat16")],
)
def test_nothing_waits_from_gradient_to_gradient(kernels, monkeypatch, values, state):
    """Sampled and exact selections, and what is sent dense, in one message of two workers."""
    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    method = dgc(density=0.01, values=values, state=state, warmup=None)
    units = resolve(named, method, dict.fromkeys(SHAPES, Absorbed(0.9)))
    set_stage(units, None, WORLD)
    bucket = plan_bucket(units, WORLD)
    workers = [Worker(rank, kernels=kernels) for rank in range(WORLD)]
    for worker in workers:
        worker.local.update({unit.name: unit.fresh_local() for unit in units})
    for step in range(2):
        grads = [[torch.randn(unit.own.shape) for unit in units] for _ in workers]
        asked = [grad.clone() for grad in grads[0]]
        outs = [[torch.full_like(grad, torch.nan) for grad in each] for each in grads]
        with Waits(monkeypatch) as waits:
            outboxes = [
                pipeline.send(bucket, grad, worker, step, [True] * len(units))
                for grad, worker in zip(grads, workers, strict=True)
            ]
            inboxes = [
                pipeline.route(bucket, outbox.messages, collective, step)
                for outbox, collective in zip(outboxes, Local.of(WORLD), strict=True)
            ]
            for inbox, out in zip(inboxes, outs, strict=True):
                pipeline.receive(bucket, inbox, out, 0, step, kernels=kernels)
        sent = sum(message.nbytes for message in outboxes[0].messages)
        assert sent < 0.1 * sum(grad.nbytes for grad in asked)
        for unit, mine, theirs, grad in zip(units, *outs, asked, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.any()
            assert not unit.compressed or (mine - grad).norm() > 0
            unit.shared.commit()
            for worker in workers:
                worker.local[unit.name].commit()
        if step:  # the first makes what is kept
            # of each message, whether anything is bad, which on CUDA nobody asks
            assert waits.found == ["_local_scalar_dense"] * WORLD
