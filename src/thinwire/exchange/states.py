"""States in two copies, so that a step can be undone bit for bit."""

from collections.abc import Set
from dataclasses import dataclass, field

from thinwire.core.interfaces import State


@dataclass
class TwoCopies:
    """A state after the last finished step (``now``), and the one that the current step writes (``next``).

    With two copies, a step can be undone bit for bit without another pass over memory.
    """

    now: State = field(default_factory=State)
    next: State = field(default_factory=State)

    @staticmethod
    def of(state: State) -> "TwoCopies":
        """Return both copies of a fresh state."""
        return TwoCopies(state, {key: value.clone() for key, value in state.items()})

    def align(self, rests: Set[str]) -> None:
        """Give ``next`` the same keys as ``now``: copies, but for ``rests``, keys whose tensor both share."""
        kept = {key: value for key, value in self.now.items() if key != "pending_residual"}
        for key, value in kept.items():
            if key in rests:
                self.next[key] = value
            elif key not in self.next or self.next[key] is value:
                self.next[key] = value.clone()
        for key in self.next.keys() - kept.keys():
            del self.next[key]

    def commit(self) -> None:
        """Make the step final: swap the copies. Keys that only ``now`` had were for this step, and are dropped."""
        self.now, self.next = self.next, {key: value for key, value in self.now.items() if key in self.next}
