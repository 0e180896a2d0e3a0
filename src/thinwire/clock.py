"""The steps that ranks are at: which of them all know, and which a rank may be at that has left out an optimizer step.

Every exchange tells all ranks that they are at the same step. Before the next one each has made one optimizer step, or
none; so what must be equal on all ranks before anything is said (the sizes of messages, who leads) follows from
the last exchange, never from a rank's own step.
"""

from collections.abc import Sequence


class Clock:
    """What this rank knows of the others' steps; ``turn`` and ``possible`` are equal on all ranks."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._turn = 0

    def all_at(self, step: int) -> None:
        """The ranks have compared their steps, and are all here."""
        self._last = self._turn = step

    def met(self, step: int, final: bool) -> None:
        """All ranks were at ``step`` in an exchange, which ``final`` lets an optimizer step make so."""
        self._last, self._turn = step, step + final

    def unread(self) -> None:
        """An exchange has been made that said nothing of it, or that nobody waits to read."""
        self._last = None

    def turn(self, step: int) -> int:
        """The step that all ranks are taken to be at; ``step`` is this rank's own, where nothing is known."""
        return step if self._last is None else self._turn

    def possible(self, step: int) -> Sequence[int]:
        """The steps that a rank can be at now."""
        return (step - 1, step, step + 1) if self._last is None else (self._last, self._turn)


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
