"""Transfer of momentum and weight decay from SGD optimizers to the memories, and back.

A value that a user or a scheduler writes into a parameter group counts from the next exchange on. It stays there except
during ``step()``: then the group has no momentum and no weight decay, because the exchanged gradient includes both.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.collectives import Collective
from thinwire.core import Memory, ThinwireError, registry
from thinwire.core.interfaces import feeds_back
from thinwire.core.memory_capabilities import Absorbed, OwnsMomentum, absorb, absorbed, give_buffer, take_buffer
from thinwire.core.sharding import own, wrapped
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker
from thinwire.methods.method import Method
from thinwire.session.optimizers import Optimizers, each_of, holders, kind_of

log = logging.getLogger("thinwire")
warn_once = cache(log.warning)
"""Log a text once in this process."""

CLEARED: dict[str, Any] = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
WRITTEN = (*CLEARED, "dampening", "maximize")
INSTEAD = (
    "thinwire.topk(density) works with every optimizer, and so do thinwire.lean(bits_per_parameter, momentum=False), "
    "thinwire.dense() and thinwire.cast()"
)


class MomentumTransfer:
    """The momentum transfer of a model's SGD optimizers: takes their settings, follows changes, and gives them back.

    Exchanged parameters that the method does not compress may have another optimizer, which keeps its momentum.
    """

    def __init__(self, optimizer: Optimizers | None, method: Method, named: Sequence[tuple[str, Tensor]]) -> None:
        self.method = method.name
        self.names = {id(param): name for name, param in named}
        held = holders(optimizer, named)
        self.each = [one for one in each_of(optimizer) if isinstance(one, torch.optim.SGD)]
        if not self.each:
            raise ThinwireError(
                f"{method.name} owns the momentum and needs torch.optim.SGD, not {kind_of(optimizer)}; {INSTEAD}"
            )
        memories = {name: method.rule(name, param.shape, param.numel()).memory for name, param in named}
        self.held = {name: one for name, one in held.items() if isinstance(one, torch.optim.SGD)}
        self.others = held.keys() - self.held.keys()
        for name, memory in memories.items():
            if name in self.others and isinstance(memory, OwnsMomentum) and feeds_back(memory):
                raise ThinwireError(
                    f"{method.name} compresses {name!r} and owns its momentum, and its optimizer is "
                    f"{type(held[name]).__name__}; give it to the torch.optim.SGD, or name it in keep_dense= "
                    f"({INSTEAD})"
                )
        self.not_absorbing = {
            name: type(memory).__name__ for name, memory in memories.items() if not isinstance(memory, OwnsMomentum)
        }
        self.settings = self.read()
        self._check_nothing_is_lost(self.settings)
        self.seen: list[tuple[Any, ...]] | None = None
        """The settings of the groups that the memories follow."""
        self.inside: list[tuple[dict[str, Any], dict[str, Any]]] = []
        """The groups whose optimizer is in its step, and their settings outside of it."""
        self.warned = False

    # -- the settings ----------------------------------------------------------------------------------------------

    def written(self) -> list[tuple[Any, ...]]:
        """Return the number of parameters and the settings of each group now."""
        self.restore()
        groups = [group for optimizer in self.each for group in optimizer.param_groups]
        return [(len(group["params"]), *(group[key] for key in WRITTEN)) for group in groups]

    def read(self) -> dict[str, Absorbed]:
        """Return the optimizer settings of each parameter, by name, if the memories can follow them."""
        settings = {name: Absorbed() for name in self.others}
        for i, group in enumerate(group for optimizer in self.each for group in optimizer.param_groups):
            if group["dampening"] or group["maximize"]:
                raise ThinwireError(
                    f"{self.method} follows SGD with dampening=0 and maximize=False; the optimizer has "
                    f"dampening={group['dampening']}, maximize={group['maximize']} ({INSTEAD})"
                )
            own = Absorbed(float(group["momentum"]), bool(group["nesterov"]), float(group["weight_decay"]))
            for param in group["params"]:
                if name := self.names.get(id(param)):
                    settings[name] = own
                elif param.requires_grad:
                    raise ThinwireError(
                        f"the optimizer also holds a parameter of shape {tuple(param.shape)} (in group {i}) that is "
                        f"not exchanged here and would lose its momentum to {self.method}; give it an optimizer of its "
                        "own, or, where it belongs to this model, detach() before you add a group and attach again"
                    )
        if missing := [name for name in self.names.values() if name not in settings]:
            raise ThinwireError(
                f"parameter {missing[0]!r} is not in the optimizer ({len(missing)} are missing); {self.method} moves "
                "momentum into its memory and needs the optimizer of all parameters that require a gradient"
            )
        return settings

    def check(self, units: Sequence[Unit]) -> None:
        """Raise a ``ThinwireError`` if the memories can't follow the settings of the groups."""
        if self.written() != self.seen:
            settings = self.read()
            self._check_nothing_is_lost(settings)
            for unit in units:
                absorb(unit.memory, settings[unit.name])

    def _check_nothing_is_lost(self, settings: Mapping[str, Absorbed]) -> None:
        """Raise a ``ThinwireError`` if momentum would be taken from a parameter whose memory has none."""
        for name, memory in self.not_absorbing.items():
            if settings[name].momentum or settings[name].weight_decay:
                raise ThinwireError(
                    f"{self.method} takes momentum and weight decay out of the optimizer, and {name!r} would lose "
                    f"them, since its memory is {memory}; give its rule thinwire.memories.Momentum(), or the parameter "
                    "a group without both"
                )

    def follow(self, units: Sequence[Unit], workers: Sequence[Worker]) -> bool:
        """Apply the settings of the groups to the memories; returns True if the kind of any memory's settings changed.

        Not to be called while an exchange waits for its step, because the prepared state would be lost.
        """
        if (now := self.written()) == self.seen:
            return False
        self.settings, self.seen = self.read(), now
        other, made = False, dict[tuple[int, Absorbed], tuple[Memory, Memory]]()
        for unit in units:
            old, settings = unit.memory, self.settings[unit.name]
            if not isinstance(old, OwnsMomentum) or old.absorbed == settings:
                continue
            _, new = made.setdefault((id(old), settings), (old, absorb(old, settings)))  # one for many units
            other |= old.absorbed.kind != settings.kind
            unit.go_on_with(new, workers)
        return other

    # -- the step --------------------------------------------------------------------------------------------------

    def before_step(self, optimizer: torch.optim.Optimizer, pending: bool) -> None:
        """Clear momentum and weight decay for the step; ``pending``: True if the step uses exchanged gradients."""
        if not any(optimizer is one for one in self.each):
            return
        if pending and not self.warned and self.written() != self.seen:
            self.warned = True
            warnings.warn(
                f"momentum or weight decay was changed in the optimizer between backward and step; {self.method} "
                "has exchanged with what was there before, so the change counts from the next backward on: change it "
                "after optimizer.step(), as a scheduler does",
                stacklevel=4,
            )
        self.restore()
        for group in optimizer.param_groups:
            self.inside.append((group, {key: group[key] for key in CLEARED}))
            group.update(CLEARED)

    def restore(self) -> None:
        """Restore the settings, also after a failed step; settings that were written during the step stay."""
        for group, written in self.inside:
            group.update({key: value for key, value in written.items() if group[key] == CLEARED[key]})
        self.inside.clear()

    # -- momentum --------------------------------------------------------------------------------------------------

    def take(self, units: Sequence[Unit], workers: Sequence[Worker]) -> bool:
        """Move the momentum buffers into the memories; returns True if there were any."""
        found = False
        for unit in units:
            holder = self.held.get(unit.name)
            buffer = holder.state.get(unit.param, {}).pop("momentum_buffer", None) if holder is not None else None
            if buffer is not None:
                found = True
                for worker in workers:
                    take_buffer(unit.memory, own(buffer), worker.local[unit.name].now, unit.shared.now)
                unit.align(workers)
        return found

    def give_back(
        self, units: Sequence[Unit], workers: Sequence[Worker], collective: Collective, timeout: float
    ) -> None:
        """Put momentum back into the optimizers, averaged so that replicas stay equal. A collective call."""
        self.restore()
        for unit in units:
            buffer = averaged_buffer(unit, workers, collective, timeout)
            holder = self.held.get(unit.name)
            if buffer is not None and holder is not None:
                holder.state[unit.param]["momentum_buffer"] = wrapped(buffer.to(unit.own.dtype, copy=True), unit.param)


@contextlib.contextmanager
def remembering(units: Sequence[Unit]) -> Generator[Callable[[Any], Any]]:
    """Yield a function that gives the memories of these units the settings that a checkpoint was saved with.

    The function returns the checkpoint. After an error the memories are restored. The settings in the optimizer apply
    again at the next exchange.
    """
    before = [unit.memory for unit in units]

    def adopted(given: Any) -> Any:
        state: Any = given
        for unit in units:
            with contextlib.suppress(Exception):  # errors are reported when the checkpoint is read
                plan = (state if isinstance(given, Mapping) else state[0])["plan"][unit.name]
                settings = absorbed(registry.from_json(json.loads(plan)["memory"], registry.MEMORIES))
                if absorbed(unit.memory) is not None and settings is not None:
                    unit.memory = absorb(unit.memory, settings)
        return state

    try:
        yield adopted
    except BaseException:
        for unit, memory in zip(units, before, strict=True):
            unit.memory = memory
        raise


def averaged_buffer(unit: Unit, workers: Sequence[Worker], collective: Collective, timeout: float) -> Tensor | None:
    """Return a unit's SGD momentum buffer, equal on all ranks; waits ``timeout`` seconds. A collective call."""
    parts = [give_buffer(unit.memory, worker.local[unit.name].now, unit.shared.now) for worker in workers]
    shared = parts[0][1]
    if local := [part for part, _ in parts if part is not None]:
        buffer = averaged(local, collective, timeout)
        shared = buffer if shared is None else buffer + shared
    return shared


def averaged(local: Sequence[Tensor], collective: Collective, timeout: float) -> Tensor:
    """Return the mean over all ranks; ``local`` has the tensors of the ranks in this process. A collective call."""
    mean = torch.stack(list(local)).sum(0).mul_(1.0 / collective.world)
    return collective.all_reduce(mean).wait(timeout) if len(local) < collective.world else mean
