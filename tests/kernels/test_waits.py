"""On CUDA DGC does not wait from gradient to gradient: nothing reads from a tensor how large the next must be.

A wait can't be seen without a GPU. Its causes can: an operation whose shape or answer depends on values, or a copy
between host and device. Of the first ``Waits`` looks for those that have names; tensors that are only said to be on a
GPU show both, but have no values.
"""

import os
import sys
from collections import defaultdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thinwire import dgc
from thinwire.comm.simulated import Local
from thinwire.core.memory_capabilities import Absorbed
from thinwire.exchange import pipeline
from thinwire.exchange.buckets import plan_bucket
from thinwire.exchange.units import resolve, set_stage
from thinwire.exchange.workers import Worker
from thinwire.kernels.reference import REFERENCE
from thinwire.kernels.select import choose

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")
SHAPES = {"sampled": (250, 400), "exact": (90, 100), "few": (3,)}
WORLD = 2


class Waits(TorchDispatchMode):
    """Writes down what would wait."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "numpy")):
            monkeypatch.setattr(owner, name, self.made(name, getattr(owner, name)))

    def made(self, name, original):
        def make(*args, **kwargs):
            self.found.append(name)
            return original(*args, **kwargs)

        return make

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put_") else ()
        if name in WAITS or any(one is not None and one.dtype == torch.bool for one in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="the CUDA kernels need triton, which interprets them here")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set, and CUDA is here: tests/gpu has them")
    chosen, _ = choose("cuda", torch.device("cpu"))
    return chosen


def test_what_waits_is_found(monkeypatch):
    x = torch.randn(1000)
    with Waits(monkeypatch) as waits:
        REFERENCE.largest(x, 10)
        x.nonzero()
        x[x > 0]
        bool(x.any())
        torch.tensor(1.0)
    assert {"_local_scalar_dense", "nonzero", "index", "tensor", "numpy"} <= {*waits.found}


def planned(kernels, values, state, device):
    """Sampled and exact selections, and what is sent dense, in one message of two workers."""
    named = [(name, torch.zeros(shape, device=device)) for name, shape in SHAPES.items()]
    method = dgc(density=0.01, values=values, state_dtype=state, warmup=None)
    units = resolve(named, method, dict.fromkeys(SHAPES, Absorbed(0.9)))
    set_stage(units, None, WORLD)
    workers = [Worker(rank, kernels=kernels) for rank in range(WORLD)]
    for worker in workers:
        worker.local.update({unit.name: unit.fresh_local() for unit in units})
    return units, plan_bucket(units, WORLD), workers


def journey(bucket, workers, grads, outs, step, kernels):
    """The bytes of a rank's messages."""
    used = [True] * len(bucket.units)
    outboxes = [pipeline.send(bucket, grad, w, step, used) for grad, w in zip(grads, workers, strict=True)]
    sent = sum(message.nbytes for message in outboxes[0].messages)
    inboxes = [
        pipeline.route([bucket], [outbox.messages], collective, step)[0]
        for outbox, collective in zip(outboxes, Local.of(WORLD), strict=True)
    ]
    for inbox, out in zip(inboxes, outs, strict=True):
        pipeline.receive(bucket, inbox, out, 0, step, kernels=kernels)
    return sent


METHODS = [*((values, "float32") for values in ("float16", "int4", "int2", "sign")), (None, "bfloat16")]


@pytest.mark.parametrize(("values", "state"), METHODS)
def test_nothing_waits_from_gradient_to_gradient(kernels, monkeypatch, values, state):
    units, bucket, workers = planned(kernels, values, state, "cpu")
    for step in range(2):
        grads = [[torch.randn(unit.own.shape) for unit in units] for _ in workers]
        compensated = [(one + other) / WORLD for one, other in zip(*grads, strict=True)]
        outs = [[torch.full_like(grad, torch.nan) for grad in each] for each in grads]
        with Waits(monkeypatch) as waits:
            sent = journey(bucket, workers, grads, outs, step, kernels)
        assert sent < 0.1 * sum(grad.nbytes for grad in compensated)
        for unit, mine, theirs, mean in zip(units, *outs, compensated, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.any()
            assert step or unit.compressed == ((mine - mean).norm() > 0)  # later there is momentum
            unit.shared.commit()
            for worker in workers:
                worker.local[unit.name].commit()
        # of each message, whether anything is nonfinite: its sender and its receiver look, on CUDA nobody
        assert waits.found == ["_local_scalar_dense"] * 2 * WORLD


class Crossings(TorchDispatchMode):
    """Writes down what of tensors on a GPU, or with them, touches one of the host."""

    def __init__(self):
        super().__init__()
        self.found, self.operations = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if any(isinstance(x, torch.Tensor) and not x.is_cuda for x in tree_leaves((args, kwargs, result))):
            self.found.append(str(func))
        return result


def item(x, index):
    """``x[index]`` without the binding that looks for a GPU first."""
    if not x.is_cuda:
        return GET(x, index)
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if isinstance(one, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, one.start, one.stop, one.step or 1), dim + 1
        elif isinstance(one, int):
            x = torch.ops.aten.select.int(x, dim, one)
        else:
            assert one.ndim == 1, "the host would read it"
            assert one.dtype in (torch.int32, torch.int64), "the host would count it"
            x, dim = torch.ops.aten.index.Tensor(x, [None] * dim + [one]), dim + 1
    return x


GET = torch.Tensor.__getitem__


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("values", "state"), METHODS[::2])
def test_nothing_crosses_between_host_and_gpu(kernels, monkeypatch, values, state):
    """Tensors that are only said to be on a GPU raise where anything depends on their values."""
    launched = defaultdict(lambda: lambda *_, **__: None)
    monkeypatch.setattr(sys.modules[type(kernels).__module__], "_accumulate", launched)
    ops = torch.ops.aten
    for name, shim in {
        "__getitem__": item,
        "__iter__": lambda x: iter(x.unbind(0)),
        "__invert__": lambda x: ops.bitwise_not.default(x),
        "copy_": lambda x, source, non_blocking=False: ops.copy_.default(x, source, non_blocking),
    }.items():
        monkeypatch.setattr(torch.Tensor, name, shim)
    with FakeTensorMode():
        units, bucket, workers = planned(kernels, values, state, "cuda:0")
        for step in range(2):
            grads, outs = (
                [[torch.empty(unit.own.shape, device="cuda:0") for unit in units] for _ in workers] for _ in range(2)
            )
            with Crossings() as crossings:
                sent = journey(bucket, workers, grads, outs, step, kernels)
            assert not crossings.found
            assert crossings.operations > 100
            assert launched
            assert sent < 0.1 * sum(grad.nbytes for grad in grads[0])
        with Crossings() as crossings:
            grads[0][0].cpu()
        assert crossings.found
