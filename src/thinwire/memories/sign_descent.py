"""Memories after which the optimizer gets a sign: DeMo's, and the majority vote of signSGD."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from thinwire.core import NOWHERE, Context, Memory, Role, Slot, State, register
from thinwire.core.checks import check_fields, flag, real
from thinwire.core.memory_capabilities import HasTraits, MemoryTraits
from thinwire.core.tensors import float_at_least_32
from thinwire.memories.error_feedback import ResidualMemory

TIE = 1e-5
"""A mean below this share of the largest mean counts as a tie, since votes are summed in floating point; also for
means that were sent dense."""


def signs(x: Tensor) -> Tensor:
    """Compute ``x = sign(x)`` in place; NaN stays, since it tells a loss scaler to skip the step."""
    return torch.where(x.isnan(), x, x.sign(), out=x)


@register("decoupled_momentum")
@dataclass(frozen=True)
class DecoupledMomentum(ResidualMemory, HasTraits):
    """A momentum on each rank that is compressed and sent; the ranks' momenta are never synchronised.

    ``M = beta M + g``; ``C(M)`` is sent and subtracted from ``M``; the optimizer gets the sign of the mean.

    Args:
        decay: ``beta`` in [0, 1).
        sign: True if the optimizer gets the sign of the mean, False for the mean itself.

    State: one value per element (``residual``), which replaces the optimizer's momentum.

    Raises:
        ThinwireError: ``decay`` is outside its range.

    Source: B. Peng, J. Quesnelle, D. Kingma, "DeMo: Decoupled Momentum Optimization", 2024, arXiv:2411.19870,
    algorithm 1.

    Departures: the learning rate multiplies the received mean, not the momentum; with a sign and a constant rate that
    is the same. The mean is over all ranks, not only over those that sent a coefficient; the sign is the same.
    """

    decay: float = 0.999
    sign: bool = True

    def __post_init__(self) -> None:
        check_fields(self, decay=real(0.0, 1.0, below=True, hint=", e.g. 0.999"), sign=flag)

    @cached_property
    def traits(self) -> MemoryTraits:
        return MemoryTraits(uncompressed=self)

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        return torch.mul(old["residual"], self.decay, out=new["residual"]).add_(grad, alpha=scale)

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        return signs(mean) if self.sign else mean


@register("majority_vote")
@dataclass(frozen=True)
class MajorityVote(Memory, HasTraits):
    """The memory of signSGD with majority vote and, with momentum, of Signum. The optimizer gets -1, 0 or 1.

    ``m = beta m + (1 - beta) g``; ``m`` is compressed by ``Sign(scale="none")``; the gradient is the sign of the mean.
    There is no error feedback. A tie gives 0 if votes are gathered. With ``route="two_phase"`` the owner can't send 0
    and draws a sign by seed.

    Args:
        momentum: ``beta`` in [0, 1); leave the optimizer's own at 0.

    State: one value per element, or none without momentum.

    Raises:
        ThinwireError: ``momentum`` is outside its range.

    Source: J. Bernstein, J. Zhao, K. Azizzadenesheli, A. Anandkumar, "signSGD with Majority Vote is Communication
    Efficient And Fault Tolerant", 2019, arXiv:1810.05291, algorithm 1.

    Departures: the optimizer adds weight decay to the sign, as the paper does. A loss scale cancels.
    """

    # ``stateful`` without a momentum too: the sign must not be divided by a loss scale
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, momentum=real(0.0, 1.0, below=True, hint=", e.g. 0.9"))

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"momentum": Slot(Role.MOMENTUM)} if self.momentum else {}

    @cached_property
    def traits(self) -> MemoryTraits:
        return MemoryTraits(uncompressed=self, takes_votes=True)

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        return float_at_least_32(grad) if self.momentum else grad

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        if not self.momentum:
            return grad if scale == 1.0 else grad.mul_(scale)
        m = torch.mul(old["momentum"], self.momentum, out=new["momentum"])
        return m.add_(grad, alpha=(1.0 - self.momentum) * scale)

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        if mean.numel():
            magnitude = mean.abs()
            mean.masked_fill_(magnitude < TIE * magnitude.amax(), 0.0)
        return signs(mean)
