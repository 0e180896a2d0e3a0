"""What is finite stays so on the wire where what is cut off can come back; and what has no elements is no obstacle."""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.core.test_ambient import METHODS, optimizer_for
from thinwire import Method, Rule
from thinwire.compressors import CLTK, BlockTopK, Cast, PowerSGD, RandK, SIDCo, Threshold, TopK
from thinwire.core.tensors import shortened
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.memories import ErrorFeedback, MomentumCorrection, NoMemory
from thinwire.memories.momentum import Momentum

FLOAT16 = torch.finfo(torch.float16).max


def fed_back(compressor, route="all_gather", memory=None, rest=None):
    rules = Rule(compressor, memory or ErrorFeedback(), min_ndim=2), Rule(Cast(), rest or NoMemory())
    return Method("own", rules, route=route)


SHORT = {
    "topk": fed_back(TopK(0.1) >> Cast("float16")),
    "topk-values": thinwire.topk(0.1, values="float16"),
    "topk-two-phase": fed_back(TopK(0.1) >> Cast("float16"), "two_phase"),
    "blocks": fed_back(BlockTopK(0.1) >> Cast("float16")),
    "threshold": fed_back(Threshold(1.0, 0.2) >> Cast("float16")),
    "sidco": fed_back(SIDCo(0.1) >> Cast("float16")),
    "leader": fed_back(CLTK(0.1) >> Cast("float16")),
    "randk": fed_back(RandK(0.2, scaled=False) >> Cast("float16")),
    "powersgd": fed_back(PowerSGD(2) >> Cast("float16")),
    "cast": fed_back(Cast("float16")),
    "dgc": fed_back(TopK(0.1) >> Cast("float16"), memory=MomentumCorrection(), rest=Momentum()),
    "econtrol": thinwire.econtrol(TopK(0.1) >> Cast("float16")),
}


class Given(torch.autograd.Function):
    """A number whose gradient in ``weight`` is what is given, whatever its dtype can hold."""

    @staticmethod
    def forward(ctx, weight, gradient):
        ctx.gradient = gradient
        return weight.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return ctx.gradient, None


def gradient(worker: int, step: int, size: float, dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(10 * step + worker)
    limit = torch.finfo(dtype).max
    return (torch.randn(30, 40, generator=drawn, dtype=torch.float64) * size).clamp(-limit, limit).to(dtype)


def sent_and_left(method, size: float, dtype=torch.float32, workers: int = 3, steps: int = 3):
    """The mean of what was compensated, what arrived, the mean of what is left, and the session."""
    model = nn.Linear(40, 30, bias=False).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sim = SimulatedWorkers(model, method, optimizer, workers)
    received = []
    optimizer.register_step_pre_hook(lambda *_: received.append(model.weight.grad.double()))
    for step in range(steps):
        sim.step(lambda worker, step=step: Given.apply(model.weight, gradient(worker, step, size, dtype)))
    compensated = sum(gradient(w, s, size, dtype).double() for w in range(workers) for s in range(steps)) / workers
    left = [worker.local["weight"].now.get("residual") for worker in sim.session.workers]
    pending = sum(x.double() for x in left) / workers if left[0] is not None else None
    return compensated, received, pending, sim.session


@pytest.mark.parametrize("name", SHORT)
def test_a_finite_gradient_is_cut_off_and_comes_back(name):
    cases = [(1e6, torch.float32), (1e6, torch.float64), (3e4, torch.float16), (1.0, torch.float32)]
    for size, dtype in cases:
        compensated, received, pending, session = sent_and_left(SHORT[name], size, dtype)
        assert session.ledger.skipped == 0, (size, dtype)
        assert len(received) == 3
        assert all(bool(x.isfinite().all()) for x in received), (size, dtype)
        assert 0 < session.ledger.wire_bytes < session.ledger.dense_bytes
        off = (sum(received) + pending - compensated).abs().max()
        assert off <= 1e-3 * max(compensated.abs().max(), pending.abs().max()), (size, dtype)


def test_a_chain_and_a_dtype_of_values_are_the_same():
    chain, values = (sent_and_left(SHORT[name], 1e6) for name in ("topk", "topk-values"))
    assert all(map(torch.equal, chain[1], values[1]))
    assert torch.equal(chain[2], values[2])
    assert chain[1][0].abs().max() <= FLOAT16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_sum_of_the_largest_values_does_not_overflow(dtype):
    """Of three workers a third of each, rounded up, may be more than the dtype holds."""
    largest = 3e38 if dtype == "bfloat16" else 1e6
    model = nn.Linear(40, 30, bias=False)
    for workers in (2, 3, 5, 7):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sim = SimulatedWorkers(model, fed_back(Cast(dtype)), optimizer, workers)
        sim.step(lambda _: Given.apply(model.weight, torch.full((30, 40), largest)))
        assert sim.session.ledger.skipped == 0
        assert bool(model.weight.grad.isfinite().all())
        sim.session.detach()


def test_what_is_not_finite_is_still_found():
    for name in ("cast", "topk", "powersgd", "leader"):
        model = nn.Linear(40, 30, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sim = SimulatedWorkers(model, SHORT[name], optimizer, 2)
        for nonfinite in (torch.inf, -torch.inf, torch.nan):
            given = torch.ones(30, 40)
            given[3, 4] = nonfinite
            given = [torch.ones(30, 40), given]
            sim.step(lambda worker, w=model.weight, given=given: Given.apply(w, given[worker]))
        assert sim.session.ledger.skipped == 3, name


def test_a_sum_that_overflows_is_no_gradient_that_is_not_finite():
    for method in (thinwire.topk(0.1), fed_back(Cast("bfloat16")), thinwire.methods.randk(0.5), thinwire.dgc(0.1)):
        session = sent_and_left(method, 1e37, steps=1)[3]
        model = nn.Linear(40, 30, bias=False)
        sim = SimulatedWorkers(model, method, torch.optim.SGD(model.parameters(), lr=0.0), 2)
        sim.step(lambda _, model=model: Given.apply(model.weight, torch.full((30, 40), 2e38)))
        assert session.ledger.skipped == sim.session.ledger.skipped == 0, method.name


def test_without_a_memory_a_cast_overflows_as_published_and_the_ledger_says_so():
    _, received, _, session = sent_and_left(thinwire.cast("float16"), 1e6)
    assert bool(received[0].isinf().any())
    assert any("65,504 becomes infinite" in note for note in session.ledger.notes)
    for method in (thinwire.cast("bfloat16"), thinwire.dense(), SHORT["cast"]):
        assert not any("infinite" in note for note in sent_and_left(method, 1.0)[3].ledger.notes)


class Shapes(nn.Module):
    """Parameters of these shapes, each with the gradient 1 + rank."""

    def __init__(self, shapes, dtype=torch.float32) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.ones(shape, dtype=dtype)))

    def forward(self, worker: int) -> torch.Tensor:
        return sum((p * (worker + 1.0)).sum() for p in self.parameters())


EMPTY = [[(0,)], [(0, 3), (4, 0, 2)], [(1, 1), (0,)], [(0, 5), (0, 2), (20, 30)]]


def test_nothing_to_send_is_sent():
    for name, shapes, route in itertools.product(METHODS, EMPTY, ("all_gather", "two_phase")):
        model = Shapes(shapes, torch.float16 if route == "two_phase" else torch.float32)
        method = dataclasses.replace(METHODS[name], route=route)
        sim = SimulatedWorkers(model, method, optimizer_for(name, model), 2)
        for _ in range(2):
            sim.step(model)
        assert sim.session.ledger.skipped == 0, (name, shapes, route)
        sim.session.detach()


def _buckets_of_nothing(rank):
    found = []
    for name in ("dense", "topk-sign", "maxmin", "powersgd"):
        for wrap in (True, False):
            for shapes in EMPTY[2:]:
                model = Shapes(shapes)
                optimizer = optimizer_for(name, model)
                options = {} if wrap else {"process_group": dist.group.WORLD}
                wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-6) if wrap else model
                wire = thinwire.attach(wrapped, METHODS[name], optimizer=optimizer, **options)
                for _ in range(3):
                    optimizer.zero_grad()
                    wrapped(rank).backward()
                    optimizer.step()
                found.append((torch.cat([p.detach().flatten() for p in model.parameters()]), wire.ledger.skipped))
                wire.detach()
    return found


def test_buckets_of_nothing_travel(world2):
    first, second = world2.run(_buckets_of_nothing, timeout=180.0)
    for (a, skipped), (b, _) in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert skipped == 0
        assert bool((a != 1.0).all())


@pytest.mark.parametrize("state", ["bfloat16", "float32"])
@pytest.mark.parametrize("values", ["float16", "bfloat16"])
@pytest.mark.parametrize("chained", [True, False])
def test_values_saturate_whatever_the_residual_is_kept_in(state, values, chained):
    """bfloat16 has as many bytes as float16 and a range of 10^38; 65504 is none of its numbers."""
    compressor = TopK(0.1) >> Cast(values) if chained else TopK(0.1, values=values)
    torch.manual_seed(0)
    model = nn.Linear(20, 20, bias=False)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-9)
    result = thinwire.simulate(
        model, fed_back(compressor, memory=ErrorFeedback(state)), optimizer=sgd,
        batches=lambda worker, step: torch.full((1, 20), 1e6), loss=lambda m, x: m(x).sum(), workers=2, steps=3,
    )  # fmt: skip
    assert result.ledger.skipped == 0
    assert result.ledger.ratio > 1
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_shortened_is_finite_and_as_large_as_can_be(dtype):
    short = shortened(torch.tensor([1e30, -1e30, torch.nan, 3.0], dtype=dtype), torch.float16, FLOAT16)
    assert short[2].isnan()
    assert short[3] == 3
    assert short[0] == -short[1]
    assert FLOAT16 * (1 - torch.finfo(dtype).eps) <= short[0].double() <= FLOAT16
