"""Changes of a parameter's memory layout: its state is laid out again, element by element."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.core.capabilities import moved
from thinwire.core.tensors import flat
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker


def follow(
    units: Sequence[Unit],
    workers: Sequence[Worker],
    strides: Mapping[str, tuple[int, ...]],
    optimizer: Callable[[Unit], Mapping[str, Any]],
) -> None:
    """Lay out the state of some units as their parameters are now.

    Args:
        strides: the parameters' earlier strides, by name.
        optimizer: returns the optimizer state of a unit, if the optimizer is part of the method.
    """
    for unit in units:
        _follow(unit, workers, strides[unit.name], optimizer(unit))


@torch.no_grad()
def _follow(unit: Unit, workers: Sequence[Worker], strides: tuple[int, ...], optimizer: Mapping[str, Any]) -> None:
    like, packed = unit.own, unit.init_packed()
    copies = [unit.shared, *(worker.local[unit.name] for worker in workers)]
    for state in (state for both in copies for state in (both.now, both.next)):
        for key, value in state.items():
            if key not in packed and value.shape == like.shape:
                state[key] = _laid(value, like)
    for value in optimizer.values():
        if isinstance(value, Tensor) and value.shape == like.shape:
            value.data = _laid(value, like)
    if packed:
        places = torch.arange(like.numel(), device=like.device).as_strided(like.shape, strides)
        order = flat(_laid(places, like))
        for state in (unit.shared.now, unit.shared.next):
            before = {key: state[key] for key in packed}
            state.update(moved(unit.method_compressor, before, packed, order))


def _laid(value: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
