"""The steps that ranks are at: which of them all know, and which a rank may be at that has left out an optimizer step.

Every exchange tells all ranks that they are at the same step. Before the next one each has made one optimizer step, or
none; so what must be equal on all ranks before anything is said (the sizes of messages, who leads) follows from
the last exchange that said so and the number of those since, never from a rank's own step.
"""

from collections.abc import Sequence


class Clock:
    """What all ranks know of their steps; ``turn`` and ``possible`` are equal on all of them."""

    def __init__(self) -> None:
        self._last = self._turn = 0

    def all_at(self, step: int) -> None:
        """The ranks have compared their steps, and are all here."""
        self._last = self._turn = step

    def met(self, step: int, final: bool) -> None:
        """All ranks were at ``step`` in an exchange, which ``final`` lets an optimizer step make so."""
        self._last, self._turn = step, step + final

    def unread(self) -> None:
        """An exchange has been made that said nothing of it, or that nobody waits to read: it may be a step or not."""
        self._turn += 1

    def turn(self) -> int:
        """The step that all ranks are taken to be at."""
        return self._turn

    def possible(self) -> Sequence[int]:
        """The first and the last of the steps that a rank can be at now."""
        return self._last, self._turn


def apart(steps: Sequence[int]) -> str:
    """Which ranks are at another step than rank 0; nothing, where none is."""
    others = [f"rank {rank} at {step}" for rank, step in enumerate(steps) if step != steps[0]]
    return f"rank 0 is at step {steps[0]}, {', '.join(others)}" if others else ""


def parted(step: int, others: str) -> str:
    """The error of a rank at ``step``, where ``apart`` says which ranks are not."""
    return (
        f"step {step}: the step clocks of the ranks have parted: {others}. Some ranks called optimizer.step() where "
        "others did not, so their weights differ too. Restart from the last checkpoint, and call optimizer.step() on "
        "all ranks or on none"
    )
