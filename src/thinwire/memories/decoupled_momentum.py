"""DeMo's memory: the momentum holds what was not sent yet."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.core.checks import flag, real, settle
from thinwire.core.context import NOWHERE, Context
from thinwire.core.interfaces import Memory, State
from thinwire.core.registry import register
from thinwire.core.tensors import Decompressed, float_at_least_32
from thinwire.memories.error_feedback import signs, zeros


@register("decoupled_momentum")
@dataclass(frozen=True)
class DecoupledMomentum(Memory):
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

    feeds_back: ClassVar[bool] = True

    decay: float = 0.999
    sign: bool = True

    def __post_init__(self) -> None:
        settle(self, decay=real(0.0, 1.0, below=True, hint=", e.g. 0.999"), sign=flag)

    @property
    def uncompressed(self) -> "DecoupledMomentum":
        return self

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        return float_at_least_32(grad)

    def init(self, like: Tensor) -> State:
        return {"residual": zeros(like)}

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        return torch.mul(old["residual"], self.decay, out=new["residual"]).add_(grad, alpha=scale)

    def sent(self, x: Tensor, own: Decompressed, new: State) -> None:
        own.add_to(x, alpha=-1.0)  # x is new["residual"]

    def returned(self, rest: Decompressed, new: State) -> None:
        rest.add_to(new["residual"])

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        return signs(mean) if self.sign else mean
