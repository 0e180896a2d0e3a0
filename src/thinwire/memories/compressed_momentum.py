"""Memories for 1-bit Adam and its relatives: they exchange the momentum, or the gradient between dense steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from thinwire.core import NOWHERE, Context, Decompressed, Role, Slot, State, register
from thinwire.core.checks import check_fields, real
from thinwire.core.memory_capabilities import Absorbed, FollowsOptimizer, HasTraits, MemoryTraits
from thinwire.memories.error_feedback import ResidualMemory


@register("compressed_momentum")
@dataclass(frozen=True)
class CompressedMomentum(ResidualMemory, FollowsOptimizer, HasTraits):
    """A memory that exchanges Adam's momentum instead of the gradient, with error feedback.

    ``x_i = beta1 m + (1 - beta1) g_i + e_i``,  ``e_i = x_i - C(x_i)``,  ``m = mean_i C(x_i)``
    The optimizer gets ``m``. Sent dense, ``m`` is Adam's own momentum: ``beta1 m + (1 - beta1) mean_i g_i``.

    An element whose variance is 0 (e.g. a position that never occurs) is excluded: it sends 0, receives 0 and keeps no
    residual, since one bit can't encode 0.

    Args:
        beta1: in [0, 1). Set by the attached optimizer.

    Raises:
        ThinwireError: ``beta1`` is outside its range.

    State: ``m``, equal on all ranks, and ``e_i`` (``residual``): two values per element; Adam's momentum takes one.
    Works in float32 (float64 for float64 gradients).

    Example:
        >>> memory = thinwire.memories.CompressedMomentum(0.5)
        >>> old = {"momentum": torch.tensor([2.0]), "residual": torch.tensor([0.25])}
        >>> memory.compensate(torch.tensor([1.0]), torch.zeros(1), old, {"residual": torch.empty(1)})
        tensor([1.7500])

    Source: H. Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed",
    2021, arXiv:2102.02888, algorithm 1.

    Departures: the second stage's error goes into the owner's ``e_i`` (see ``exchange.routes.two_phase``); the paper
    keeps a second buffer. Checkpoints hold the residuals; at another world size each rank gets their mean.
    """

    beta1: float = 0.9

    def __post_init__(self) -> None:
        check_fields(self, beta1=real(0.0, 1.0, below=True, hint=", e.g. 0.9"))

    @property
    def slots(self) -> Mapping[str, Slot]:
        derived = Slot(Role.DERIVED, "both")  # 0 where the variance is: of the optimizer, where it has such elements
        return {"residual": Slot(Role.PENDING), "momentum": Slot(Role.MOMENTUM, "shared"), "live": derived}

    @cached_property
    def traits(self) -> MemoryTraits:
        return MemoryTraits(gives="momentum", residual_gain=1.0 / (1.0 - self.beta1), uncompressed=self)

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        x = torch.mul(old["momentum"], self.beta1, out=new["residual"])
        x.add_(grad, alpha=(1.0 - self.beta1) * scale).add_(old["residual"])
        return _alive(x, new)

    def sent(self, decoded: Decompressed, new: State, sign: float = -1.0) -> None:
        super().sent(decoded, new, sign)
        _alive(new["residual"], new)

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        new["momentum"].copy_(_alive(mean, old))
        return mean

    def absorb(self, settings: Absorbed) -> "CompressedMomentum":
        return replace(self, beta1=settings.momentum)


def _alive(x: Tensor, state: State) -> Tensor:
    return x.mul_(state["live"]) if "live" in state else x


@register("steady_feedback")
@dataclass(frozen=True)
class SteadyFeedback(ResidualMemory, HasTraits):
    """Error feedback that leaves the residual out of dense steps, so that these give the exact mean gradient.

    compressed: ``x_i = g_i + e_i``, ``e_i = x_i - C(x_i)``; dense: ``x_i = g_i``, ``e_i`` stays.
    The optimizer updates its variance in dense steps; a residual in the gradient would count as noise.

    State: one value per element. Works in float32 (float64 for float64 gradients).

    Example:
        >>> memory, x = thinwire.memories.SteadyFeedback(), torch.tensor([1.0])
        >>> new = {"residual": torch.empty(1)}
        >>> memory.compensate(x, x, {"residual": torch.tensor([0.25])}, new)
        tensor([1.2500])

    Source: Y. Lu et al., "Maximizing Communication Efficiency for Large-scale Training via 0/1 Adam", 2022,
    arXiv:2202.06009.
    """

    @cached_property
    def traits(self) -> MemoryTraits:
        return MemoryTraits(gives="gradient, with dense steps in between", uncompressed=self)

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        pending = torch.add(old["residual"], grad, alpha=scale, out=new["residual"])
        return torch.mul(grad, scale).to(pending.dtype) if ctx.exact else pending
