"""The model of a plan, its data, and its optimizer. Every layer adds a term of its own to the loss."""

import torch
from torch import Tensor, nn

import thinwire
from tests.plans.ambient import ambient
from tests.plans.plan import Layer, Plan

WIDTH = 12
"""Of the batch."""


class Tied(nn.Module):
    """Two modules with one matrix."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(size, size), nn.Linear(size, size, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(x)))


class Bare(nn.Module):
    """A parameter of any shape: 0-d, empty, one element, or with its dimensions in another order in memory."""

    def __init__(self, sizes: tuple[int, ...], turned: bool = False) -> None:
        super().__init__()
        drawn = torch.randn(sizes[::-1]).permute(*reversed(range(len(sizes)))) if turned else torch.randn(sizes)
        self.weight = nn.Parameter(drawn)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.mean() + self.weight.square()


def module_of(layer: Layer) -> nn.Module:
    kind, sizes = layer.kind, layer.sizes
    if kind in ("linear", "large"):
        module: nn.Module = nn.Linear(*sizes)
    elif kind == "tied":
        module = Tied(*sizes)
    elif kind == "conv2d":
        module = nn.Conv2d(*sizes)
    elif kind == "conv3d":
        module = nn.Conv3d(*sizes)
    elif kind == "embedding":
        module = nn.Embedding(*sizes, sparse=layer.sparse)
    elif kind == "norm":
        module = nn.LayerNorm(*sizes)
    elif kind == "batchnorm":
        module = nn.BatchNorm1d(*sizes)
    else:
        module = Bare(sizes, kind == "turned")
    module = module.to(getattr(torch, layer.dtype))
    if layer.channels_last:
        module = module.to(memory_format=torch.channels_last if kind == "conv2d" else torch.channels_last_3d)
    return module.requires_grad_(not layer.frozen)


def inputs(layer: Layer, x: Tensor) -> Tensor:
    """What goes into a layer, out of the batch ``[samples, WIDTH]``."""
    dtype, flat = getattr(torch, layer.dtype), x.flatten()
    if layer.kind == "embedding":
        return (flat.abs() * 1000).long() % layer.sizes[0]

    def shaped(*shape: int) -> Tensor:
        return (
            flat.repeat(-(-torch.Size(shape).numel() // flat.numel()))[: torch.Size(shape).numel()]
            .view(shape)
            .to(dtype)
        )

    if layer.kind == "conv2d":
        return shaped(2, layer.sizes[0], 5, 4)
    if layer.kind == "conv3d":
        return shaped(2, layer.sizes[0], 3, 4, 3)
    if layer.kind in ("linear", "large", "tied", "norm", "batchnorm"):
        return shaped(4, layer.sizes[0])
    return x.to(dtype)


def takes_part(layer: Layer, worker: int, workers: int, step: int, part: int, parts: int) -> bool:
    return {
        "always": True,
        "zero": True,
        "never": False,
        "even ranks": worker % 2 == 0,
        "last rank": worker == workers - 1,
        "even steps": step % 2 == 0,
        "last part": part == parts - 1,
        "first part": part == 0,
    }[layer.used]


class Model(nn.Module):
    """The others see the first layer's answer and the batch, so its gradients come last."""

    def __init__(self, plan: Plan, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.plan = plan
        with ambient("float32"):  # so that all models of a plan begin alike
            self.layers = nn.ModuleList(module_of(layer) for layer in plan.layers)

    def forward(self, x: Tensor, worker: int, step: int, part: int) -> Tensor:
        """The loss of one micro-batch."""
        plan, total, seen = self.plan, x.new_zeros(()), x
        for i, (layer, module) in enumerate(zip(plan.layers, self.layers, strict=True)):
            if not takes_part(layer, worker, plan.workers, step, part, plan.accumulate):
                continue
            out = module(inputs(layer, x if layer.kind == "embedding" else seen)).float()
            if i == 0:
                seen = x + torch.tanh(out).mean()
            if layer.used == "zero" and worker == 0:
                out = out * 0.0
            total = total + (out - 0.5).square().sum() / max(1, out.numel())
        return total


def batch(plan: Plan, rank: int, step: int, part: int) -> Tensor:
    generator = torch.Generator().manual_seed(((plan.seed * 101 + step) * 7 + part) * 11 + rank)
    return torch.randn(4, WIDTH, generator=generator, dtype=torch.float32)


def loss(plan: Plan, model: nn.Module, rank: int, step: int, part: int) -> Tensor:
    """A share of the step's loss; infinite where the plan says so."""
    value = model(batch(plan, rank, step, part), plan.worker_of(rank), step, part) * (plan.scale / plan.accumulate)
    return value * torch.inf if plan.nonfinite == (step, rank) and part == 0 else value


def optimizer_of(plan: Plan, model: nn.Module) -> torch.optim.Optimizer:
    """Of all parameters, in one group or two; frozen ones too, as most scripts have it."""
    kind, options = plan.optimizer["kind"], plan.optimizer["options"]
    params = list(model.parameters())
    groups = [{"params": params}]
    if plan.optimizer["groups"] == 2 and len(params) > 1:
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": options["lr"] / 2}]
    return getattr(thinwire.optim if hasattr(thinwire.optim, kind) else torch.optim, kind)(groups, **options)
