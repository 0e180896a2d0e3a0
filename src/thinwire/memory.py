"""The memories: what one rank remembers between steps.

``NoMemory``            nothing
``ErrorFeedback``       what compression left over (Seide et al. 2014; Stich et al. 2018)
``MomentumCorrection``  DGC: the velocity is what accumulates (Lin et al. 2018)
``Momentum``            ordinary momentum after the exchange, for what DGC sends uncompressed

The first three are the sending side's; momentum and weight decay that every rank computes alike stand in the
shared state. All arithmetic is elementwise, so it is blind to the memory layout of the tensors.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from thinwire.core import Absorbed, Accumulation, Decompressed, Memory, State, ThinwireError, float_at_least_32

WeightDecay: TypeAlias = Literal["separate", "local", "decoupled"]
StateDtype: TypeAlias = Literal["float32", "bfloat16"]
"""What local states are kept in; float64 gradients keep float64 where float32 is asked for."""


def zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.preserve_format)


def accumulate(
    rule: Accumulation,
    scale: float,
    grad: Tensor,
    v: Tensor,
    new_v: Tensor,
    u: Tensor | None = None,
    new_u: Tensor | None = None,
) -> None:
    """``Accumulation``, in plain PyTorch: fills ``new_v`` and ``new_u``."""
    if new_v.dtype.itemsize < 4:  # short states are rounded once, when they are written
        wide_v, wide_u = new_v.float(), None if new_u is None else new_u.float()
        accumulate(rule, scale, grad, v.float(), wide_v, None if u is None else u.float(), wide_u)
        new_v.copy_(wide_v)
        if new_u is not None and wide_u is not None:
            new_u.copy_(wide_u)
    elif u is None or new_u is None or rule.momentum is None:
        torch.add(v, grad, alpha=scale, out=new_v)
    elif rule.nesterov:
        torch.add(u, grad, alpha=scale, out=new_u).mul_(rule.momentum)
        torch.add(v, grad, alpha=scale, out=new_v).add_(new_u)
    else:
        torch.mul(u, rule.momentum, out=new_u).add_(grad, alpha=scale)
        torch.add(v, new_u, out=new_v)


@dataclass(frozen=True)
class NoMemory(Memory):
    """Sends the gradient as it is, a loss scale included, and forgets what compression lost."""

    stateful: ClassVar[bool] = False

    def compensate(self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0) -> Tensor:
        return grad


@dataclass(frozen=True)
class ErrorFeedback(Memory):
    """Adds to every gradient what was left over from the steps before.

    ``x = residual + g``,  ``residual = x - decompress(compress(x))``.
    State: one word an element. Works in float32 (float64 for float64 gradients).

    Source: F. Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed
    Training of Speech DNNs", 2014; S. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", 2018,
    arXiv:1809.07599, algorithm 1.

    Args:
        state: ``"bfloat16"`` halves the state; what is smaller than 1/256 of the residual is then rounded away.

    Departures: the learning rate multiplies what is received, not what is remembered, so that any optimizer
    can follow; after a cut of the learning rate, old residuals count at the new rate.
    """

    state: StateDtype = "float32"

    def __post_init__(self) -> None:
        check_state(self.state)

    @property
    def accumulation(self) -> Accumulation:
        return Accumulation(None)

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self.state == "bfloat16" else float_at_least_32(grad)

    def init(self, like: Tensor) -> State:
        return {"residual": zeros(like)}

    def compensate(self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0) -> Tensor:
        accumulate(self.accumulation, scale, grad, old["residual"], new["residual"])
        return new["residual"]

    def sent(self, x: Tensor, own: Decompressed, new: State) -> None:
        own.add_to(x, alpha=-1.0)  # x is new["residual"]

    def returned(self, rest: Decompressed, new: State) -> None:
        rest.add_to(new["residual"])


@dataclass(frozen=True)
class MomentumCorrection(Memory):
    """DGC's memory: accumulates the velocity instead of the gradient, so momentum survives sparse sending.

    vanilla:   ``u = m u + g``,        ``v = v + u``
    Nesterov:  ``u = m (u + g)``,      ``v = v + u + g``
    ``v`` is compressed; what was sent leaves ``v``, and with masking ``u`` becomes 0 there.

    Args:
        momentum: ``m`` in [0, 1). Set by the optimizer that is attached, like the next two.
        nesterov: PyTorch's Nesterov form.
        weight_decay: L2 coefficient, per step.
        decay: ``"separate"`` keeps a dense velocity of its own for the decay, ``"local"`` adds ``wd * param`` to the
            gradient before ``u``, ``"decoupled"`` adds ``wd * param`` to the result without momentum.
        masking: momentum factor masking, the paper's guard against stale momentum.
        mask_below_density: no masking where more than this share of the elements is sent: there it would only
            remove momentum (at density 1 it turns momentum SGD into plain SGD).
        state: see ``ErrorFeedback``.

    State: two words an element (``momentum`` = u, ``residual`` = v), where momentum SGD has one; and a third,
    equal on all ranks, for a separate decay.

    Source: Y. Lin, S. Han, H. Mao, Y. Wang, W. Dally, "Deep Gradient Compression", 2018, arXiv:1712.01887,
    equations 4 to 7.

    Departures: ``v`` loses what the receiver got, not all that was selected, so that the error of a cast stays in
    the residual. Masking stops above ``mask_below_density``.
    """

    absorbs: ClassVar[bool] = True

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: WeightDecay = "separate"
    masking: bool = True
    mask_below_density: float = 0.05
    state: StateDtype = "float32"

    def __post_init__(self) -> None:
        check_state(self.state)
        check_momentum(self.momentum, self.weight_decay, self.decay)
        if not 0.0 <= self.mask_below_density <= 1.0:
            raise ThinwireError(f"mask_below_density is {self.mask_below_density}; it must be in [0, 1]")

    @property
    def residual_gain(self) -> float:
        return 1.0 - self.momentum

    @property
    def accumulation(self) -> Accumulation | None:
        decays_first = self.weight_decay and self.decay == "local"
        return None if decays_first else Accumulation(self.momentum, self.nesterov)

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self.state == "bfloat16" else float_at_least_32(grad)

    def init(self, like: Tensor) -> State:
        return {"momentum": zeros(like), "residual": zeros(like)}

    def init_shared(self, like: Tensor) -> State:
        return {"decay": zeros(like)} if self.weight_decay and self.decay == "separate" else {}

    def compensate(self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0) -> Tensor:
        u, v = new["momentum"], new["residual"]
        if self.weight_decay and self.decay == "local":
            grad, scale = torch.mul(grad, scale).to(u.dtype).add_(param, alpha=self.weight_decay), 1.0
        accumulate(Accumulation(self.momentum, self.nesterov), scale, grad, old["residual"], v, old["momentum"], u)
        return v

    def sent(self, x: Tensor, own: Decompressed, new: State) -> None:
        own.add_to(x, alpha=-1.0)  # x is new["residual"]
        if self.masking and own.density <= self.mask_below_density:
            own.clear(new["momentum"])

    def returned(self, rest: Decompressed, new: State) -> None:
        rest.add_to(new["residual"])

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State) -> Tensor:
        if not self.weight_decay or self.decay == "local":
            return mean
        if self.decay == "decoupled":
            return mean.add_(param, alpha=self.weight_decay)
        w = torch.mul(old["decay"], self.momentum, out=new["decay"]).add_(param, alpha=self.weight_decay)
        if self.nesterov:
            return mean.add_(param, alpha=self.weight_decay).add_(w, alpha=self.momentum)
        return mean.add_(w)

    def absorb(self, settings: Absorbed) -> "MomentumCorrection":
        return replace(self, momentum=settings.momentum, nesterov=settings.nesterov, weight_decay=settings.weight_decay)

    def take_buffer(self, buffer: Tensor, local: State, shared: State) -> None:
        torch.mul(buffer, self.momentum if self.nesterov else 1.0, out=local["momentum"])

    def give_buffer(self, local: State, shared: State) -> tuple[Tensor | None, Tensor | None]:
        if self.momentum == 0.0:
            return None, None
        return local["momentum"] / (self.momentum if self.nesterov else 1.0), shared.get("decay")


@dataclass(frozen=True)
class Momentum(Memory):
    """Ordinary SGD momentum, applied after the exchange: what DGC gives the tensors that it does not compress.

    ``b = m b + (mean + wd * param)``; the gradient is ``b``, or ``mean + wd * param + m b`` with Nesterov.
    ``decay="decoupled"`` keeps ``wd * param`` out of ``b``. State: one word an element, equal on all ranks.
    """

    absorbs: ClassVar[bool] = True

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: WeightDecay = "separate"

    def __post_init__(self) -> None:
        check_momentum(self.momentum, self.weight_decay, self.decay)

    def init_shared(self, like: Tensor) -> State:
        return {"momentum": zeros(like).to(float_at_least_32(like.dtype))} if self.momentum else {}

    def compensate(self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0) -> Tensor:
        return grad if scale == 1.0 else grad.mul_(scale)

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State) -> Tensor:
        decoupled = self.decay == "decoupled"
        if self.weight_decay and not decoupled:
            mean.add_(param, alpha=self.weight_decay)
        if self.momentum:
            b = torch.mul(old["momentum"], self.momentum, out=new["momentum"]).add_(mean)
            mean = mean.add_(b, alpha=self.momentum) if self.nesterov else mean.copy_(b)
        return mean.add_(param, alpha=self.weight_decay) if self.weight_decay and decoupled else mean

    def absorb(self, settings: Absorbed) -> "Momentum":
        return replace(self, momentum=settings.momentum, nesterov=settings.nesterov, weight_decay=settings.weight_decay)

    def take_buffer(self, buffer: Tensor, local: State, shared: State) -> None:
        if "momentum" in shared:
            shared["momentum"].copy_(buffer)

    def give_buffer(self, local: State, shared: State) -> tuple[Tensor | None, Tensor | None]:
        return None, shared.get("momentum")


def check_state(state: str) -> None:
    if state not in ("float32", "bfloat16"):
        raise ThinwireError(f"state is {state!r}; choose 'float32' or 'bfloat16'")


def check_momentum(momentum: float, weight_decay: float, decay: str) -> None:
    if not 0.0 <= momentum < 1.0:
        raise ThinwireError(f"momentum is {momentum}; it must be in [0, 1)")
    if weight_decay < 0.0:
        raise ThinwireError(f"weight_decay is {weight_decay}; it must not be negative")
    if decay not in ("separate", "local", "decoupled"):
        raise ThinwireError(f"decay is {decay!r}; choose 'separate', 'local' or 'decoupled'")
