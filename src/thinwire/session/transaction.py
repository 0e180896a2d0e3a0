"""A step is all or nothing: an exchange is prepared, and final only when the optimizer has stepped.

Where any rank's gradient was not finite, or the optimizer skips the step, what was prepared is void on all ranks.
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
    """What a session asks of ``torch.amp.GradScaler``."""

    def get_scale(self) -> float: ...
    def is_enabled(self) -> bool: ...


def check_options(timeout: float, on_nonfinite: OnNonfinite) -> None:
    """Raises a ``ThinwireError`` where one of them is none of those that ``thinwire.attach`` takes."""
    if not timeout > 0:
        raise ThinwireError(f"timeout is {timeout}; it is in seconds and must be above 0")
    if on_nonfinite not in ("skip", "raise"):
        raise ThinwireError(f"on_nonfinite is {on_nonfinite!r}; choose 'skip' or 'raise'")


class Policy(Protocol):
    """Decides beside the path: looks at what a session did, and may change its method."""

    def after_step(self, session: Any) -> None:
        """The optimizer has stepped, on all ranks; ``session.set_method`` may be called if all of them do."""


class Transaction:
    """What has been exchanged and is not yet final.

    Args:
        optimizer: whose step makes it final; of several, each what it steps.
        ledger: where skipped steps are written down.
        on_nonfinite: see ``thinwire.attach``.
    """

    def __init__(self, optimizer: Optimizers | None, ledger: Ledger, on_nonfinite: OnNonfinite) -> None:
        self.each = each_of(optimizer)
        self.ledger = ledger
        self.on_nonfinite = on_nonfinite
        self.pending = False
        """An exchange has been made that no optimizer step has made final."""
        self.failed = False
        """A gradient of it was not finite, on any rank."""
        self.statuses: list[StepStatus] = []
        """What all ranks learned in the step under way."""
        self.looked = False
        """This rank has waited to read them."""
        self.clock = Clock()
        self.done: list[torch.optim.Optimizer] = []
        """The optimizers that have stepped, or left out their step, since the exchange."""
        self.skips = Skips()
        self._idle = 0
        self._warned = False
        self._complaint = ""

    def begin(self) -> int:
        """A new exchange; answers how many before it, in a row, are void because no optimizer step followed."""
        idle = self.pending and not self.failed
        done, self.done = self.done, []
        self.pending = self.failed = False  # gradients stay: by now they are those of the next step
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
        """Some optimizers have stepped since the exchange, and others have not."""
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
        """What a run that skips most of its steps is to say now."""
        return self.skips.complaint(self._complaint)

    def end(
        self,
        step: int,
        beside: Callable[[Sequence[bool]], Sequence[bool]] = list,
        bad: bool = False,
        steps: Callable[[], Sequence[int]] = list,
        parted_inside: bool = False,
    ) -> None:
        """All of it has arrived.

        Args:
            beside: whether each is so on any rank with another part of the model, from what is so on this one.
            bad: whether something was not finite of which no message tells.
            steps: asks all ranks which step they are at.
            parted_inside: whether ranks that share messages are at different steps.

        Raises:
            ThinwireError: the ranks are not at the same step.
        """
        self.pending = self.looked = True
        said = self._said()
        differ = parted_inside or any(differs for differs, _ in said)
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
        """All of it is on its way to where nobody waits for it: what it says, a step can't wait for."""
        self.pending = True
        self.clock.unread()

    def _said(self) -> list[list[bool]]:
        """Of each verdict, whether ranks are at different steps and anything is bad; one wait for all of them."""
        each = [torch.stack([s.apart, s.nonfinite.any()]) for s in self.statuses]
        return cast(Any, torch.stack([one.to(each[0].device) for one in each])).tolist() if each else []

    def compare(self, steps: Sequence[int], step: int) -> None:
        """Look at the steps that all ranks are at.

        Raises:
            ThinwireError: they differ; a step of the optimizer changes nothing now.
        """
        if others := apart(steps):
            self.refuse(parted(step, others))
        self.clock.all_at(step)

    def refuse(self, complaint: str) -> None:
        """Raise an error, the same on all ranks, after which a step of the optimizer changes nothing.

        Raises:
            ThinwireError: always.
        """
        self.pending = self.failed = True
        self._complaint = complaint
        raise known_to_all(ThinwireError(complaint))

    def _fail(self, status: StepStatus, step: int) -> None:
        if self.failed:  # said of another message already
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
        """An optimizer is about to step: not where a gradient was not finite. Without gradients it does nothing."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None and any(unit.guarded for unit in units):
            raise ThinwireError(
                f"optimizer.step(closure) runs backward inside the step, where {self.ledger.method} could not take a "
                "step back; call backward first and step() without a closure"
            )
        if self.pending and self.failed:
            _clear(optimizer)  # not the others': a scaler may still have to look at their gradients
            if self._all_done(optimizer):
                self.pending = False
            if self.on_nonfinite == "raise":
                raise ThinwireError(f"{self._complaint}; nothing has been changed by this step")

    def void(self) -> None:
        """What was prepared will never be final, and gradients that are not finite are not left to the optimizer."""
        if self.pending and self.failed:
            for optimizer in self.each:
                if not any(optimizer is one for one in self.done):
                    _clear(optimizer)
        self.pending = False

    def _all_done(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this is the last of the optimizers."""
        if not any(optimizer is one for one in self.done):
            self.done.append(optimizer)
        return len(self.done) == len(self.each)

    def final(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the step of this optimizer that has just ended makes what it stepped so.

        A fused optimizer steps under a ``GradScaler`` even where it finds an overflow; the scaler then hands it
        ``found_inf``, and its kernel changes nothing.
        """
        if not self.pending or self.failed or any(optimizer is one for one in self.done):
            return False
        found_inf: Any = getattr(optimizer, "found_inf", None)
        return not (found_inf is not None and bool(found_inf))

    def commit(
        self, units: Sequence[Unit], workers: Sequence[Worker], optimizer: torch.optim.Optimizer | None = None
    ) -> bool:
        """What was prepared of these units is final; answers whether all of the step is.

        Args:
            units: those that ``optimizer`` has stepped. One that no rank used has not been touched.
            optimizer: None where none is followed.
        """
        if optimizer is None or self._all_done(optimizer):
            self.pending = False
            self.skips.take()
        self._idle = 0
        idle = unused(self.statuses) if self.looked else set[str]()  # else nothing is remembered
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
