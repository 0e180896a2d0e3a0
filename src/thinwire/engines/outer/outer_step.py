"""The outer step: the maths of one anchor."""

import torch
from torch import Tensor

from thinwire.methods.local_settings import Local


def move(mean: Tensor, momentum: Tensor | None, local: Local) -> Tensor:
    """Return ``lr (mean + momentum m)`` or ``lr m`` with ``m = momentum m + mean``; ``m`` is updated in place.

    Args:
        mean: the mean update of all workers; may be overwritten.
        momentum: ``m``; None without outer momentum.
    """
    if momentum is None:
        return (mean if local.clip is None else mean.clamp_(-local.clip, local.clip)).mul_(local.lr)
    momentum.mul_(local.momentum).add_(mean)
    if local.clip is not None:
        momentum.clamp_(-local.clip, local.clip)
    step = mean.add_(momentum, alpha=local.momentum) if local.nesterov else momentum
    return torch.mul(step, local.lr)


def fragments_of(names: list[str], count: int) -> list[list[int]]:
    """Split parameters into ``count`` fragments: layers in turn, each with all of its parameters.

    A layer is what stands before the first number in a name, with that number: ``blocks.3`` of ``blocks.3.mlp.weight``;
    without a number, the parameter's module.
    """
    layers: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        path = name.split(".")
        number = next((j for j, part in enumerate(path) if part.isdigit()), None)
        layer = path[: number + 1] if number is not None else path[:-1] or path
        layers.setdefault(".".join(layer), []).append(i)
    parts = list(layers.values()) if len(layers) >= count else [[i] for i in range(len(names))]
    return [[i for part in parts[f::count] for i in part] for f in range(count)]
