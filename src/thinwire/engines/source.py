"""Sources: a model before it is attached, and what a session exchanges of it."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from thinwire.comm.collectives import Collective, ControlChannel
from thinwire.comm.control import Together
from thinwire.comm.link import Link
from thinwire.methods.method import Method
from thinwire.session.optimizers import Optimizers
from thinwire.session.replicas import Replicas
from thinwire.session.rounds import OnNonfinite, OptimizerSteps, Rounds, Scaler
from thinwire.session.session import Session

Channel = TypeVar("Channel", bound=ControlChannel)


class Source(ABC, Generic[Channel]):
    """A model before it is attached; the session's parameters are those that ``exchanged`` returns."""

    channel: Channel
    """The control channel of all ranks of the model."""
    no_sync: Callable[[], contextlib.AbstractContextManager[None]]
    """Function that makes the context in which gradients add up, unsent; the session holds it."""
    shares = False
    """True if ``share`` makes all ranks' parameters equal; else they must be equal already."""

    @abstractmethod
    def exchanged(self) -> list[tuple[str, Tensor]]:
        """Return the parameters to exchange, by name; raises a ``ThinwireError`` if the model can't be attached."""

    def stepped(self, named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Return the parameters that an optimizer steps, of those that ``exchanged`` has returned."""
        return named

    def fits(self, method: Method) -> None:
        """Raise a ``ThinwireError`` if the method can't be used with this model."""
        return

    @abstractmethod
    def compared(self, every: int) -> Replicas:
        """Return the check of replicas, to be made after ``every`` exchanges."""

    @abstractmethod
    def collective(self, link: Link | None, together: Together) -> Collective:
        """Make the collective between workers; ``link`` is emulated. A collective call."""

    def rounds(self, optimizer: Optimizers | None, scaler: Scaler | None, on_nonfinite: OnNonfinite) -> Rounds:
        """Return the rounds of the session; see ``thinwire.attach`` for the arguments."""
        return OptimizerSteps(optimizer, scaler, on_nonfinite)

    def share(self, session: Session) -> None:
        """Give all ranks the parameters of the first one. A collective call."""
        return

    @abstractmethod
    def install(self, session: Session) -> None:
        """Install the hooks; the session's ``cleanup`` removes them."""
