"""When a backward pass begins, ends or dies, which autograd tells nobody but whoever has queued a callback in it.

A callback runs when its graph task is done. Recomputing a checkpointed module may run a graph task inside another
(``use_reentrant=True``), so the first to ask is not always asked from the outer one: whoever recomputes asks before.
"""

from collections.abc import Callable
from weakref import ref

from thinwire.session.backward import queue


class Pass:
    """One backward pass. Only autograd holds it, so it is gone when the pass is over, be it by an error."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended
        self.begun = False
        """Whether it has brought gradients."""
        self.last = False

    def __call__(self) -> None:
        if self.last:
            self.ended()
            return
        self.last = True  # FSDP2 may have queued its own after this, and that still brings gradients
        queue(self)


class Passes:
    """The passes of one model; at most one is under way.

    Args:
        ended: called at the end of each.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended
        self._now: ref[Pass] | None = None

    @property
    def now(self) -> Pass | None:
        return self._now() if self._now is not None else None

    def enter(self) -> Pass:
        """The pass under way, which begins here if none is. Only inside a backward pass."""
        if (now := self.now) is None:
            now = Pass(self.ended)
            queue(now)
            self._now = ref(now)
        return now

    def over(self) -> None:
        """Autograd may hold the pass a moment longer."""
        self._now = None
