"""Small models on the device under test, and ways of training them that must end alike."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines import sharded
from tests.engines.models import Net, batch, flat_parameters
from thinwire.comm.process_group import ProcessGroup

DEVICE = os.environ.get("THINWIRE_TEST_DEVICE", "cuda")
CUDA = DEVICE == "cuda"
STEPS = 12
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # in the ranks of a world too
torch.backends.cudnn.deterministic = True

METHODS = {
    "dense": thinwire.dense(),
    "topk": thinwire.topk(0.05, warmup=None),
    "dgc": thinwire.dgc(0.05, warmup=None),
    "powersgd": thinwire.powersgd(2, warmup=None),
    "qsgd": thinwire.qsgd(4),
    "signsgd": thinwire.signsgd(0.9),
}
SGD = {"signsgd": {"lr": 0.002, "momentum": 0.0}}
DRAWN = {"qsgd", "signsgd"}
"""Where a rounding decides what is sent, and may do so otherwise on another device."""


def build(seed: int = 0, device: str = DEVICE, **sgd) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(seed)
    model = Net().to(device)
    return model, torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **sgd})


def data(worker: int, step: int, device: str = DEVICE) -> torch.Tensor:
    return batch(worker, step).to(device)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x.mean((2, 3)).sum(1, keepdim=True)).square().mean()


def train(model, optimizer, steps: int = STEPS, worker: int = 0, first: int = 0) -> torch.Tensor:
    """Plain steps; answers the parameters, on the CPU."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, data(worker, step)).backward()
        optimizer.step()
    return flat_parameters(model).cpu()


def simulated(name: str, workers: int = 1, device: str = DEVICE, steps: int = STEPS, **options) -> torch.Tensor:
    """What so many workers of one process end with, on the CPU."""
    model, optimizer = build(device=device, **SGD.get(name, {}))
    thinwire.simulate(
        model, METHODS[name], optimizer=optimizer, batches=lambda worker, step: data(worker, step, device),
        loss=loss_of, workers=workers, steps=steps, **options,
    )  # fmt: skip
    return flat_parameters(model).cpu()


def apart(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> float:
    """How far two runs have ended from each other, as a part of how far they went."""
    assert a.isfinite().all()
    assert b.isfinite().all()
    went = (b - start).norm()
    assert went > 0, "nothing was trained"
    return float((a - b).norm() / went)


@contextlib.contextmanager
def counted():
    """The bytes of all messages that are given to the process group, which with one rank sends none of them."""
    found, before = [], {}
    for kind in ("all_reduce", "all_gather", "all_to_all", "broadcast"):
        before[kind] = getattr(ProcessGroup, kind)

        def count(self, message, *rest, own=before[kind]):
            found.append(message.nbytes)
            return own(self, message, *rest)

        setattr(ProcessGroup, kind, count)
    try:
        yield found
    finally:
        for kind, own in before.items():
            setattr(ProcessGroup, kind, own)


def attached(where: str, name: str, rank: int = 0, **options):
    """A model, its optimizer and the session; ``where``: under DDP, or bare."""
    model, optimizer = build(**SGD.get(name, {}))
    if where == "ddp":
        model = DistributedDataParallel(model, bucket_cap_mb=0.008)
    else:
        options["process_group"] = dist.group.WORLD
    return model, optimizer, thinwire.attach(model, METHODS[name], optimizer=optimizer, **options)


def trained(rank: int, where: str, name: str, steps: int = STEPS, **options):
    """Parameters, and what a test needs to know of the session."""
    model, optimizer, wire = attached(where, name, **options)
    with counted() as sent:
        parameters = train(model, optimizer, steps, rank)
    return parameters, closed(wire, sent, steps)


def closed(wire, sent, steps):
    ledger = wire.ledger
    facts = {
        "sent": sum(sent) / steps, "error": ledger.rows[0].error, "notes": ledger.notes, "kernels": ledger.kernels,
        "wire": ledger.wire_bytes, "dense": ledger.dense_bytes, "skipped": ledger.skipped,
    }  # fmt: skip
    wire.detach()
    return facts


def sharded_start(mesh, name: str):
    """An FSDP2 model on this mesh with sgd; the same weights on all ranks."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = sharded.Net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return model, sharded_sgd(model, name)


def sharded_sgd(model, name: str):
    own = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(own, **{"lr": 0.05, "momentum": 0.9, **SGD.get(name, {})})


def sharded_trained(rank: int, replicas: int, shards: int, name: str, steps: int = STEPS):
    """FSDP2 with replicas; the parameters, whole, and the facts."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(DEVICE, (replicas, shards), mesh_dim_names=("replicate", "shard"))
    model, optimizer = sharded_start(mesh, name)
    wire = thinwire.attach(
        model, METHODS[name], optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
    )
    with counted() as sent:
        for step in range(steps):
            sharded.loss_of(model, sharded.data(rank, step).to(DEVICE)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return sharded.whole(model).cpu(), closed(wire, sent, steps)


def sharded_simulated(name: str, workers: int = 1, device: str = DEVICE, groups: int = 1) -> torch.Tensor:
    """The same model whole; each of the workers, a replica, has the data of ``groups`` ranks."""
    torch.manual_seed(0)
    model = sharded.Net().to(device)

    def loss(model, step_of):
        worker, step = step_of
        each = [sharded.data(worker * groups + i, step).to(device) for i in range(groups)]
        return sum(sharded.loss_of(model, x) for x in each) / groups

    thinwire.simulate(
        model, METHODS[name], optimizer=sharded_sgd(model, name), batches=lambda worker, step: (worker, step),
        loss=loss, workers=workers, steps=STEPS,
    )  # fmt: skip
    return sharded.whole(model).cpu()
