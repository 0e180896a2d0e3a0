"""Transactions: an exchange prepares a step, which is final only when the optimizer has stepped.

If any rank's gradient is nonfinite, or the optimizer skips the step, the prepared state is void on all ranks.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch

from thinwire.coding.header import SLOTS
from thinwire.comm.texts import known_to_all
from thinwire.core.errors import ThinwireError
from thinwire.exchange.status import StepStatus, unused
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker
from thinwire.report.ledger import Ledger
from thinwire.session.clock import Clock, apart, parted
from thinwire.session.optimizers import Optimizers, each_of
from thinwire.session.skips import Skips

OnNonfinite: TypeAlias = Literal["skip", "raise"]


class Scaler(Protocol):
    """The part of ``torch.amp.GradScaler`` that a session uses."""

    def get_scale(self) -> float: ...
    def is_enabled(self) -> bool: ...


class Policy(Protocol):
    """A policy that looks at a session after each step, and may change its method."""

    def after_step(self, session: Any) -> None:
        """Act after an optimizer step; call ``session.set_method`` on all ranks or on none."""


class Transaction:
    """The exchange that is not final yet.

    Args:
        optimizer: whose step makes it final; each of several optimizers commits the units that it steps.
        ledger: records skipped steps.
        on_nonfinite: see ``thinwire.attach``.
    """

    def __init__(self, optimizer: Optimizers | None, ledger: Ledger, on_nonfinite: OnNonfinite) -> None:
        self.each = each_of(optimizer)
        self.ledger = ledger
        self.on_nonfinite = on_nonfinite
        self.pending = False
        """True if no optimizer step has made the last exchange final."""
        self.failed = False
        """True if a gradient of the exchange was nonfinite on any rank, or the exchange was refused."""
        self.statuses: list[StepStatus] = []
        """The statuses of the current step, equal on all ranks."""
        self.looked = False
        """True if this rank has read the statuses."""
        self.clock = Clock()
        self.done: list[torch.optim.Optimizer] = []
        """The optimizers whose step, taken or skipped, followed the exchange."""
        self.skips = Skips()
        self._idle = 0
        self._warned = False
        self._complaint = ""

    def begin(self) -> int:
        """Begin an exchange; returns how many before it, in a row, are void because no optimizer step followed."""
        idle = self.pending and not self.failed
        done, self.done = self.done, []
        self.pending = self.failed = False  # gradients are not cleared: they belong to the next step by now
        self.statuses = []
        self.looked = False
        if not idle:
            return 0
        if done:
            self._say_partial(done)
            return 0
        self.ledger.skipped += 1
        self.skips.skip()
        self._complaint = ""
        self._idle += 1
        return self._idle

    def _say_partial(self, done: Sequence[torch.optim.Optimizer]) -> None:
        """Note and warn that only some optimizers have stepped since the exchange."""
        left = [one for one in self.each if not any(one is other for other in done)]
        each = [f"{type(one).__name__} ({i})" for i, one in enumerate(self.each) if any(one is other for other in left)]
        self.ledger.skipped += 1
        note = (
            f"{', '.join(each)} did not step after the last exchange, where another of the {len(self.each)} optimizers "
            "did; what was exchanged for its parameters is void"
        )
        self.ledger.note(note)
        if not self._warned:
            self._warned = True
            warnings.warn(f"{note}. Step all of optimizer= after each backward that exchanges", stacklevel=4)

    def complaint(self) -> str | None:
        """Return the warning that is due because most steps are skipped, or None."""
        return self.skips.complaint(self._complaint)

    def end(
        self,
        step: int,
        beside: Callable[[Sequence[bool]], Sequence[bool]] = list,
        bad: bool = False,
        steps: Callable[[], Sequence[int]] = list,
        apart_within_node: bool = False,
    ) -> None:
        """End the exchange, when all of it has arrived.

        Args:
            beside: maps flags of this rank to those that are True on any rank across shards.
            bad: True if something was nonfinite that no step status reports.
            steps: returns the steps of all ranks. A collective call.
            apart_within_node: True if ranks that share messages are at different steps.

        Raises:
            ThinwireError: the ranks are not at the same step.
        """
        self.pending = self.looked = True
        said = self._said()
        differ = apart_within_node or any(differs for differs, _ in said)
        for status, (_, failed) in zip(self.statuses, said, strict=True):
            if failed and not differ:
                self._fail(status, step)
        if bad and not self.failed:
            self._complain(f"step {step}: a gradient is not finite before it is reduced")
        differ, failed, *slots = beside((differ, self.failed, *(step % SLOTS == i for i in range(SLOTS))))
        if differ or sum(slots) > 1:
            self.compare(steps(), step)
        if failed and not self.failed:
            self._complain(f"step {step}: the gradient of another shard is not finite")
        if said:
            self.clock.met(step, not self.failed)
        else:
            self.clock.unread()

    def end_unread(self) -> None:
        """End an exchange that nothing waits for: its step status is not read."""
        self.pending = True
        self.clock.unread()

    def _said(self) -> list[list[bool]]:
        """Return [ranks at different steps, anything nonfinite] of each step status, with one synchronization."""
        each = [torch.stack([s.apart, s.nonfinite.any()]) for s in self.statuses]
        return cast(Any, torch.stack([one.to(each[0].device) for one in each])).tolist() if each else []

    def compare(self, steps: Sequence[int], step: int) -> None:
        """Compare the steps of all ranks.

        Raises:
            ThinwireError: they differ; the next optimizer step changes nothing.
        """
        if others := apart(steps):
            self.refuse(parted(step, others))
        self.clock.all_at(step)

    def refuse(self, complaint: str) -> None:
        """Raise an error, the same on all ranks; the next optimizer step then changes nothing.

        Raises:
            ThinwireError: always.
        """
        self.pending = self.failed = True
        self._complaint = complaint
        raise known_to_all(ThinwireError(complaint))

    def _fail(self, status: StepStatus, step: int) -> None:
        if self.failed:  # another status was reported already
            return
        sender, unit = (int(i) for i in status.nonfinite.nonzero()[0])
        rank = f"rank {sender}" if status.nonfinite.shape[0] > 1 else "some rank"
        self._complain(f"step {step}: the gradient of {status.units[unit].name} is not finite on {rank}")

    def _complain(self, complaint: str) -> None:
        self.ledger.skipped += 1
        self.skips.skip()
        self.failed = True
        self._complaint = complaint
        self.ledger.note(f"{self._complaint}; skipped on all ranks")

    def before_optimizer(
        self, optimizer: torch.optim.Optimizer, units: Sequence[Unit], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Before an optimizer step: if the exchange failed, clear the gradients, so that the step does nothing."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None and any(unit.guarded for unit in units):
            raise ThinwireError(
                f"optimizer.step(closure) runs backward inside the step, where {self.ledger.method} could not take a "
                "step back; call backward first and step() without a closure"
            )
        if self.pending and self.failed:
            _clear(optimizer)  # only this one's: a scaler may still check the gradients of the others
            if self._all_done(optimizer):
                self.pending = False
            if self.on_nonfinite == "raise":
                raise ThinwireError(f"{self._complaint}; nothing has been changed by this step")

    def void(self) -> None:
        """Make the prepared state void; after a failed exchange, clear the gradients that were not stepped."""
        if self.pending and self.failed:
            for optimizer in self.each:
                if not any(optimizer is one for one in self.done):
                    _clear(optimizer)
        self.pending = False

    def _all_done(self, optimizer: torch.optim.Optimizer) -> bool:
        """Mark this optimizer as done; returns True if all are."""
        if not any(optimizer is one for one in self.done):
            self.done.append(optimizer)
        return len(self.done) == len(self.each)

    def final(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return True if the step that this optimizer has just ended makes its units final.

        Under a ``GradScaler``, a fused optimizer steps even after an overflow: the scaler sets ``found_inf``, and the
        kernel changes nothing.
        """
        if not self.pending or self.failed or any(optimizer is one for one in self.done):
            return False
        found_inf: Any = getattr(optimizer, "found_inf", None)
        return not (found_inf is not None and bool(found_inf))

    def commit(
        self, units: Sequence[Unit], workers: Sequence[Worker], optimizer: torch.optim.Optimizer | None = None
    ) -> bool:
        """Commit the prepared state of these units; returns True if the whole step is final.

        Args:
            units: those that ``optimizer`` has stepped. Units that no rank used are not committed.
            optimizer: None to commit the whole step.
        """
        if optimizer is None or self._all_done(optimizer):
            self.pending = False
            self.skips.take()
        self._idle = 0
        idle = unused(self.statuses) if self.looked else set[str]()  # unread statuses: no unit has state
        for unit in units:
            if unit.name not in idle:
                unit.shared.commit()
                for worker in workers:
                    worker.local[unit.name].commit()
        return not self.pending


def _clear(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None
