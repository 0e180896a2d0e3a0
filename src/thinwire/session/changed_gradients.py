"""Detects gradients that change between the exchange and the optimizer step, where the method does not allow it.

A method that owns the momentum gives the optimizer a delayed velocity or the momentum itself. Clipping or rescaling it
loses what is not sent again. So the gradient norms are compared, at a few steps only.
"""

import math
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import islice
from traceback import walk_stack
from typing import Any, cast

import torch
from torch import Tensor

from thinwire.core.memory_capabilities import traits_of
from thinwire.core.sharding import own
from thinwire.core.tensors import float_at_least_32
from thinwire.exchange.units import Unit
from thinwire.methods.method import Method
from thinwire.session.backward import in_backward, queue

FIRST, EVERY = 10, 100
"""Steps that are checked: the first 10, then powers of two and every hundredth."""


class Touched:
    """Compares the gradient norms after the exchange with those just before the optimizer step.

    ``scaled``: True if the session has an enabled scaler, which may unscale the gradients in between.
    """

    def __init__(self, scaled: bool) -> None:
        self.scaled = scaled
        self.exchanges = 0
        self.warned = False
        self.before: dict[str, Tensor] = {}
        """The gradient norms after the exchange, if this step is checked; else empty."""

    def exchanged(self, units: Sequence[Unit], method: Method) -> None:
        """Record the norms of a checked step, at the end of the backward pass, when its gradients are complete."""
        self.before = {}
        if self.warned or not (
            method.absorbs or any(traits_of(rule.memory).gives != "gradient" for rule in method.rules)
        ):
            return  # the optimizer gets plain gradients
        self.exchanges += 1
        n = self.exchanges
        if n <= FIRST or n % EVERY == 0 or n & (n - 1) == 0:
            record = partial(self._record, units)  # called when all ``.grad`` are final, after the other callbacks
            if in_backward():
                queue(lambda: queue(record))
            else:
                record()

    def _record(self, units: Sequence[Unit]) -> None:
        self.before = {unit.name: _norm(unit.param.grad) for unit in units if unit.param.grad is not None}

    def look(self, optimizer: torch.optim.Optimizer, units: Sequence[Unit], method: Method, loss_scale: float) -> None:
        """Compare the norms and warn once; ``units`` are those that this optimizer steps."""
        looked = [unit for unit in units if unit.name in self.before]
        if self.warned or not looked:
            return
        if not self.scaled and _in_scaler(optimizer):
            self._warn(
                f"a GradScaler scales this loss and attach() was not given it: {method.name} remembers gradients with "
                "the scale in them, which changes, and takes them for updates; pass attach(..., scaler=scaler)"
            )
            return
        now = [torch.zeros(()) if unit.param.grad is None else _norm(unit.param.grad) for unit in looked]
        both = [*(self.before[unit.name] for unit in looked), *now]
        stacked: Any = torch.stack([norm.to(both[0].device, torch.float64) for norm in both])
        norms = cast("list[float]", stacked.tolist())  # one device synchronization for all
        for unit, was, norm in zip(looked, norms, norms[len(looked) :], strict=False):
            unscaled = self.scaled and abs(norm * loss_scale - was) <= 1e-3 * was
            if not (abs(norm - was) <= 1e-6 * was or unscaled) and math.isfinite(was):
                recipe = f"thinwire.{method.name}" if method.name.isidentifier() else "Method"
                self._warn(
                    f"the gradient of {unit.name} was changed between the exchange and optimizer.step() (its norm was "
                    f"{was:.4g} and is {norm:.4g}). With {method.name} it is no plain gradient but a momentum, or a "
                    "burst of what was held back, and what is cut off it is lost. To clip, give the method clip=, as "
                    f"in {recipe}(clip=1.0), and leave out clip_grad_norm_ and clip_grad_value_; for a "
                    "GradScaler, pass attach(..., scaler=scaler); weight decay belongs in the optimizer's "
                    "weight_decay; noise and other changes come before the exchange, in a hook of the parameter"
                )
                return

    def _warn(self, text: str) -> None:
        self.warned, self.before = True, {}
        warnings.warn(text, stacklevel=5)


def _norm(grad: Tensor) -> Tensor:
    mine = own(grad.detach())
    mine = mine.coalesce().values() if mine.is_sparse else mine
    return cast(Any, torch.linalg).vector_norm(mine, dtype=float_at_least_32(mine.dtype)).double()


def _in_scaler(optimizer: Any) -> bool:
    """Return True if a loss scaler with a scale other than 1 calls this optimizer's step."""
    if getattr(optimizer, "grad_scale", None) is not None:  # a fused optimizer, whose gradients stay scaled
        return True
    for frame, _ in islice(walk_stack(sys._getframe(1)), 24):  # pyright: ignore[reportPrivateUsage]
        scaler: Any = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(scaler, torch.amp.GradScaler):  # pyright: ignore[reportPrivateImportUsage]
            return bool(cast(Any, scaler).is_enabled() and cast(Any, scaler).get_scale() != 1.0)
    return False
