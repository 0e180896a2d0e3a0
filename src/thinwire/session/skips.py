"""Counts skipped steps, and says loudly when a run does little else."""

from collections import deque

ROW = 10
"""Skipped steps in a row above which it is said."""
LAST = 100
"""Of so many last steps more than half."""


class Skips:
    """Steps that were taken or skipped. A spell of skipping is said once, and ends with 10 taken in a row."""

    def __init__(self) -> None:
        self._last: deque[bool] = deque(maxlen=LAST)
        self._row = 0
        self._taken = 0
        self._said = False

    def skip(self) -> None:
        self._row += 1
        self._taken = 0
        self._last.append(True)

    def take(self) -> None:
        self._row = 0
        self._taken += 1
        self._last.append(False)
        if self._taken >= ROW:
            self._said = False

    def complaint(self, why: str) -> str | None:
        """What to say now, if anything."""
        most = sum(self._last) if len(self._last) == LAST and not self._said else 0
        if self._said or (self._row <= ROW and most <= LAST // 2):
            return None
        self._said = True
        what = f"{self._row} steps in a row" if self._row > ROW else f"{most} of the last {LAST} steps"
        return (
            f"{what} have been skipped: {why or 'no step of the attached optimizer followed the exchange'}. Lower the "
            "learning rate or go back to a checkpoint where gradients are not finite, hand a GradScaler to "
            "attach(scaler=), step with the attached optimizer; attach(on_nonfinite='raise') stops at the first one"
        )
