"""The majority vote: ranks send signs, and the optimizer gets the sign of their sum."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from thinwire.core.checks import check_fields, real
from thinwire.core.context import NOWHERE, Context
from thinwire.core.interfaces import Memory, Role, Slot, State
from thinwire.core.memory_capabilities import HasTraits, MemoryTraits
from thinwire.core.registry import register
from thinwire.core.tensors import float_at_least_32
from thinwire.memories.error_feedback import signs

TIE = 1e-5
"""A mean below this share of the largest mean counts as a tie, since votes are summed in floating point; also for
means that were sent dense."""


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

    # also without a momentum: the sign must not be divided by a loss scale
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
