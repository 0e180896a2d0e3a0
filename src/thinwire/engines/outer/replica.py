"""One worker's side of local updates: its parameters, its optimizer, and its buffers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.core.interfaces import State
from thinwire.core.sharding import own
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

    def moments(self) -> list[Tensor]:
        """Return the optimizer's tensors that are shaped like a parameter."""
        return [
            own(value)
            for param, state in zip(self.live, self.states(), strict=True)
            for value in state.values()
            if _is_like(value, param)
        ]

    def state(self, i: int) -> State:
        """Return what differs between workers of one parameter: its value, and the optimizer's tensors of its shape."""
        param, state = self.live[i], self.states()[i]
        moments = {key: own(value) for key, value in state.items() if _is_like(value, param)}
        return {"parameter": self.params[i], **moments}

    def restore(self, i: int, saved: State) -> None:
        """Put back what ``state`` has returned; the optimizer must have loaded its own checkpoint."""
        param, state = self.live[i], self.states()[i]
        self.params[i].copy_(saved["parameter"])
        for key, value in saved.items():
            if key != "parameter" and _is_like(state.get(key), param):
                own(state[key]).copy_(value)

    def noise_scale(self) -> float | None:
        """Return the gradient noise scale, if the optimizer measures it."""
        each = [one.metrics() for one in each_of(self.optimizer) if isinstance(one, MeanAdamW)]
        return each[0].get("noise_scale") if len(each) == 1 else None

    def clear_nonfinite(self) -> int:
        """Clear the optimizer's nonfinite tensors, so that the next step is sound; returns their number."""
        bad = [moment for moment in self.moments() if not bool(moment.isfinite().all())]
        for moment in bad:
            moment.zero_()
        return len(bad)


def _is_like(value: Any, param: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == param.shape and value.ndim > 0


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
    flats = [torch.cat([tensor.flatten().float() for tensor in tensors]) for tensors in each]
    started = [peer.all_reduce(flat) for peer, flat in zip(peers, flats, strict=True)]
    for arrived, tensors in zip(started, each, strict=True):
        mean = arrived.wait(timeout) / peers[0].world
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
