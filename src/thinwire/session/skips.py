"""Counts skipped steps, and makes the warning for a run that skips most of them."""

from collections import deque

ROW = 10
"""A warning is due after more than this many skipped steps in a row."""
LAST = 100
"""A warning is also due if more than half of this many last steps were skipped."""


class Skips:
    """The count of taken and skipped steps. It warns once, and again only after 10 taken steps in a row."""

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
        """Return the warning that is due now, or None."""
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
