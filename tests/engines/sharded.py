"""Small models and training loops for FSDP2."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import thinwire


class Net(nn.Module):
    """Blocks of uneven sizes, a tied pair, a frozen layer, and a layer that may stay unused."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 45)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(45, 45), nn.Tanh()) for _ in range(2))
        self.tied = nn.Linear(45, 45, bias=False)
        self.also = nn.Linear(45, 45, bias=False)
        self.also.weight = self.tied.weight
        self.frozen = nn.Linear(45, 45).requires_grad_(False)
        self.spare = nn.Linear(45, 45)
        self.last = nn.Linear(45, 5)

    def forward(self, x: torch.Tensor, spare: bool = True) -> torch.Tensor:
        x = torch.tanh(self.inner(x))
        for block in self.blocks:
            x = x + block(x)
        x = x + self.also(torch.tanh(self.tied(x))) + self.frozen(x)
        return self.last(self.spare(x) if spare else x)


def data(worker: int, step: int) -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1000 * step + worker))


def loss_of(model: nn.Module, x: torch.Tensor, **options) -> torch.Tensor:
    return (model(x, **options) - x[:, :5].cumsum(1)).square().mean()


def mesh_of(replicas: int, shards: int):
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))


def build(mesh, optimizer="sgd", seed: int = 0, mixed: bool = False):
    """A sharded model and its optimizer; replicas begin alike."""
    torch.manual_seed(seed)
    model = Net()
    policy = MixedPrecisionPolicy(*((torch.bfloat16, torch.float32) if mixed else ()))
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"], mp_policy=policy)
    fully_shard(model, mesh=mesh["shard"], mp_policy=policy)
    params = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "adamw":
        return model, torch.optim.AdamW(params, lr=0.01)
    if optimizer == "1-bit":
        return model, thinwire.optim.OneBitAdam(params, lr=0.01, freeze_step=2)
    return model, torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def whole(model: nn.Module) -> torch.Tensor:
    """All parameters, gathered over the shards."""
    return torch.cat(
        [(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()]
    )


def grouped(options):
    """Options of attach, those of FSDP2 in their place."""
    sharded = {key: options[key] for key in ("replicate", "reduce_scatter", "all_gather") if key in options}
    rest = {key: value for key, value in options.items() if key not in sharded}
    return rest | ({"fsdp2": thinwire.Fsdp2Options(**sharded)} if sharded else {})


def train(
    rank,
    mesh,
    method=None,
    steps=20,
    optimizer="sgd",
    compiled=False,
    accumulate=1,
    clip=None,
    spare=True,
    mixed=False,
    **options,
):
    """All parameters after training, and the session; without a method, plain FSDP2."""
    model, opt = build(mesh, optimizer, mixed=mixed)
    if method is not None and mesh.size(0) > 1:
        options.setdefault("replicate", mesh["replicate"])
    wire = thinwire.attach(model, method, optimizer=opt, **grouped(options)) if method is not None else None
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for step in range(steps):
        for part in range(accumulate):
            model.set_requires_gradient_sync(part == accumulate - 1)
            (loss_of(run, data(rank, step * accumulate + part), spare=spare) / accumulate).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
    return model, opt, wire
