"""What is set in torch around a run changes neither what a method computes nor what it sends."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.test_family import RECIPES
from thinwire import Method, Rule
from thinwire.compressors import BlockTopK, Cast, Quantize, Scaled, Threshold, TopK
from thinwire.core.ambient import full_precision
from thinwire.core.context import NOWHERE
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.memories import ErrorFeedback, NoMemory


def _own(compressor):
    return Method("own", (Rule(compressor, ErrorFeedback(), min_ndim=2), Rule(Cast(), NoMemory())))


METHODS = RECIPES | {
    "dense": thinwire.dense(),
    "float16": thinwire.cast("float16"),
    "bfloat16": thinwire.cast("bfloat16"),
    "topk": thinwire.topk(0.05, clip=0.1),
    "topk-int4": thinwire.topk(0.05, values="int4", state_dtype="bfloat16"),
    "topk-sign": thinwire.topk(0.05, values="sign", route="two_phase"),
    "dgc": thinwire.dgc(0.05, selection="sampled", warmup=thinwire.Warmup(2, (0.5,))),
    "powersgd": thinwire.powersgd(2, min_compression_rate=0.0),
    "sidco-gamma": thinwire.methods.sidco(0.05, fit="gamma"),
    "ef14": thinwire.methods.ef14(0.05),
    "ef21_pp": thinwire.methods.ef21_pp(0.05, participation=0.5),
    "ef21_bc": thinwire.methods.ef21_bc(0.05, TopK(0.1)),
    "ef21_sgdm": thinwire.methods.ef21_sgdm(0.05),
    "econtrol": thinwire.econtrol(0.05),
    "onebit_adam": thinwire.onebit_adam(),
    "onebit_lamb": thinwire.methods.onebit_lamb(),
    "zeroone_adam": thinwire.zeroone_adam(),
    "blocks": _own(BlockTopK(0.05)),
    "threshold": _own(Threshold(0.01, 0.1)),
    "chain": _own(TopK(0.05) >> Cast("float16")),
    "scaled": _own(Scaled(thinwire.compressors.QSGD(2))),
}


class Weights(nn.Module):
    """A model whose gradients are given, so that nothing that is set around can change them."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        shapes = {"matrix": (48, 40), "bias": (40,), "conv": (8, 6, 3, 3)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=drawn)))

    def forward(self, worker: int, step: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(100 * step + worker)
        with torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False):
            return sum((p * torch.randn(p.shape, generator=drawn, dtype=p.dtype)).sum() for p in self.parameters())


def optimizer_for(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name in ("onebit_adam", "onebit_lamb"):
        kind = thinwire.optim.OneBitAdam if name == "onebit_adam" else thinwire.optim.OneBitLamb
        return kind(model.parameters(), lr=1e-3, freeze_step=2)
    if name == "zeroone_adam":
        return thinwire.optim.ZeroOneAdam(model.parameters(), lr=1e-3)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0 if name == "demo" else 0.9, weight_decay=1e-3)


WHOLE_AT_FIRST = {"float16", "bfloat16", "ef21_pp", "onebit_adam", "onebit_lamb", "zeroone_adam"}
"""Lose nothing of note in the step that is measured, or nobody takes part in it."""


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def short_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def anomalies():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is on
        with torch.autograd.set_detect_anomaly(True):
            yield


SETTINGS = {
    "autocast": [lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    "float64": [lambda: default_dtype(torch.float64)],
    "device": [lambda: torch.device("meta")],
    "modes": [deterministic, anomalies, short_products, torch.enable_grad],
}
SETTINGS["inference"] = [torch.inference_mode]
SETTINGS["most"] = [
    lambda: default_dtype(torch.bfloat16), lambda: torch.autocast("cpu", dtype=torch.float16), *SETTINGS["device"],
    *SETTINGS["modes"],
]  # fmt: skip
SETTINGS["rest"] = [*SETTINGS["autocast"], *SETTINGS["float64"]]


@contextlib.contextmanager
def setting(name: str):
    with contextlib.ExitStack() as stack:
        for make in SETTINGS.get(name, ()):
            stack.enter_context(make())
        yield


def _simulated(name: str, around: str):
    """Parameters, all that is remembered, and the bytes of each step."""
    model = Weights()
    optimizer = optimizer_for(name, model)
    with setting(around):
        sim = SimulatedWorkers(model, METHODS[name], optimizer, 2, seed=3)
        for step in range(3):
            sim.step(lambda worker, step=step: model(worker, step))
    session = sim.session
    states = [worker.local[unit.name].now for worker in session.workers for unit in session.units]
    states += [unit.shared.now for unit in session.units]
    remembered = [state[key] for state in states for key in sorted(state)]
    rows = [(row.wire_bytes, row.compressed_wire_bytes, row.error) for row in session.ledger.rows]
    return [*model.parameters(), *remembered], rows


def test_nothing_set_around_a_simulation_counts():
    differing = []
    for name in METHODS:
        tensors, rows = _simulated(name, "nothing")
        if name != "dense":
            assert sum(row[1] for row in rows) < 3 * sum(p.nbytes for p in Weights().parameters()), name
            assert rows[0][2] or name in WHOLE_AT_FIRST, name
        for around in ("most", "rest"):
            others, others_rows = _simulated(name, around)
            same = [t.dtype for t in tensors] == [t.dtype for t in others] and all(map(torch.equal, tensors, others))
            if not same or rows != others_rows:
                differing.append((name, around))
    assert differing == []


def _attached(engine: str, rank: int, method: Method, name: str, around_attach: str, around_steps: str):
    model = Weights()
    options = {}
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        options = {"fsdp2": thinwire.Fsdp2Options(mesh["replicate"], Quantize(8, rounding="stochastic"))}
    optimizer = optimizer_for(name, model)
    wrapped = DistributedDataParallel(model) if engine == "ddp" else model
    if engine == "plain":
        options = {"process_group": dist.group.WORLD}
    with setting(around_attach):
        wire = thinwire.attach(wrapped, method, optimizer=optimizer, **options)
    for step in range(3):
        optimizer.zero_grad()
        loss = wrapped(rank, step)
        with setting(around_steps):
            loss.backward()
            optimizer.step()
    with setting(around_steps):
        wire.load_state_dict(wire.state_dict())
        wire.set_method(thinwire.topk(0.1))
    rows = [row.wire_bytes for row in wire.ledger.rows]
    with setting(around_attach):
        wire.detach()
    return [p.to_local() if engine == "fsdp2" else p.detach() for p in model.parameters()], rows


def _each_engine(rank, engine, names):
    found = []
    for name in names:
        tensors, rows = _attached(engine, rank, METHODS[name], name, "nothing", "nothing")
        for attach, steps in (("nothing", "autocast"), ("rest", "most"), ("inference", "nothing")):
            others, others_rows = _attached(engine, rank, METHODS[name], name, attach, steps)
            if rows != others_rows or not all(map(torch.equal, tensors, others)):
                found.append((name, attach, steps))
    return found


@pytest.mark.parametrize("engine", ["ddp", "plain", "fsdp2"])
def test_nothing_set_around_a_run_counts(world2, engine):
    names = ["powersgd", "natural"] if engine == "ddp" else ["demo", "qsgd"]
    assert world2.run(_each_engine, engine, names, timeout=180.0) == [[], []]


def _matmul_precision():
    return [kind.fp32_precision for kind in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)]


def test_full_precision_is_for_as_long_as_anybody_needs_it():
    with short_products():
        before = _matmul_precision()
        assert "ieee" not in before
        first, second = full_precision(), full_precision()
        for enter, leave in ((first, None), (second, first), (None, second)):
            if enter is not None:
                enter.__enter__()
            assert _matmul_precision() == ["ieee", "ieee"]
            if leave is not None:
                leave.__exit__(None, None, None)
        assert _matmul_precision() == before


@pytest.mark.parametrize("compressor", [thinwire.compressors.PowerSGD(4), thinwire.compressors.DctTopK(0.1)])
def test_short_products_do_not_shorten_a_method(compressor):
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(5))
    state = compressor.init(x, NOWHERE)
    found = []
    for around in (contextlib.nullcontext, short_products):
        with around():
            payload = compressor.compress(x, state, NOWHERE)
            compressor.decompress(payload, x, state, NOWHERE).write_to(out := torch.full_like(x, torch.nan))
        found.append([*payload, out])
    assert all(map(torch.equal, *found))
    assert 0.0 < float((found[0][-1] - x).norm() / x.norm()) < 1.0
    assert sum(t.nbytes for t in found[0][:-1]) < x.nbytes
