"""Error feedback, which adds the compression error to the next gradient, and the empty memory.

All arithmetic is elementwise, so it does not depend on the memory layout of the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from thinwire.core import NOWHERE, Context, Decompressed, Memory, Role, Slot, State, register
from thinwire.core.checks import check_fields, dtype, real
from thinwire.core.loops import Accumulation
from thinwire.core.memory_capabilities import HasTraits, MemoryTraits
from thinwire.core.tensors import float_at_least_32
from thinwire.kernels.accumulate import accumulate

StateDtype: TypeAlias = Literal["float32", "bfloat16"]
"""The dtype of local states; with "float32", float64 gradients keep float64 states."""
STATE = dtype(("float32", "bfloat16"))


class ResidualMemory(Memory):
    """A memory with one residual, from which what was sent is subtracted; in at least float32 by default."""

    state_dtype: StateDtype = "float32"

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"residual": Slot(Role.PENDING)}

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self.state_dtype == "bfloat16" else float_at_least_32(grad)

    def sent(self, decoded: Decompressed, new: State, sign: float = -1.0) -> None:
        decoded.add_to(new["residual"], alpha=sign)


@register("none")
@dataclass(frozen=True)
class NoMemory(Memory, HasTraits):
    """The empty memory, which passes the gradient on as it is, loss scale included, without error feedback."""

    stateful: ClassVar[bool] = False
    linear: ClassVar[bool] = True

    @cached_property
    def traits(self) -> MemoryTraits:
        return MemoryTraits(passes_on=True)

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        return grad


@register("error_feedback")
@dataclass(frozen=True)
class ErrorFeedback(ResidualMemory, HasTraits):
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

    state_dtype: StateDtype = "float32"
    decay: float = 1.0
    beta: float = 1.0

    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(
            self,
            state_dtype=STATE,
            decay=real(0.0, 1.0, above=True, hint=": it multiplies the residual, e.g. 0.999"),
            beta=real(0.0, 1.0, above=True, hint=": it filters what is remembered, e.g. 0.1"),
        )

    @cached_property
    def traits(self) -> MemoryTraits:
        plain = self.decay == self.beta == 1.0
        return MemoryTraits(accumulation=Accumulation(None) if plain else None, passes_on=True)

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

    def sent(self, decoded: Decompressed, new: State, sign: float = -1.0) -> None:
        decoded.add_to(new["residual"], alpha=sign * self.beta)
