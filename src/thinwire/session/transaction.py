"""Transactions: an exchange prepares a step, which is final only when its round ends, on all ranks or on none.

If any rank's gradient is nonfinite, or the round does not end, the prepared state is void on all ranks.

Every exchange confirms to all ranks that they are at the same step. Before the next exchange, each rank ends the round
or leaves it out. So what must be equal on all ranks before they communicate (message sizes, which rank leads) is
derived from the last confirmed step and the number of exchanges since, never from a rank's own step.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch

from thinwire.coding.header import SLOTS
from thinwire.comm.texts import known_to_all
from thinwire.core.errors import ThinwireError
from thinwire.exchange.status import StepStatus, unused
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker
from thinwire.report.ledger import Ledger

MOST_IN_A_ROW = 10
"""A warning is due after more than this many skipped steps in a row."""
LAST = 100
"""A warning is also due if more than half of this many last steps were skipped."""


class Policy(Protocol):
    """A policy that looks at a session after each step, and may change its method."""

    def after_step(self, session: Any) -> None:
        """Act after an optimizer step; call ``session.set_method`` on all ranks or on none."""


class Transaction:
    """The exchange that is not final yet; ``ledger`` records skipped steps."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.pending = False
        """True if nothing has made the last exchange final."""
        self.failed = False
        """True if a gradient of the exchange was nonfinite on any rank, or the exchange was refused."""
        self.complaint = ""
        """The reason why the last exchange failed."""
        self.statuses: list[StepStatus] = []
        """The statuses of the current step, equal on all ranks."""
        self.looked = False
        """True if this rank has read the statuses."""
        self.turn = 0
        """The step that all ranks are assumed to be at, equal on all of them."""
        self.confirmed = 0
        """The last step at which all ranks have said to be."""
        self.skips = Skips()
        self._idle = 0

    def all_at(self, step: int) -> None:
        """Set the step clock, after all ranks have compared their steps."""
        self.confirmed = self.turn = step

    def begin(self, partly: bool = False) -> int:
        """Begin an exchange; returns how many before it, in a row, are void because no optimizer step followed."""
        idle = self.pending and not self.failed
        self.pending = self.failed = False  # gradients are not cleared: they belong to the next step by now
        self.statuses = []
        self.looked = False
        if not idle or partly:
            return 0
        self.ledger.skipped += 1
        self.skips.add(True)
        self.complaint = ""
        self._idle += 1
        return self._idle

    def end(
        self,
        step: int,
        across_shards: Callable[[Sequence[bool]], Sequence[bool]] = list,
        nonfinite: bool = False,
        steps: Callable[[], Sequence[int]] = list,
        apart_within_node: bool = False,
    ) -> None:
        """End the exchange, when all of it has arrived; ``steps`` returns the steps of all ranks, a collective call.

        ``across_shards`` maps flags of this rank to those that are True on any rank across shards. ``nonfinite``: True
        if something was that no step status reports; ``apart_within_node``: if ranks that share messages are apart.
        """
        self.pending = self.looked = True
        each = [torch.stack([status.apart, status.nonfinite.any()]) for status in self.statuses]
        said: list[list[bool]] = []  # read with one synchronization for all
        if each:
            said = cast(Any, torch.stack([one.to(each[0].device) for one in each])).tolist()
        differ = apart_within_node or any(differs for differs, _ in said)
        for status, (_, failed) in zip(self.statuses, said, strict=True):
            if failed and not differ and not self.failed:
                sender, unit = (int(i) for i in status.nonfinite.nonzero()[0])
                rank = f"rank {sender}" if status.nonfinite.shape[0] > 1 else "some rank"
                self._fail(f"step {step}: the gradient of {status.units[unit].name} is not finite on {rank}")
        if nonfinite and not self.failed:
            self._fail(f"step {step}: a gradient is not finite before it is reduced")
        differ, failed, *slots = across_shards((differ, self.failed, *(step % SLOTS == i for i in range(SLOTS))))
        if differ or sum(slots) > 1:
            self.compare(steps(), step)
        if failed and not self.failed:
            self._fail(f"step {step}: the gradient of another shard is not finite")
        if said:
            self.confirmed, self.turn = step, step + (not self.failed)
        else:
            self.turn += 1

    def end_unread(self) -> None:
        """End an exchange that nothing waits for: its step status is not read, so it may become a step or not."""
        self.pending = True
        self.turn += 1

    def compare(self, steps: Sequence[int], step: int) -> None:
        """Compare the steps of all ranks, and set the clock to them; see ``check_steps``."""
        self.check_steps(steps, step)
        self.all_at(step)

    def check_steps(self, steps: Sequence[int], step: int) -> None:
        """Refuse the exchange if the steps of the ranks differ."""
        if any(other != steps[0] for other in steps):
            others = ", ".join(f"rank {rank} at {other}" for rank, other in enumerate(steps) if other != steps[0])
            self.refuse(
                f"step {step}: ranks are at different steps: rank 0 is at step {steps[0]}, {others}. Some ranks called "
                "optimizer.step() where others did not, so their weights differ too. Restart from the last checkpoint, "
                "and call optimizer.step() on all ranks or on none"
            )

    def refuse(self, complaint: str) -> None:
        """Raise a ``ThinwireError``, the same on all ranks; the end of this round then changes nothing."""
        self.pending = self.failed = True
        self.complaint = complaint
        raise known_to_all(ThinwireError(complaint))

    def _fail(self, complaint: str) -> None:
        self.ledger.skipped += 1
        self.skips.add(True)
        self.failed = True
        self.complaint = complaint
        self.ledger.note(f"{complaint}; skipped on all ranks")

    def commit(self, units: Sequence[Unit], workers: Sequence[Worker], last: bool) -> None:
        """Commit the prepared state of these units, but of those that no rank used; ``last``: it ends the round."""
        if last:
            self.pending = False
            self.skips.add(False)
        self._idle = 0
        idle = unused(self.statuses) if self.looked else set[str]()  # unread statuses: no unit has state
        for unit in units:
            if unit.name not in idle:
                for state in unit.states(workers):
                    state.commit()


class Skips:
    """The count of taken and skipped steps. It warns once, and again only after 10 taken steps in a row."""

    def __init__(self) -> None:
        self._last: deque[bool] = deque(maxlen=LAST)
        self._skipped = self._taken = 0  # in a row
        self._said = False

    def add(self, skipped: bool) -> None:
        self._skipped, self._taken = (self._skipped + 1, 0) if skipped else (0, self._taken + 1)
        self._last.append(skipped)
        if self._taken >= MOST_IN_A_ROW:
            self._said = False

    def warning(self, why: str) -> str | None:
        """Return the warning that is due now, or None."""
        most = sum(self._last) if len(self._last) == LAST and not self._said else 0
        if self._said or (self._skipped <= MOST_IN_A_ROW and most <= LAST // 2):
            return None
        self._said = True
        what = (
            f"{self._skipped} steps in a row" if self._skipped > MOST_IN_A_ROW else f"{most} of the last {LAST} steps"
        )
        return (
            f"{what} have been skipped: {why or 'no step of the attached optimizer followed the exchange'}. Lower the "
            "learning rate or go back to a checkpoint where gradients are not finite, hand a GradScaler to "
            "attach(scaler=), step with the attached optimizer; attach(on_nonfinite='raise') stops at the first one"
        )
