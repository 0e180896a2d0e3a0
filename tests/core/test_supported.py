"""Parameters of every dtype and layout: exchanged rightly, or refused at attach by name."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import return_and_correct_aliasing

import thinwire
from thinwire import Method, Rule, ThinwireError
from thinwire.coding import header
from thinwire.compressors import Cast
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.memories import ErrorFeedback

LINEAR = {
    "dense": thinwire.dense(),
    "bfloat16": thinwire.cast("bfloat16"),
    "dgc": thinwire.dgc(0.1, keep_dense=["*c"]),
    "topk": thinwire.topk(0.1, keep_dense=["*c"], clip=1e6),
    "feedback": Method("own", (Rule(Cast("float16"), ErrorFeedback()),)),
}
REAL_ONLY = {
    "maxmin": thinwire.maxmin(8),
    "topk": thinwire.topk(0.1),
    "dgc": thinwire.dgc(0.1),
    "signsgd": thinwire.signsgd(),
    "natural": thinwire.methods.natural(),
    "randk": thinwire.methods.randk(0.5),
    "demo": thinwire.methods.decoupled_momentum(),
    "powersgd": thinwire.powersgd(1, min_compression_rate=0.0),
    "ef21": thinwire.ef21(0.1),
}


class Waves(nn.Module):
    """One complex matrix among real ones, used so that its gradient is a conjugate view; and a complex number."""

    def __init__(self, dtype=torch.complex64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(8, 6, bias=False, dtype=dtype.to_real())
        self.c = nn.Parameter(torch.randn(6, 4, dtype=dtype))
        self.small_c = nn.Parameter(torch.randn(1, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).to(self.c.dtype) @ self.c.conj() + self.small_c.conj()
        return (y.abs() + (self.c.conj() * self.c.detach()).real.sum()).square().mean()


def batch(worker: int, step: int, dtype=torch.complex64) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(10 * step + worker)
    return torch.randn(5, 8, generator=drawn, dtype=dtype.to_real())


def flat(model: nn.Module) -> torch.Tensor:
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return torch.cat([(torch.view_as_real(p) if p.is_complex() else p).detach().flatten() for p in local])


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-3)


def simulated(method, dtype=torch.complex64, steps: int = 3):
    model = Waves(dtype)
    sim = SimulatedWorkers(model, method, sgd(model), 2)
    for step in range(steps):
        sim.step(lambda worker, step=step: model(batch(worker, step, dtype)))
    sim.session.detach()
    return flat(model), sim.session.ledger


def alone(dtype, steps: int = 3):
    model = Waves(dtype)
    optimizer = sgd(model)
    for step in range(steps):
        optimizer.zero_grad()
        (sum(model(batch(worker, step, dtype)) for worker in range(2)) / 2).backward()
        optimizer.step()
    return flat(model)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_are_averaged_as_real_pairs(dtype):
    expected = alone(dtype)
    for name, method in LINEAR.items():
        got, ledger = simulated(method, dtype)
        off = (got - expected).abs().max()
        assert off <= (1e-5 if name == "dense" else 0.2), name
        if name != "dense":
            assert 0 < ledger.wire_bytes < ledger.dense_bytes or dtype == torch.complex128, name
    numbers = sum(2 * p.numel() if p.is_complex() else p.numel() for p in Waves().parameters())
    assert simulated(thinwire.dense())[1].rows[0].wire_bytes == 4 * numbers  # 2 (N-1) / N of 4 bytes each


@pytest.mark.parametrize("name", REAL_ONLY)
def test_a_method_for_real_numbers_names_the_complex_parameter(name):
    model = Waves()
    message = rf"parameter 'c' is complex64, and {name} has .*keep_dense=\['c'\].*match='c'"
    if name == "powersgd":
        model.c = nn.Parameter(torch.randn(20, 20, dtype=torch.complex64))
    with pytest.raises(ThinwireError, match=message):
        SimulatedWorkers(model, REAL_ONLY[name], sgd(model), 2)


class Holds(torch.Tensor):
    """A tensor that holds another, as quantised weights do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner) -> None:
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def bare(x):
            return x.inner if isinstance(x, Holds) else x

        out = func(*torch.utils._pytree.tree_map(bare, args), **torch.utils._pytree.tree_map(bare, kwargs or {}))
        out = Holds(out) if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) else out
        return return_and_correct_aliasing(func, args, kwargs or {}, out)


def _inference():
    with torch.inference_mode():
        return nn.Parameter(torch.randn(4, 4))


def _lazy():
    return nn.LazyLinear(4).weight


UNSUPPORTED = {
    "float8_e4m3fn": lambda: nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn)),
    "float8_e5m2": lambda: nn.Parameter(torch.zeros(4, 4).to(torch.float8_e5m2)),
    "complex32": lambda: nn.Parameter(torch.zeros(4, 4, dtype=torch.complex32)),
    "sparse_coo": lambda: nn.Parameter(torch.eye(4).to_sparse()),
    "sparse_csr": lambda: nn.Parameter(torch.eye(4).to_sparse_csr()),
    "Holds": lambda: nn.Parameter(Holds(torch.randn(4, 4))),
    "inference_mode": _inference,
    "lazy": _lazy,
}


def odd(name: str) -> nn.Module:
    model = nn.Module()
    model.linear = nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these are said to be young
        model.register_parameter("odd", UNSUPPORTED[name]())
    return model


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_parameter_that_cannot_be_exchanged_is_named(name):
    for method in (thinwire.dense(), thinwire.maxmin(8)):
        model = odd(name)
        with pytest.raises(ThinwireError, match=rf"parameter 'odd'.*{name}"):
            SimulatedWorkers(model, method, torch.optim.SGD(model.linear.parameters(), lr=0.1), 2)


def shard(model: Waves):
    """PyTorch wants one dtype in a group; answers the mesh over the replicas."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.first, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return mesh["replicate"]


def _refused(rank):
    found = {}
    for name in UNSUPPORTED:
        try:
            thinwire.attach(odd(name), thinwire.dense(), process_group=dist.group.WORLD)
        except ThinwireError as error:
            found["plain", name] = str(error)
    for engine in ("ddp", "plain", "fsdp2"):
        model = Waves()
        options = {}
        if engine == "ddp":
            model = DistributedDataParallel(model)
        elif engine == "plain":
            options["process_group"] = dist.group.WORLD
        else:
            options["fsdp2"] = thinwire.Fsdp2Options(shard(model))
        for method in ("maxmin", "topk"):
            try:
                thinwire.attach(model, REAL_ONLY[method], optimizer=sgd(model), **options)
            except ThinwireError as error:
                found[engine, method] = str(error)
    return found


def test_every_engine_refuses_at_attach(world2):
    for found in world2.run(_refused, timeout=180.0):
        assert all("parameter 'odd'" in found["plain", name] for name in UNSUPPORTED)
        for engine in ("ddp", "plain", "fsdp2"):
            assert all("parameter 'c' is complex64" in found[engine, method] for method in ("maxmin", "topk")), found


def _trained(rank, engine, names):
    found = []
    for name in names:
        model = Waves(seed=rank if engine == "plain" else 0)
        options, wrapped = {}, model
        if engine == "ddp":
            wrapped = DistributedDataParallel(model)
        elif engine == "plain":
            options["process_group"] = dist.group.WORLD
        else:
            options["fsdp2"] = thinwire.Fsdp2Options(shard(model))
        optimizer = sgd(model)
        wire = thinwire.attach(wrapped, LINEAR[name], optimizer=optimizer, **options)
        for step in range(3):
            optimizer.zero_grad()
            wrapped(batch(rank, step)).backward()
            optimizer.step()
            wire.load_state_dict(wire.state_dict())
        rows = [(row.wire_bytes, row.dense_bytes) for row in wire.ledger.rows]
        wire.detach()
        found.append((flat(model), rows))
    return found


@pytest.mark.parametrize("engine", ["ddp", "plain", "fsdp2"])
def test_complex_parameters_on_every_engine(world2, engine):
    names = ["dense", "dgc", "feedback"]
    for found in world2.run(_trained, engine, names, timeout=180.0):
        for name, (got, rows) in zip(names, found, strict=True):
            expected, ledger = simulated(LINEAR[name])
            assert torch.equal(got, expected), name
            assert [dense for _, dense in rows] == [row.dense_bytes for row in ledger.rows], name
            if engine == "plain":  # where others have a message for each dtype
                # without a wrapper dense messages say who used what: two ranks send as many bytes as there are
                said = 4 * header.size(len(list(Waves().parameters())), torch.float32) if name == "dense" else 0
                assert [sent for sent, _ in rows] == [row.wire_bytes + said for row in ledger.rows], name


class Companions(nn.Module):
    """Frozen parameters and buffers of all kinds, and a layer that trains."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 4)
        self.quarter = nn.Parameter(torch.randn(4).to(torch.float8_e4m3fn), requires_grad=False)
        self.held = nn.Parameter(Holds(torch.randn(4)), requires_grad=False)
        self.register_buffer("bytes", torch.randint(9, (3,), dtype=torch.uint8))
        self.register_buffer("truth", torch.rand(3) > 0.5)
        self.register_buffer("turns", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("neighbours", torch.eye(3).mul_(seed + 1.0).to_sparse())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.register_buffer("rows", torch.eye(3).mul_(seed + 2.0).to_sparse_csr())


def _beside(rank):
    model = Companions(rank)
    optimizer = torch.optim.SGD(model.linear.parameters(), lr=0.1)
    wire = thinwire.attach(model, thinwire.topk(0.5), optimizer=optimizer, process_group=dist.group.WORLD)
    model.linear(torch.ones(2, 4) * (rank + 1)).square().sum().backward()
    optimizer.step()
    wire.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = [model.neighbours.to_dense(), model.rows.to_dense(), torch.view_as_real(model.turns)]
    return [model.linear.weight.detach(), model.quarter.float(), model.held.inner, model.bytes, model.truth, *others]


def test_what_is_not_trained_may_be_of_any_kind(world2):
    first, second = world2.run(_beside, timeout=180.0)
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[-3], torch.eye(3))  # of the first rank
    assert torch.equal(first[2], Companions(0).held.inner)
