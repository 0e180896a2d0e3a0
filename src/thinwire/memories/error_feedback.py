"""Error feedback, which adds the compression error to the next gradient, and the empty memory.

All arithmetic is elementwise, so it does not depend on the memory layout of the tensors.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from thinwire.core.checks import dtype, real, settle
from thinwire.core.context import NOWHERE, Context
from thinwire.core.interfaces import Memory, State
from thinwire.core.loops import Accumulation
from thinwire.core.registry import register
from thinwire.core.tensors import Decompressed, float_at_least_32
from thinwire.kernels.accumulate import accumulate

StateDtype: TypeAlias = Literal["float32", "bfloat16"]
"""The dtype of local states; with "float32", float64 gradients keep float64 states."""
STATE = dtype(("float32", "bfloat16"))


def zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.preserve_format)


def signs(x: Tensor) -> Tensor:
    """Compute ``x = sign(x)`` in place; NaN stays, since it tells a loss scaler to skip the step."""
    return torch.where(x.isnan(), x, x.sign(), out=x)


@register("none")
@dataclass(frozen=True)
class NoMemory(Memory):
    """The empty memory, which passes the gradient on as it is, loss scale included, without error feedback."""

    stateful: ClassVar[bool] = False
    linear: ClassVar[bool] = True

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        return grad


@register("error_feedback")
@dataclass(frozen=True)
class ErrorFeedback(Memory):
    """Error feedback, which adds the residual of earlier steps to every gradient.

    ``x = residual + g``,  ``residual = (1 - beta) residual + beta (x - decompress(compress(x)))``, default ``beta`` 1.
    State: one value per element. Works in float32 (float64 for float64 gradients).

    Source: F. Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed
    Training of Speech DNNs", 2014; S. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", 2018,
    arXiv:1809.07599, algorithm 1.

    Args:
        decay: factor on the residual before a gradient is added, in (0, 1]; 1 loses nothing.
        state_dtype: ``"bfloat16"`` halves the state; additions below 1/256 of the residual are then rounded away.
        beta: in (0, 1]; below 1 it is ScaleCom's low-pass filter: only this share of a new gradient enters the
            residual, and only this share of the sent values is subtracted.

    Departures: the learning rate multiplies the received mean, not the residual, so any optimizer works. After a cut
    of the learning rate, old residuals count at the new rate.
    """

    feeds_back: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    state_dtype: StateDtype = "float32"
    decay: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        settle(
            self,
            state_dtype=STATE,
            decay=real(0.0, 1.0, above=True, hint=": it multiplies the residual, e.g. 0.999"),
            beta=real(0.0, 1.0, above=True, hint=": it filters what is remembered, e.g. 0.1"),
        )

    @property
    def accumulation(self) -> Accumulation | None:
        return Accumulation(None) if self.decay == self.beta == 1.0 else None

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self.state_dtype == "bfloat16" else float_at_least_32(grad)

    def init(self, like: Tensor) -> State:
        return {"residual": zeros(like)}

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        held = old["residual"]
        if self.decay != 1.0:
            held = held.to(float_at_least_32(held.dtype)) * self.decay
        accumulate(Accumulation(None), scale * self.beta, grad, held, new["residual"])
        if self.beta == 1.0:
            return new["residual"]
        return torch.add(held, grad, alpha=scale).to(self.dtype(grad.dtype))

    def sent(self, x: Tensor, own: Decompressed, new: State) -> None:
        own.add_to(new["residual"], alpha=-self.beta)

    def returned(self, rest: Decompressed, new: State) -> None:
        rest.add_to(new["residual"], alpha=self.beta)
