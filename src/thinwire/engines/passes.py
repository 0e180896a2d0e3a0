"""Begin, end and failure of backward passes, which autograd reports only to callbacks queued in the pass.

A callback runs when its graph task is done. Reentrant checkpointing (``use_reentrant=True``) runs a nested graph task.
The callback must be queued in the outer one, so it is queued before a nested one starts.
"""

from collections.abc import Callable
from weakref import ref

from thinwire.session.backward import queue


class Pass:
    """One backward pass. Only autograd holds it, so it is freed when the pass ends or fails."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended
        self.begun = False
        """True after the first gradient."""
        self.last = False

    def __call__(self) -> None:
        if self.last:
            self.ended()
            return
        self.last = True  # queue again, after FSDP2's callback, which still produces gradients
        queue(self)


class Passes:
    """The backward passes of one model, at most one at a time; ``ended`` is called at the end of each."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended
        self._now: ref[Pass] | None = None

    @property
    def now(self) -> Pass | None:
        return self._now() if self._now is not None else None

    def enter(self) -> Pass:
        """Return the current pass, or begin one. Only to be called in a backward pass."""
        if (now := self.now) is None:
            now = Pass(self.ended)
            queue(now)
            self._now = ref(now)
        return now

    def over(self) -> None:
        """Forget the current pass, which autograd may hold a moment longer."""
        self._now = None
