"""What a session does around the steps, the settings and the checkpoints of its optimizers."""

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
from thinwire.session.momentum_transfer import Handover
from thinwire.session.optimizer_link import Joint
from thinwire.session.optimizer_loads import Loads
from thinwire.session.optimizers import Optimizers, each_of, holders
from thinwire.session.transaction import Scaler, Transaction


class Stepped(Protocol):
    """What a session shows of itself."""

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
        """These units have been stepped."""
        ...


class Stepping:
    """The optimizers of a session, followed.

    Args:
        session: whose they are.
        optimizer: one, several, or none.
        scaler: of the session.
    """

    def __init__(self, session: Stepped, optimizer: Optimizers | None, scaler: Scaler | None) -> None:
        self.session, self.optimizer = session, optimizer
        self.joint = Joint(optimizer)
        self.touched = Touched(scaler is not None and scaler.is_enabled())
        self.handover: Handover | None = None
        self._took = False
        self._loads: Loads | None = None
        self._rejoin = False
        self._stateful = False
        self._held: dict[int, list[Unit]] = {}

    # -- the method ------------------------------------------------------------------------------------------------

    def prepare(self, method: Method) -> Handover | None:
        """What the method takes over from the optimizers, if it does; nothing is changed.

        Raises:
            ThinwireError: they don't fit.
        """
        if self.handover is not None:
            self.handover.written()  # where a step died
        return Handover(self.optimizer, method, self.session.named) if method.absorbs else None

    def leave(self, handover: Handover | None) -> None:
        """Before the units change: the momentum goes back where the next method has no place for it. Collective."""
        session, old = self.session, self.handover
        if old is None:
            return
        old.follow(session.units, session.workers)
        if handover is None:
            self.give_back(session.collective)

    def give_back(self, collective: Collective) -> None:
        """Put momentum back into the optimizers. A collective call."""
        handover, self.handover = self.handover, None
        if handover is not None:
            session = self.session
            handover.give_back(session.units, session.workers, collective, session.timeout)

    def enter(self, handover: Handover | None, units: Sequence[Unit], method: Method) -> str | None:
        """The units have changed; answers what to tell the user."""
        before, self.handover = self.handover, handover
        self._stateful = any(rule.memory.stateful for rule in method.rules)
        held = holders(self.optimizer, self.session.named)
        self._held = {id(one): [u for u in units if held.get(u.name) is one] for one in each_of(self.optimizer)}
        if handover is None or before is not None:
            return None
        self._took = handover.take(units, self.session.workers)
        return handover.moved()

    def start(self, cleanup: ExitStack) -> None:
        """Follow the optimizers until ``cleanup``."""
        for one in each_of(self.optimizer):
            cleanup.callback(one.register_step_pre_hook(self._before).remove)
            cleanup.callback(one.register_step_post_hook(self._after).remove)
        self._loads = Loads(self.optimizer, self._marked, self._loaded)
        cleanup.callback(self._loads.release)
        if self._took:
            self._loads.missing = None

    # -- the step --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Before a step.

        Raises:
            ThinwireError: the optimizers are asked for what no memory does.
        """
        if self.handover is not None:
            self.handover.check(self.session.units)
        self.joint.check()
        if self._loads is not None and torch.is_grad_enabled():
            self._loads.warn()

    def begin(self) -> None:
        """An exchange begins: what is written in the optimizers now counts for it."""
        session = self.session
        if self._rejoin and self._loads is not None and not self._loads.restored:
            self.joint.hold(True, session.units)
        self._rejoin = False
        if self._loads is not None:
            self._loads.begin()
        if self.handover is not None and self.handover.follow(session.units, session.workers):
            warm_up_kernels(session.units, session.workers[0].kernels)

    def exchanged(self) -> None:
        """All has arrived."""
        self.touched.exchanged(self.session.units, self.session.method)

    def _before(self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        session, transaction = self.session, self.session.transaction
        pending = transaction.pending and not transaction.failed
        if pending:
            self.touched.look(optimizer, self._held[id(optimizer)], session.method, session.loss_scale)
        transaction.before_optimizer(optimizer, session.units, args, kwargs)
        if self.handover is not None:
            self.handover.before_step(optimizer, pending)

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.handover is not None:
            self.handover.after_step()
        if self.session.transaction.final(optimizer):
            if self._stateful:
                self.session.commit(self._held[id(optimizer)], optimizer)
            else:
                self.session.commit(self.session.units)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def restored(self) -> None:
        """The session has loaded what it remembers."""
        self.joint.hold(True, ())
        for unit in self.session.units:
            unit.align(self.session.workers)
        if self.handover is not None:
            self.handover.seen = None
        if self._loads is not None:
            self._loads.complete()

    def _marked(self) -> int | None:
        step = self.session.step
        return step if self._stateful and (step > 0 or self._took) else None

    def _loaded(self) -> bool:
        """An optimizer has loaded a checkpoint: its momentum belongs to the memory."""
        self._rejoin = True
        if self.handover is None:
            return False
        session = self.session
        session.transaction.void()
        self.handover.follow(session.units, session.workers)
        return self.handover.take(session.units, session.workers)
