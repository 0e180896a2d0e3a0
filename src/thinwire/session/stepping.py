"""A session's hooks on its optimizers: around their steps, their settings and their checkpoints."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.comm.collectives import Collective
from thinwire.exchange.fused import warm_up_kernels
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker
from thinwire.methods.method import Method
from thinwire.session.changed_gradients import Touched
from thinwire.session.momentum_transfer import MomentumTransfer
from thinwire.session.optimizer_link import OptimizerLink
from thinwire.session.optimizer_loads import Loads
from thinwire.session.optimizers import Optimizers, each_of, holders
from thinwire.session.transaction import Scaler, Transaction


class Stepped(Protocol):
    """The part of a session that ``Stepping`` uses."""

    named: list[tuple[str, Tensor]]
    units: list[Unit]
    workers: list[Worker]
    method: Method
    collective: Collective
    transaction: Transaction
    timeout: float
    step: int
    loss_scale: float

    def commit(self, units: Sequence[Unit], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Commit these units, which have been stepped."""
        ...


class Stepping:
    """The optimizers of a session, with hooks on their steps and checkpoints.

    Args:
        session: the session that they step for.
        optimizer: one, several, or none.
        scaler: of the session.
    """

    def __init__(self, session: Stepped, optimizer: Optimizers | None, scaler: Scaler | None) -> None:
        self.session, self.optimizer = session, optimizer
        self.optimizer_link = OptimizerLink(optimizer)
        self.touched = Touched(scaler is not None and scaler.is_enabled())
        self.transfer: MomentumTransfer | None = None
        self._took = False
        self._loads: Loads | None = None
        self._rejoin = False
        self._stateful = False
        self._held: dict[int, list[Unit]] = {}

    # -- the method ------------------------------------------------------------------------------------------------

    def prepare(self, method: Method) -> MomentumTransfer | None:
        """Return the momentum transfer that the method needs, or None; nothing is changed.

        Raises:
            ThinwireError: the optimizers don't fit the method.
        """
        if self.transfer is not None:
            self.transfer.written()  # restores the settings if a step failed
        return MomentumTransfer(self.optimizer, method, self.session.named) if method.absorbs else None

    def leave(self, transfer: MomentumTransfer | None) -> None:
        """Give momentum back before the units change, if the next method does not own it. A collective call."""
        session, old = self.session, self.transfer
        if old is None:
            return
        old.follow(session.units, session.workers)
        if transfer is None:
            self.give_back(session.collective)

    def give_back(self, collective: Collective) -> None:
        """Put momentum back into the optimizers. A collective call."""
        transfer, self.transfer = self.transfer, None
        if transfer is not None:
            session = self.session
            transfer.give_back(session.units, session.workers, collective, session.timeout)

    def enter(self, transfer: MomentumTransfer | None, units: Sequence[Unit], method: Method) -> str | None:
        """Take the momentum for the new units; returns the message for the user, or None."""
        before, self.transfer = self.transfer, transfer
        self._stateful = any(rule.memory.stateful for rule in method.rules)
        held = holders(self.optimizer, self.session.named)
        self._held = {id(one): [u for u in units if held.get(u.name) is one] for one in each_of(self.optimizer)}
        if transfer is None or before is not None:
            return None
        self._took = transfer.take(units, self.session.workers)
        return transfer.moved()

    def start(self, cleanup: ExitStack) -> None:
        """Install the hooks on the optimizers; ``cleanup`` removes them."""
        for one in each_of(self.optimizer):
            cleanup.callback(one.register_step_pre_hook(self._before).remove)
            cleanup.callback(one.register_step_post_hook(self._after).remove)
        self._loads = Loads(self.optimizer, self._marked, self._loaded)
        cleanup.callback(self._loads.release)
        if self._took:
            self._loads.missing = None

    # -- the step --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check the optimizers before a step.

        Raises:
            ThinwireError: no memory can follow their settings.
        """
        if self.transfer is not None:
            self.transfer.check(self.session.units)
        self.optimizer_link.check()
        if self._loads is not None and torch.is_grad_enabled():
            self._loads.warn()

    def begin(self) -> None:
        """Begin an exchange: the optimizers' present settings apply to it."""
        session = self.session
        if self._rejoin and self._loads is not None and not self._loads.restored:
            self.optimizer_link.hold(True, session.units)
        self._rejoin = False
        if self._loads is not None:
            self._loads.begin()
        if self.transfer is not None and self.transfer.follow(session.units, session.workers):
            warm_up_kernels(session.units, session.workers[0].kernels)

    def exchanged(self) -> None:
        """Note that all gradients of the step have been exchanged."""
        self.touched.exchanged(self.session.units, self.session.method)

    def _before(self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        session, transaction = self.session, self.session.transaction
        pending = transaction.pending and not transaction.failed
        if pending:
            self.touched.look(optimizer, self._held[id(optimizer)], session.method, session.loss_scale)
        transaction.before_optimizer(optimizer, session.units, args, kwargs)
        if self.transfer is not None:
            self.transfer.before_step(optimizer, pending)

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.transfer is not None:
            self.transfer.after_step()
        if self.session.transaction.final(optimizer):
            if self._stateful:
                self.session.commit(self._held[id(optimizer)], optimizer)
            else:
                self.session.commit(self.session.units)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def restored(self) -> None:
        """Update the optimizers' side after the session has loaded its state."""
        self.optimizer_link.hold(True, ())
        for unit in self.session.units:
            unit.align(self.session.workers)
        if self.transfer is not None:
            self.transfer.seen = None
        if self._loads is not None:
            self._loads.complete()

    def _marked(self) -> int | None:
        step = self.session.step
        return step if self._stateful and (step > 0 or self._took) else None

    def _loaded(self) -> bool:
        """Move a loaded optimizer checkpoint's momentum into the memory; returns True if there was any."""
        self._rejoin = True
        if self.transfer is None:
            return False
        session = self.session
        session.transaction.void()
        self.transfer.follow(session.units, session.workers)
        return self.transfer.take(session.units, session.workers)
