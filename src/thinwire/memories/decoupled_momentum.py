"""DeMo's memory: the momentum holds what was not sent yet."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from thinwire.core.checks import check_fields, flag, real
from thinwire.core.context import NOWHERE, Context
from thinwire.core.interfaces import State
from thinwire.core.memory_capabilities import HasTraits, MemoryTraits
from thinwire.core.registry import register
from thinwire.memories.error_feedback import ResidualMemory, signs


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
