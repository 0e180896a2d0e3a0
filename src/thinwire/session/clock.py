"""The step clock that all ranks share, and the range of steps that a rank may be at if it left out an optimizer step.

Every exchange confirms to all ranks that they are at the same step. Before the next exchange, each rank makes one
optimizer step or none. So what must be equal on all ranks before they communicate (message sizes, which rank leads) is
derived from the last confirmed step and the number of exchanges since, never from a rank's own step.
"""

from collections.abc import Sequence


class Clock:
    """The shared step clock; ``turn`` and ``possible`` are equal on all ranks."""

    def __init__(self) -> None:
        self._last = self._turn = 0

    def all_at(self, step: int) -> None:
        """Set the clock to ``step``, after all ranks have compared their steps."""
        self._last = self._turn = step

    def met(self, step: int, final: bool) -> None:
        """Record an exchange in which all ranks were at ``step``; ``final``: an optimizer step may commit it."""
        self._last, self._turn = step, step + final

    def unread(self) -> None:
        """Record an exchange whose step status is missing or not read, so it may become a step or not."""
        self._turn += 1

    def turn(self) -> int:
        """Return the step that all ranks are assumed to be at."""
        return self._turn

    def possible(self) -> Sequence[int]:
        """Return the first and the last step that a rank can be at now."""
        return self._last, self._turn


def apart(steps: Sequence[int]) -> str:
    """Return a text that lists the ranks at another step than rank 0; empty if there are none."""
    others = [f"rank {rank} at {step}" for rank, step in enumerate(steps) if step != steps[0]]
    return f"rank 0 is at step {steps[0]}, {', '.join(others)}" if others else ""


def parted(step: int, others: str) -> str:
    """Return the error text of a rank at ``step``; ``others`` is what ``apart`` returned."""
    return (
        f"step {step}: ranks are at different steps: {others}. Some ranks called optimizer.step() where "
        "others did not, so their weights differ too. Restart from the last checkpoint, and call optimizer.step() on "
        "all ranks or on none"
    )
