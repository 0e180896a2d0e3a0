"""One worker's side of local updates: its parameters, its optimizer, and its buffers."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.core.interfaces import State
from thinwire.core.sharding import own
from thinwire.core.tensors import all_finite, float_at_least_32
from thinwire.optim.mean_adamw import MeanAdamW
from thinwire.session.optimizers import Optimizers, each_of


class Replica:
    """The parameters that one worker steps.

    Args:
        live: the model's parameters, which the optimizer knows, in the order of the session's units.
        optimizer: steps them.
        buffers: the floating-point buffers of the model.
    """

    def __init__(self, live: Sequence[Tensor], optimizer: Optimizers, buffers: Sequence[Tensor]) -> None:
        self.live, self.optimizer, self.buffers = live, optimizer, buffers

    @property
    def params(self) -> list[Tensor]:
        """This rank's parts of the worker's parameters."""
        return [own(param) for param in self.live]

    def states(self) -> list[Mapping[str, Any]]:
        """Return the inner optimizer's state of each parameter; empty before its first step."""
        found: dict[int, Mapping[str, Any]] = {}
        for one in each_of(self.optimizer):
            found |= {id(param): state for param, state in one.state.items()}
        return [found.get(id(param), {}) for param in self.live]

    def learning_rates(self) -> list[float]:
        """Return the present learning rate of each parameter."""
        rates = {id(p): float(group["lr"]) for group in self.optimizer.param_groups for p in group["params"]}
        return [rates[id(param)] for param in self.live]

    def moment_keys(self) -> list[str]:
        """Return the names of the optimizer's tensors that are shaped like their parameter."""
        pairs = zip(self.live, self.states(), strict=True)
        return sorted({key for param, state in pairs for key, value in state.items() if _is_like(key, value, param)})

    def moments(self, keys: Sequence[str]) -> list[Tensor]:
        """Return these tensors of every parameter; zeros where a parameter has none yet, which are not kept."""
        return [
            own(state[key]) if _is_like(key, state.get(key), param) else torch.zeros_like(own(param))
            for param, state in zip(self.live, self.states(), strict=True)
            for key in keys
        ]

    def state(self, i: int) -> State:
        """Return what differs between workers of one parameter: its value, and the optimizer's tensors of its shape."""
        param, state = self.live[i], self.states()[i]
        moments = {key: own(value) for key, value in state.items() if _is_like(key, value, param)}
        return {"parameter": self.params[i], **moments}

    def restore(self, i: int, saved: State) -> None:
        """Put back what ``state`` has returned; the optimizer must have loaded its own checkpoint."""
        param, state = self.live[i], self.states()[i]
        self.params[i].copy_(saved["parameter"])
        for key, value in saved.items():
            if key != "parameter" and _is_like(key, state.get(key), param):
                own(state[key]).copy_(value)

    def noise_scale(self) -> float | None:
        """Return the gradient noise scale, if the optimizer measures it."""
        each = [one.metrics() for one in each_of(self.optimizer) if isinstance(one, MeanAdamW)]
        return each[0].get("noise_scale") if len(each) == 1 else None

    def clear_nonfinite(self) -> int:
        """Forget the optimizer's state of each parameter in which a tensor is nonfinite; returns their number.

        All of it, since the rest may be huge; the optimizer begins with that parameter as in its first step.
        """
        pairs = zip(self.live, self.states(), strict=True)
        bad = [param for param, state in pairs if not all_finite(own(x) for x in _tensors(state))]
        for param in bad:
            self._forget(param)
        return len(bad)

    def _forget(self, param: Tensor) -> None:
        for one in each_of(self.optimizer):
            one.state.pop(param, None)


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]


def _is_like(key: str, value: Any, param: Tensor) -> bool:
    return key != "step" and isinstance(value, Tensor) and value.shape == param.shape


def sketching(optimizer: Optimizers) -> list[MeanAdamW]:
    """Return the optimizers that sum a sketch over the workers, and are due to do so."""
    return [one for one in each_of(optimizer) if isinstance(one, MeanAdamW) and one.due]


def floating(buffers: Iterable[Tensor]) -> list[Tensor]:
    """Return the buffers that can be averaged."""
    return [buffer for buffer in buffers if buffer.is_floating_point()]


def averaged(peers: Sequence[Any], each: Sequence[Sequence[Tensor]], timeout: float) -> None:
    """Average tensors over all workers, in place. All ranks call it together.

    Args:
        peers: the collective of each worker of this process.
        each: the tensors of each of them.
    """
    if not each or not each[0]:
        return
    dtypes = (float_at_least_32(tensor.dtype) for tensor in each[0])
    widest = functools.reduce(torch.promote_types, dtypes)
    flats = [torch.cat([tensor.flatten().to(widest) for tensor in tensors]) for tensors in each]
    started = [peer.all_reduce(flat) for peer, flat in zip(peers, flats, strict=True)]
    for arrived, tensors in zip(started, each, strict=True):
        mean = arrived.wait(timeout) / peers[0].world
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
