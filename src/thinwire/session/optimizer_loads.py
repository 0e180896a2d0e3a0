"""Marks in optimizer checkpoints that a session holds more state, and a warning if only the optimizer is loaded."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from thinwire.session.optimizers import Optimizers, each_of

MARK = "thinwire_step"
"""The key, in each parameter group of a checkpoint, of the step at which a session held state as well.

All ways to save an optimizer keep the groups and accept an int; an optimizer ignores the key."""


class Loads:
    """Marks the checkpoints of the optimizers, and checks those that they load.

    Args:
        optimizer: of a session.
        step: returns the step at which the session holds state; None if it holds none.
        loaded: called when an optimizer has loaded a checkpoint; returns True if that included the momentum.
    """

    def __init__(
        self,
        optimizer: Optimizers | None,
        step: Callable[[], int | None],
        loaded: Callable[[], bool],
    ) -> None:
        self.step, self.loaded = step, loaded
        self.missing: int | None = None
        """The step of a session state that has not been loaded, or None."""
        self.restored = False
        """True if the session state was loaded since the last exchange."""
        self.handles: list[Any] = []
        for one in each_of(optimizer):
            self._read(one)
            self.handles.append(one.register_state_dict_post_hook(self._mark))
            self.handles.append(one.register_load_state_dict_post_hook(self._load))

    def complete(self) -> None:
        """Note that the session has loaded its state."""
        self.restored, self.missing = True, None

    def begin(self) -> None:
        """Begin an exchange."""
        self.warn()
        self.restored = False

    def warn(self) -> None:
        """Warn once about a session state that was not loaded."""
        missing, self.missing = self.missing, None
        if missing is not None:
            warnings.warn(
                f"the optimizer's state is from step {missing} of a thinwire session, and the momentum and residuals "
                f"of step {missing}, which the session held, were not restored: training goes on without them. Save "
                "wire.state_dict() (or wire, with torch.distributed.checkpoint) beside the optimizer, and load it "
                "into the session after attach()",
                stacklevel=4,
            )

    def release(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _mark(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if (step := self.step()) is not None:
            for group in state["param_groups"]:
                group[MARK] = step

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        self._read(optimizer)
        if self.loaded():
            self.missing = None

    def _read(self, optimizer: torch.optim.Optimizer) -> None:
        marks = [group.pop(MARK, None) for group in optimizer.param_groups]
        steps = [mark for mark in marks if isinstance(mark, int)]
        self.missing = max(steps) if steps and not self.restored else None
