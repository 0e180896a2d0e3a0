"""The hand-over of momentum and weight decay between an SGD optimizer and the memories, and back."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from thinwire.core import Absorbed
from thinwire.exchange.collectives import Collective
from thinwire.sharding import own, wrapped
from thinwire.tensors import ThinwireError
from thinwire.units import Unit, Worker

log = logging.getLogger("thinwire")
warn_once = cache(log.warning)
"""Log a text the first time that this process has it."""

MOVED = ("momentum", "nesterov", "weight_decay")
CLEARED: dict[str, Any] = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}


class Handover:
    """What was taken out of an optimizer, so that it can be put back."""

    def __init__(self, optimizer: torch.optim.Optimizer | None, method: str, named: Mapping[str, Tensor]) -> None:
        self.optimizer = check(optimizer, method)
        self.names = {id(param): name for name, param in named.items()}
        self.settings = self._read(method)
        self.handles: list[Any] = []
        self.taken = [{key: group[key] for key in MOVED} for group in self.optimizer.param_groups]

    def _read(self, method: str) -> dict[str, Absorbed]:
        settings: dict[str, Absorbed] = {}
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if name := self.names.get(id(param)):
                    settings[name] = Absorbed(group["momentum"], group["nesterov"], group["weight_decay"])
                elif param.requires_grad:
                    raise ThinwireError(
                        f"the optimizer also holds a parameter of shape {tuple(param.shape)} that is not exchanged "
                        f"here and would lose its momentum to {method}; give it an optimizer of its own"
                    )
        if missing := [name for name in self.names.values() if name not in settings]:
            raise ThinwireError(
                f"parameter {missing[0]!r} is not in the optimizer ({len(missing)} are missing); {method} moves "
                "momentum into its memory and needs the optimizer of all parameters that require a gradient"
            )
        return settings

    def take(self, units: Sequence[Unit], workers: Sequence[Worker]) -> str:
        """Move the settings and the momentum buffers into the memories; answers what to tell the user."""
        for unit in units:
            buffer = self.optimizer.state.get(unit.param, {}).pop("momentum_buffer", None)
            if buffer is not None:
                for worker in workers:
                    unit.memory.take_buffer(own(buffer), worker.local[unit.name].now, unit.shared.now)
        self.handles = [
            self.optimizer.register_state_dict_post_hook(self._complete),
            self.optimizer.register_load_state_dict_post_hook(self._retake),
        ]
        self._clear()
        found = "; ".join(sorted({f"{s.momentum:g}, {s.nesterov}, {s.weight_decay:g}" for s in self.settings.values()}))
        return f"momentum, nesterov, weight_decay ({found}) moved from the optimizer into the memory until detach()"

    def give_back(
        self, units: Sequence[Unit], workers: Sequence[Worker], collective: Collective, timeout: float
    ) -> None:
        """Put settings and momentum back, the latter averaged so that replicas stay equal. A collective call."""
        for group, taken in zip(self.optimizer.param_groups, self.taken, strict=False):
            group.update(taken)
        for unit in units:
            buffer = averaged_buffer(unit, workers, collective, timeout)
            if buffer is not None:
                buffer = buffer.to(unit.own.dtype, copy=True)
                self.optimizer.state[unit.param]["momentum_buffer"] = wrapped(buffer, unit.param)
        self.release()

    def release(self) -> None:
        """Follow the optimizer's checkpoints no longer."""
        for handle in self.handles:
            handle.remove()

    def _clear(self) -> None:
        for group in self.optimizer.param_groups:
            group.update(CLEARED)

    def _complete(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """A checkpoint of the optimizer says what is really done, not that there is no momentum."""
        for group, taken in zip(state["param_groups"], self.taken, strict=False):
            group.update(taken)

    def _retake(self, optimizer: torch.optim.Optimizer) -> None:
        """What a checkpoint put back into the optimizer belongs to the memory."""
        found = [{key: group[key] for key in MOVED} for group in optimizer.param_groups]
        self._clear()
        if found[: len(self.taken)] != self.taken:
            raise ThinwireError(
                f"the checkpoint's optimizer has {found}, the one attached had {self.taken}; load it before attach()"
            )

    def check_untouched(self) -> None:
        """Momentum that a scheduler writes into the optimizer would be applied twice."""
        for group in self.optimizer.param_groups:
            for key, cleared in CLEARED.items():
                if group[key] != cleared:
                    raise ThinwireError(
                        f"the optimizer's {key} is {group[key]} again, but it lives in the memory now and would be "
                        "applied twice; use a scheduler that leaves it alone (in OneCycleLR: cycle_momentum=False), "
                        "and detach() before you add a parameter group"
                    )


_owners: WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[Any]] = WeakKeyDictionary()


def check_optimizer(
    optimizer: torch.optim.Optimizer | None, named: Sequence[tuple[str, Tensor]], owner: object, method: str
) -> None:
    """One optimizer steps all exchanged parameters, and those of one session only.

    Raises:
        ThinwireError: there is none, another session is attached to it, or it lacks a parameter.
    """
    if optimizer is None:
        raise ThinwireError(
            f"{method} remembers what it did not send, and what a step changes in that is final only when the "
            "optimizer steps; pass optimizer="
        )
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if missing := [name for name, param in named if id(param) not in held]:
        raise ThinwireError(
            f"parameter {missing[0]!r} is not in the optimizer ({len(missing)} are missing); what {method} remembers "
            "of a parameter is final when its optimizer steps, so one optimizer must hold all of them"
        )
    known = _owners.get(optimizer)
    other = known() if known is not None else None
    if other is not None and other is not owner:
        raise ThinwireError("this optimizer is attached to another model; give each model an optimizer of its own")
    _owners[optimizer] = weakref.ref(owner)


def release_optimizer(optimizer: torch.optim.Optimizer | None, owner: object) -> None:
    """Another session may have it, if this one had."""
    known = _owners.get(optimizer) if optimizer is not None else None
    if optimizer is not None and known is not None and known() is owner:
        del _owners[optimizer]


def averaged_buffer(unit: Unit, workers: Sequence[Worker], collective: Collective, timeout: float) -> Tensor | None:
    """The SGD momentum buffer of a unit, equal on all ranks; waits ``timeout`` seconds. A collective call."""
    parts = [unit.memory.give_buffer(worker.local[unit.name].now, unit.shared.now) for worker in workers]
    shared = parts[0][1]
    if local := [part for part, _ in parts if part is not None]:
        buffer = averaged(local, collective, timeout)
        shared = buffer if shared is None else buffer + shared
    return shared


def averaged(local: Sequence[Tensor], collective: Collective, timeout: float) -> Tensor:
    """The mean over all ranks, of which the tensors of those in this process are given. A collective call."""
    mean = torch.stack(list(local)).sum(0).mul_(1.0 / collective.world)
    if len(local) < collective.world:
        mean = collective.all_reduce(mean).awaited(timeout)
    return mean


def check(optimizer: torch.optim.Optimizer | None, method: str) -> torch.optim.SGD:
    """The optimizer, if it is one whose momentum can be moved."""
    instead = (
        "thinwire.topk(density) works with every optimizer, and so do thinwire.lean(bits_per_parameter, "
        "momentum=False), thinwire.dense() and thinwire.cast()"
    )
    if optimizer is None:
        raise ThinwireError(
            f"{method} owns the momentum; pass optimizer= the torch.optim.SGD of this model ({instead})"
        )
    if not isinstance(optimizer, torch.optim.SGD):
        raise ThinwireError(
            f"{method} owns the momentum and needs torch.optim.SGD, not {type(optimizer).__name__}; {instead}"
        )
    for group in optimizer.param_groups:
        if group["dampening"] or group["maximize"]:
            raise ThinwireError(
                f"{method} follows SGD with dampening=0 and maximize=False; the optimizer has "
                f"dampening={group['dampening']}, maximize={group['maximize']} ({instead})"
            )
    return optimizer
