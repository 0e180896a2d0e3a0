"""Shifted memories: what is sent is how far the gradient is from what the receivers already believe.

Every rank keeps ``h_i``, the sum of all that it has sent, and all ranks keep ``h``, the mean of the ``h_i`` (both are
called ``estimate``). The compressor sees the difference between what the rank wants to say and ``h_i``, and the
optimizer gets ``h``. Differences vanish where gradients settle, and what is compressed with them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.core.checks import of_type, optional, real, settle
from thinwire.core.context import NOWHERE, NUMBER, Context
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor, Memory, State
from thinwire.core.registry import register
from thinwire.core.tensors import Decompressed, float_at_least_32
from thinwire.memories.error_feedback import zeros


@register("ef21")
@dataclass(frozen=True)
class EF21(Memory):
    """Sends the difference between the gradient and the sum of what was sent before, and steps with that sum.

    ``v_i = (1 - eta) v_i + eta g_i``,  ``h_i = h_i + C(v_i - h_i)``,  the optimizer gets ``h = mean h_i``.
    ``eta = 1`` is EF21 (``v_i = g_i``), below 1 EF21-SGDM; with a ``participation`` below 1, EF21-PP: a rank that is
    absent from a step sends nothing, and its ``h_i`` stays in the mean; with a ``downlink``, EF21-BC: the optimizer
    gets ``s``, where ``s = s + downlink(h - s)``.

    Args:
        eta: weight of the newest gradient in ``v_i``, in (0, 1]. Below 1 the learning rate is on the scale of an
            average: 1 / eta times that of SGD with momentum ``1 - eta``.
        participation: probability that a rank takes part in a step, in (0, 1]; one coin for all its parameters.
        downlink: a contractive compressor without a state of its own, for any shape; None for none.

    Raises:
        ThinwireError: a value outside its range.

    State: two words an element (``h_i``, ``h``), one more for ``eta < 1`` and for a downlink. Works in float32
    (float64 for float64 gradients).

    **Wire**: that of the compressor. A downlink saves nothing here: with an all-gather every rank has ``h`` itself, and
    all apply ``downlink`` to the same difference. It models what a server that broadcasts would do to the training.

    Example:
        >>> memory, x = EF21(), torch.tensor([3.0, 1.0])
        >>> old, new = memory.init(x), memory.init(x)
        >>> memory.compensate(x, x, {"estimate": torch.tensor([2.5, 0.0])}, new)
        tensor([0.5000, 1.0000])

    Source: P. Richtárik, I. Sokolov, I. Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster
    Error Feedback", 2021, arXiv:2106.05203, algorithm 2; I. Fatkhullin, I. Sokolov, E. Gorbunov, Z. Li, P. Richtárik,
    "EF21 with Bells & Whistles", 2021, arXiv:2110.03294 (PP, BC); I. Fatkhullin, A. Tyurin, P. Richtárik, "Momentum
    Provably Improves Error Feedback!", 2023, arXiv:2305.15155 (SGDM).

    Departures: the new gradient comes before the step and not after it, which is the same sequence. ``h_i`` and ``v_i``
    start from 0, so that with a lossless compressor EF21-SGDM is SGD with momentum ``1 - eta`` from the first step on;
    ``Warmup(1, (1.0,))`` starts ``h_i`` from the first gradient by one dense step. A rank that is absent leaves ``v_i``
    alone too. EF21-HB is this memory under ``torch.optim.SGD(momentum=...)``.
    """

    feeds_back: ClassVar[bool] = True

    eta: float = 1.0
    participation: float = 1.0
    downlink: Compressor | None = None

    def __post_init__(self) -> None:
        settle(
            self,
            eta=real(0.0, 1.0, above=True, hint=": it is the newest gradient's weight, e.g. 0.1"),
            participation=real(0.0, 1.0, above=True, hint=": it is a probability"),
            downlink=optional(of_type(Compressor, "downlink takes a compressor, e.g. TopK(0.05)")),
        )
        if self.downlink is not None:
            check_downlink(self.downlink)

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        return float_at_least_32(grad)

    def init(self, like: Tensor) -> State:
        return {"estimate": zeros(like)} | ({"average": zeros(like)} if self.eta < 1.0 else {})

    def inferred(self, known: State) -> State:
        if self.eta == 1.0 or "average" in known or "estimate" not in known:
            return {}
        return {"average": known["estimate"].clone()}  # which follows the gradients as the average would

    def init_shared(self, like: Tensor) -> State:
        return {"estimate": zeros(like)} | ({"server": zeros(like)} if self.downlink is not None else {})

    def present(self, ctx: Context) -> bool:
        """Whether this rank takes part in this step."""
        coin = replace(ctx, unit="participation").generator()
        return (
            self.participation == 1.0
            or torch.rand((), generator=coin, dtype=torch.float32, device="cpu").item() < self.participation
        )

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        if not self.present(ctx):
            for key, value in new.items():  # ``old`` holds what is shared too
                value.copy_(old[key])
            return torch.zeros_like(old["estimate"])
        new["estimate"].copy_(old["estimate"])  # sent() adds to it
        if self.eta == 1.0:
            return torch.neg(old["estimate"]).add_(grad, alpha=scale)
        v = torch.mul(old["average"], 1.0 - self.eta, out=new["average"]).add_(grad, alpha=self.eta * scale)
        return v - old["estimate"]

    def sent(self, x: Tensor, own: Decompressed, new: State) -> None:
        own.add_to(new["estimate"])

    def returned(self, rest: Decompressed, new: State) -> None:
        rest.add_to(new["estimate"], alpha=-1.0)  # the receivers did not get it, so h_i says that it was not sent

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        h = torch.add(old["estimate"], mean, out=new["estimate"])
        if self.downlink is not None:
            x = h - old["server"]
            h = new["server"].copy_(old["server"])
            sender = replace(ctx, saturates=1.0)  # what is cut off comes back with the next difference
            self.downlink.decompress(self.downlink.compress(x, {}, sender), x, {}, ctx).add_to(h)
        return mean.copy_(h)  # not the state itself, which the optimizer may not write to


@register("econtrol")
@dataclass(frozen=True)
class EControl(Memory):
    """EF21 with a residual beside the estimate, which comes back with the strength ``eta``.

    ``x_i = eta e_i + g_i - h_i``,  ``h_i = h_i + C(x_i)``,  ``e_i = e_i + g_i - h_i`` with the new ``h_i``; the
    optimizer gets ``h = mean h_i``. What is remembered is the error of the estimate, not that of the message, so that
    the parameters less ``lr * mean e_i`` move as in SGD.

    Args:
        eta: strength of the feedback, in [0, 1]; 0 is EF21, bit for bit. The density is a good value, and far above it
            is unstable: five times the density was, at every learning rate tried.

    Raises:
        ThinwireError: ``eta`` outside its range.

    State: three words an element (``e_i`` = residual, ``h_i`` and ``h`` = estimate). Works in float32 (float64 for
    float64 gradients).

    Example:
        >>> memory, g = EControl(0.5), torch.tensor([2.0, 1.0])
        >>> old, new = memory.init(g), memory.init(g)
        >>> memory.compensate(g, g, {"residual": torch.tensor([0.0, 1.0]), "estimate": torch.tensor([2.0, 0.0])}, new)
        tensor([0.0000, 1.5000])

    Source: Y. Gao, R. Islamov, S. Stich, "EControl: Fast Distributed Optimization with Compression and Error Control",
    2024, arXiv:2311.05645, algorithm 1.

    Departures: both start from 0; see ``EF21`` for a dense first step. The theory's ``eta`` is 1/400 of the density.
    """

    feeds_back: ClassVar[bool] = True

    eta: float

    def __post_init__(self) -> None:
        settle(self, eta=real(0.0, 1.0, hint=", and about the density to be stable"))

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        return float_at_least_32(grad)

    def init(self, like: Tensor) -> State:
        return {"residual": zeros(like), "estimate": zeros(like)}

    def init_shared(self, like: Tensor) -> State:
        return {"estimate": zeros(like)}

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        e = old["residual"]
        h = new["estimate"].copy_(old["estimate"])  # sent() adds to it
        x = torch.neg(h).add_(e, alpha=self.eta).add_(grad, alpha=scale)
        torch.mul(e, 1.0 - self.eta, out=new["residual"]).add_(x)  # e + g - h
        return x

    def sent(self, x: Tensor, own: Decompressed, new: State) -> None:
        own.add_to(new["estimate"])
        own.add_to(new["residual"], alpha=-1.0)

    def returned(self, rest: Decompressed, new: State) -> None:
        rest.add_to(new["estimate"], alpha=-1.0)
        rest.add_to(new["residual"])

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        return mean.copy_(torch.add(old["estimate"], mean, out=new["estimate"]))


def check_downlink(downlink: Compressor) -> None:
    """It is applied to the mean of any tensor, outside of any message."""
    kind = type(downlink).__name__
    if downlink.traits.min_ndim or downlink.init(NUMBER, NOWHERE):
        raise ThinwireError(f"{kind} needs matrices or keeps a state, which a downlink can't; use e.g. TopK(0.05)")
    alpha = downlink.traits.contraction(2**20)
    if alpha is not None and alpha <= 0.0:
        raise ThinwireError(f"{kind} may lose more than it is given, so a downlink would diverge; use e.g. TopK(0.05)")
