"""Momentum memories: DGC's, which accumulates the velocity, and ordinary momentum for dense parameters.

Momentum and weight decay that every rank computes alike are in the shared state.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor

from thinwire.core import NOWHERE, Context, Decompressed, Memory, Role, Slot, State, register
from thinwire.core.checks import check_fields, flag, one_of, real
from thinwire.core.loops import Accumulation
from thinwire.core.memory_capabilities import Absorbed, HasTraits, MemoryTraits, OwnsMomentum, absorbed
from thinwire.core.tensors import float_at_least_32
from thinwire.kernels.accumulate import accumulate
from thinwire.memories.error_feedback import STATE, ResidualMemory, StateDtype

WeightDecay: TypeAlias = Literal["separate", "local", "decoupled"]


@dataclass(frozen=True)
class SGDMemory(Memory, OwnsMomentum, HasTraits):
    """A memory with the settings of SGD, which an attached optimizer sets, but for ``decay``."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: WeightDecay = "separate"

    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(
            self,
            momentum=real(0.0, 1.0, below=True, hint=", e.g. 0.9"),
            nesterov=flag,
            weight_decay=real(0.0),
            decay=one_of("separate", "local", "decoupled"),
        )

    def absorb(self, settings: Absorbed) -> Self:
        return replace(self, momentum=settings.momentum, nesterov=settings.nesterov, weight_decay=settings.weight_decay)

    @property
    def absorbed(self) -> Absorbed:
        return Absorbed(self.momentum, self.nesterov, self.weight_decay)


@register("momentum_correction")
@dataclass(frozen=True)
class MomentumCorrection(SGDMemory, ResidualMemory):
    """The memory of DGC, which accumulates the velocity instead of the gradient so that sparse sending keeps momentum.

    vanilla:   ``u = m u + g``,        ``v = v + u``
    Nesterov:  ``u = m (u + g)``,      ``v = v + u + g``
    ``v`` is compressed; the sent values are subtracted from ``v``, and with masking ``u`` becomes 0 there.

    Args:
        momentum: ``m`` in [0, 1). Set by the attached optimizer, like the next two.
        nesterov: PyTorch's Nesterov form.
        weight_decay: L2 coefficient, per step.
        decay: ``"separate"`` keeps a dense velocity for the weight decay, ``"local"`` adds ``wd * param`` to the
            gradient before ``u``, ``"decoupled"`` adds ``wd * param`` to the result without momentum.
        masking: momentum factor masking, the paper's guard against stale momentum.
        mask_below_density: largest share of sent elements at which masking is on. At higher densities masking would
            only remove momentum (at density 1 it turns momentum SGD into plain SGD).
        state_dtype: see ``ErrorFeedback``.

    State: two values per element (``momentum`` = u, ``residual`` = v), where momentum SGD has one; and a third,
    equal on all ranks, for a separate decay.

    Source: Y. Lin, S. Han, H. Mao, Y. Wang, W. Dally, "Deep Gradient Compression", 2018, arXiv:1712.01887,
    equations 4 to 7.

    Departures: ``v`` loses only what was decompressed, so a cast's error stays. ``mask_below_density`` limits masking.
    """

    masking: bool = True
    mask_below_density: float = 0.05
    state_dtype: StateDtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, masking=flag, mask_below_density=real(0.0, 1.0), state_dtype=STATE)

    @property
    def slots(self) -> Mapping[str, Slot]:
        slots = {"momentum": Slot(Role.MOMENTUM), "residual": Slot(Role.PENDING)}
        if self.weight_decay and self.decay == "separate":
            slots["decay"] = Slot(Role.MOMENTUM, "shared")
        return slots

    @cached_property
    def traits(self) -> MemoryTraits:
        decays_first = bool(self.weight_decay) and self.decay == "local"
        resting = {"momentum", "decay"} if self.weight_decay else {"momentum"}
        return MemoryTraits(
            accumulation=None if decays_first else self._accumulation,
            passes_on=decays_first or not self.weight_decay,
            rests=frozenset() if self.momentum else frozenset(resting),
            uncompressed=Momentum(decay=self.decay),
            residual_gain=1.0 - self.momentum,
        )

    @cached_property
    def _accumulation(self) -> Accumulation:
        """The kernel's rule. Without a momentum it keeps ``u`` for later, as SGD keeps its buffer."""
        return Accumulation(self.momentum, self.nesterov) if self.momentum else Accumulation(None)

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        u, v = new["momentum"], new["residual"]
        if self.weight_decay and self.decay == "local":
            grad, scale = torch.mul(grad, scale).to(u.dtype).add_(param, alpha=self.weight_decay), 1.0
        accumulate(self._accumulation, scale, grad, old["residual"], v, old["momentum"], u)
        return v

    def sent(self, decoded: Decompressed, new: State, sign: float = -1.0) -> None:
        super().sent(decoded, new, sign)
        if sign < 0.0 and self.masking and self.momentum and decoded.density <= self.mask_below_density:
            decoded.clear(new["momentum"])

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        if not self.weight_decay or self.decay == "local":
            return mean
        if self.decay == "decoupled" or not self.momentum:
            return mean.add_(param, alpha=self.weight_decay)
        w = torch.mul(old["decay"], self.momentum, out=new["decay"]).add_(param, alpha=self.weight_decay)
        if self.nesterov:
            return mean.add_(param, alpha=self.weight_decay).add_(w, alpha=self.momentum)
        return mean.add_(w)

    def take_over(self, old: Memory, local: State, shared: State) -> None:
        now, was = form(self.absorbed), form(absorbed(old) or Absorbed())
        if now != was:
            local["momentum"].mul_(now / was)
        if "decay" in shared and not self.weight_decay:  # the decay's velocity continues as a part of u
            local["momentum"].add_(shared["decay"], alpha=now)

    def take_buffer(self, buffer: Tensor, local: State, shared: State) -> None:
        torch.mul(buffer, form(self.absorbed), out=local["momentum"])
        if "decay" in shared:  # the buffer already includes it
            shared["decay"].zero_()

    def give_buffer(self, local: State, shared: State) -> tuple[Tensor | None, Tensor | None]:
        if self.momentum == 0.0:
            return None, None
        return local["momentum"] / form(self.absorbed), shared.get("decay")


@register("momentum")
@dataclass(frozen=True)
class Momentum(SGDMemory):
    """Ordinary SGD momentum, applied after the exchange; DGC uses it for parameters that it does not compress.

    ``b = m b + (mean + wd * param)``; the gradient is ``b``, or ``mean + wd * param + m b`` with Nesterov.
    ``decay="decoupled"`` keeps ``wd * param`` out of ``b``.
    State: one value per element, equal on all ranks.
    """

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"momentum": Slot(Role.MOMENTUM, "shared", wide=True)} if self.momentum else {}

    @cached_property
    def traits(self) -> MemoryTraits:
        return MemoryTraits(rests=frozenset() if self.momentum else frozenset({"momentum"}), uncompressed=self)

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        return grad if scale == 1.0 else grad.mul_(scale)

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        decoupled = self.decay == "decoupled"
        if self.weight_decay and not decoupled:
            mean.add_(param, alpha=self.weight_decay)
        if self.momentum:
            b = torch.mul(old["momentum"], self.momentum, out=new["momentum"]).add_(mean)
            mean = mean.add_(b, alpha=self.momentum) if self.nesterov else mean.copy_(b)
        return mean.add_(param, alpha=self.weight_decay) if self.weight_decay and decoupled else mean

    def take_buffer(self, buffer: Tensor, local: State, shared: State) -> None:
        if "momentum" in shared:
            shared["momentum"].copy_(buffer)
        else:  # kept unchanged until momentum is turned on again
            shared["momentum"] = buffer.to(float_at_least_32(buffer.dtype), copy=True)

    def give_buffer(self, local: State, shared: State) -> tuple[Tensor | None, Tensor | None]:
        return None, shared.get("momentum")


def form(settings: Absorbed) -> float:
    """Return the ratio of DGC's ``u`` to SGD's momentum buffer."""
    return settings.momentum if settings.nesterov and settings.momentum else 1.0
