"""Rounds of a session: the event that makes an exchange final, which a source hands to its session.

Each exchange begins a round. What ends it is the source's to say: it calls ``session.commit`` or ``session.undo``; an
exchange that neither followed is void when the next one begins. Here, the step of an optimizer ends a round.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch

from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import State
from thinwire.exchange.units import Unit
from thinwire.session.changed_gradients import Touched
from thinwire.session.optimizers import Optimizers, each_of

if TYPE_CHECKING:
    from thinwire.methods.method import Method
    from thinwire.session.session import Session

OnNonfinite: TypeAlias = Literal["skip", "raise", "zero"]
OnLost: TypeAlias = Literal["error", "continue"]


class Scaler(Protocol):
    """The part of ``torch.amp.GradScaler`` that a session uses."""

    def get_scale(self) -> float: ...
    def is_enabled(self) -> bool: ...


@dataclass(frozen=True)
class RoundState:
    """The state of a source in the middle of a round, for a checkpoint.

    Args:
        numbers: JSON that is equal on all ranks.
        local, shared: tensors by unit, each shaped like its parameter; ``shared`` ones are equal on all ranks.
        distance: a number of this rank.
    """

    numbers: str
    local: Mapping[str, State]
    shared: Mapping[str, State]
    distance: float = 0.0


class Rounds(ABC):
    """The end of the rounds of one session."""

    needs_optimizer = True
    """True if only the step of an optimizer can end a round in which a memory has changed its state."""
    optimizer: Optimizers | None = None
    """The optimizers that step the model, if the session is to see them."""
    scaled = False
    """True if a loss scaler scales the gradients."""
    loss_scale = 1.0
    """The factor that a loss scaler has put on the gradients of this round."""

    @abstractmethod
    def start(self, session: "Session", cleanup: ExitStack) -> None:
        """Begin to watch for the end of rounds; ``cleanup`` ends it."""

    @abstractmethod
    def begin(self) -> bool:
        """Begin a round with its exchange; returns True if only parts of the last one were committed."""

    @abstractmethod
    def exchanged(self) -> None:
        """Note that all of the round's exchange has arrived."""

    def end(self) -> None:  # noqa: B027
        """End a round that has begun, before the session is detached. All ranks call it together."""

    def state(self) -> RoundState | None:
        """Return what a checkpoint in the middle of a round needs, or None. All ranks call it together."""
        return None

    def fits(self, state: RoundState | None) -> None:
        """Raise a ``ThinwireError`` if a checkpoint's state can't be continued here; nothing is changed."""
        if state is not None:
            raise ThinwireError(
                "the checkpoint is of local updates, whose workers differ in the middle of a round; attach with local "
                "updates, load it, and detach(), after which all hold the same model"
            )

    def before_change(self, method: "Method") -> None:  # noqa: B027
        """Finish what is in flight before the method changes. All ranks call it together."""

    def restore(self, state: RoundState | None) -> None:  # noqa: B027
        """Continue a round from a checkpoint; None if it has none."""

    @abstractmethod
    def clear(self) -> None:
        """Clear what a failed exchange has left for those that have not used it yet."""


class OptimizerSteps(Rounds):
    """Rounds that end with the step of an optimizer, or with the exchange itself if there is none.

    Args:
        optimizer: whose step makes an exchange final; each of several optimizers commits the units that it steps.
        scaler: scales the loss, and skips steps.
        on_nonfinite: see ``thinwire.attach``.
    """

    session: "Session"

    def __init__(
        self, optimizer: Optimizers | None, scaler: Scaler | None = None, on_nonfinite: OnNonfinite = "skip"
    ) -> None:
        self.optimizer, self.scaler, self.on_nonfinite = optimizer, scaler, on_nonfinite
        self.each = each_of(optimizer)
        self.touched = Touched(self.scaled)
        self.done: list[torch.optim.Optimizer] = []
        """The optimizers whose step, taken or skipped, followed the exchange."""
        self._warned = False

    @property
    def scaled(self) -> bool:
        return self.scaler is not None and self.scaler.is_enabled()

    def start(self, session: "Session", cleanup: ExitStack) -> None:
        self.session = session
        for one in self.each:
            cleanup.callback(one.register_step_pre_hook(self._before).remove)
            cleanup.callback(one.register_step_post_hook(self._after).remove)

    def begin(self) -> bool:
        transaction = self.session.transaction
        self.loss_scale = self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else 1.0
        partly = transaction.pending and not transaction.failed and bool(self.done)
        if partly:
            left = [f"{type(one).__name__} ({i})" for i, one in enumerate(self.each) if not self._is_done(one)]
            note = (
                f"{', '.join(left)} did not step after the last exchange, where another of the {len(self.each)} "
                "optimizers did; what was exchanged for its parameters is void"
            )
            self.session.ledger.skipped += 1
            self.session.ledger.note(note)
            if not self._warned:
                self._warned = True
                warnings.warn(f"{note}. Step all of optimizer= after each backward that exchanges", stacklevel=3)
        self.done = []
        return partly

    def exchanged(self) -> None:
        self.touched.exchanged(self.session.units, self.session.method)
        if self.optimizer is None:
            self.session.commit(self.session.units)

    def clear(self) -> None:
        for optimizer in self.each:
            if not self._is_done(optimizer):
                _clear(optimizer)

    def _before(self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before an optimizer step: if the exchange failed, clear the gradients, so that the step does nothing."""
        session, transaction = self.session, self.session.transaction
        usable = transaction.pending and not transaction.failed
        if usable:
            self.touched.look(optimizer, self._stepped_by(optimizer), session.method, self.loss_scale)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None and any(unit.guarded for unit in session.units):
            raise ThinwireError(
                f"optimizer.step(closure) runs backward inside the step, where {session.ledger.method} could not take "
                "a step back; call backward first and step() without a closure"
            )
        if transaction.pending and transaction.failed:
            _clear(optimizer)  # only this one's: a scaler may still check the gradients of the others
            if self._all_done(optimizer):
                transaction.pending = False
            if self.on_nonfinite == "raise":
                raise ThinwireError(f"{transaction.complaint}; nothing has been changed by this step")
        if (transfer := session.optimizer_link.transfer) is not None:
            transfer.before_step(optimizer, usable)

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        session, transaction = self.session, self.session.transaction
        if session.optimizer_link.transfer is not None:
            session.optimizer_link.transfer.restore()
        if not transaction.pending or transaction.failed or self._is_done(optimizer):
            return
        # under a GradScaler, a fused optimizer steps even after an overflow, and its kernel changes nothing
        found_inf: Any = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        if session.optimizer_link.stateful:
            session.commit(self._stepped_by(optimizer), last=self._all_done(optimizer))
        else:
            session.commit(session.units)

    def _stepped_by(self, optimizer: torch.optim.Optimizer) -> Sequence[Unit]:
        """Return the units that this optimizer steps."""
        return self.session.optimizer_link.held[id(optimizer)]

    def _is_done(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(optimizer is one for one in self.done)

    def _all_done(self, optimizer: torch.optim.Optimizer) -> bool:
        """Mark this optimizer as done; returns True if all are."""
        if not self._is_done(optimizer):
            self.done.append(optimizer)
        return len(self.done) == len(self.each)


def _clear(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None
