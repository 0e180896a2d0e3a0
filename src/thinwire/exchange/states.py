"""States in two copies, so that a step can be taken back bit for bit."""

from collections.abc import Set
from dataclasses import dataclass, field

from thinwire.core.interfaces import State


@dataclass
class TwoCopies:
    """A state as the last finished step left it (``now``), and as the step under way makes it (``next``).

    Two copies make a step that can be taken back bit for bit, without another pass over memory.
    """

    now: State = field(default_factory=State)
    next: State = field(default_factory=State)

    @staticmethod
    def of(state: State) -> "TwoCopies":
        """A fresh state, twice."""
        return TwoCopies(state, {key: value.clone() for key, value in state.items()})

    def align(self, rests: Set[str]) -> None:
        """Let ``next`` have the tensors that ``now`` has, of its own but for what ``rests``."""
        kept = {key: value for key, value in self.now.items() if key != "carried"}
        for key, value in kept.items():
            if key in rests:
                self.next[key] = value
            elif key not in self.next or self.next[key] is value:
                self.next[key] = value.clone()
        for key in self.next.keys() - kept.keys():
            del self.next[key]

    def commit(self) -> None:
        """The step is final; what only ``now`` had was for this step alone."""
        self.now, self.next = self.next, {key: value for key, value in self.now.items() if key in self.next}
