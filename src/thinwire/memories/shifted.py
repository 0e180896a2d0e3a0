"""EF21 memories: they send the difference between the gradient and an estimate that the receivers have.

Every rank keeps ``h_i``, the sum of its decompressed messages, and all ranks keep ``h``, the mean of the ``h_i`` (both
are called ``estimate``). The compressor gets the difference between the gradient and ``h_i``, and the optimizer gets
``h``. As gradients converge, the differences vanish, and the compression error with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from thinwire.core import NOWHERE, Compressor, Context, Decompressed, Memory, Role, Slot, State, ThinwireError, register
from thinwire.core.checks import check_fields, of_type, optional, real
from thinwire.core.context import NUMBER
from thinwire.core.memory_capabilities import HasTraits, MemoryTraits
from thinwire.core.tensors import float_at_least_32
from thinwire.memories.error_feedback import ResidualMemory


@register("ef21")
@dataclass(frozen=True)
class EF21(Memory, HasTraits):
    """The memory of EF21, which sends the difference between the gradient and an estimate and steps with the estimate.

    ``v_i = (1 - eta) v_i + eta g_i``,  ``h_i = h_i + C(v_i - h_i)``,  the optimizer gets ``h = mean h_i``.
    ``eta = 1`` is EF21 (``v_i = g_i``), below 1 EF21-SGDM. ``participation`` below 1 is EF21-PP: a rank that is absent
    from a step sends zeros, and its ``h_i`` stays in the mean. A ``downlink`` is EF21-BC: the optimizer gets ``s``,
    where ``s = s + downlink(h - s)``.

    Args:
        eta: weight of the newest gradient in ``v_i``, in (0, 1]. Below 1 the optimizer gets an average: use 1 / eta
            times the learning rate of SGD with momentum ``1 - eta``.
        participation: probability that a rank takes part in a step, in (0, 1]; one draw for all its parameters.
        downlink: a contractive compressor without a state, for any shape; None for none.

    Raises:
        ThinwireError: a value is outside its range.

    State: two values per element (``h_i``, ``h``), one more each for ``eta < 1`` and for a downlink. Works in float32
    (float64 for float64 gradients).

    **Wire**: that of the compressor. A downlink saves no bytes: every rank has ``h``, and all apply ``downlink`` to the
    same difference. It models the effect of a server that broadcasts compressed messages.

    Example:
        >>> memory, x = EF21(), torch.tensor([3.0, 1.0])
        >>> new = {"estimate": torch.empty(2)}
        >>> memory.compensate(x, x, {"estimate": torch.tensor([2.5, 0.0])}, new)
        tensor([0.5000, 1.0000])

    Source: P. Richtárik, I. Sokolov, I. Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster
    Error Feedback", 2021, arXiv:2106.05203, algorithm 2; I. Fatkhullin, I. Sokolov, E. Gorbunov, Z. Li, P. Richtárik,
    "EF21 with Bells & Whistles", 2021, arXiv:2110.03294 (PP, BC); I. Fatkhullin, A. Tyurin, P. Richtárik, "Momentum
    Provably Improves Error Feedback!", 2023, arXiv:2305.15155 (SGDM).

    Departures: the new gradient comes before the step and not after it, which is the same sequence. ``h_i`` and ``v_i``
    start from 0, so with a lossless compressor EF21-SGDM equals SGD with momentum ``1 - eta`` from the first step on.
    ``Warmup(1, (1.0,))`` starts ``h_i`` from the first gradient by one dense step. An absent rank keeps ``v_i`` too.
    EF21-HB is this memory with ``torch.optim.SGD(momentum=...)``.
    """

    eta: float = 1.0
    participation: float = 1.0
    downlink: Compressor | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            eta=real(0.0, 1.0, above=True, hint=": it is the newest gradient's weight, e.g. 0.1"),
            participation=real(0.0, 1.0, above=True, hint=": it is a probability"),
            downlink=optional(of_type(Compressor, "downlink takes a compressor, e.g. TopK(0.05)")),
        )
        if (downlink := self.downlink) is None:
            return
        kind = type(downlink).__name__
        if downlink.traits.min_ndim or downlink.init(NUMBER, NOWHERE):
            raise ThinwireError(f"{kind} needs matrices or keeps a state, which a downlink can't; use e.g. TopK(0.05)")
        alpha = downlink.traits.contraction(2**20)
        if alpha is not None and alpha <= 0.0:
            raise ThinwireError(
                f"{kind} may lose more than it is given, so a downlink would diverge; use e.g. TopK(0.05)"
            )

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        return float_at_least_32(grad)

    @property
    def slots(self) -> Mapping[str, Slot]:
        slots = {"estimate": Slot(Role.ESTIMATE, "both")}
        if self.eta < 1.0:
            slots["average"] = Slot(Role.MOMENTUM)
        if self.downlink is not None:
            slots["server"] = Slot(Role.ESTIMATE, "shared")
        return slots

    @cached_property
    def traits(self) -> MemoryTraits:  # the estimate follows the gradients as the average would
        return MemoryTraits(begins_as={"average": "estimate"} if self.eta < 1.0 else {})

    def present(self, ctx: Context) -> bool:
        """Return True if this rank takes part in this step."""
        if self.participation == 1.0:
            return True
        coin = replace(ctx, unit="participation").generator()
        return torch.rand((), generator=coin, dtype=torch.float32, device="cpu").item() < self.participation

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        if not self.present(ctx):
            for key, value in new.items():  # ``old`` also has the shared state
                value.copy_(old[key])
            return torch.zeros_like(old["estimate"])
        new["estimate"].copy_(old["estimate"])  # sent() adds to it
        if self.eta == 1.0:
            return torch.neg(old["estimate"]).add_(grad, alpha=scale)
        v = torch.mul(old["average"], 1.0 - self.eta, out=new["average"]).add_(grad, alpha=self.eta * scale)
        return v - old["estimate"]

    def sent(self, decoded: Decompressed, new: State, sign: float = -1.0) -> None:
        decoded.add_to(new["estimate"], alpha=-sign)  # h_i says what the receivers have got

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        h = torch.add(old["estimate"], mean, out=new["estimate"])
        if self.downlink is not None:
            x = h - old["server"]
            h = new["server"].copy_(old["server"])
            sender = replace(ctx, saturates=1.0)  # the saturated part comes back with the next difference
            self.downlink.decompress(self.downlink.compress(x, {}, sender), x, {}, ctx).add_to(h)
        return mean.copy_(h)  # a copy, since the optimizer may write to it


@register("econtrol")
@dataclass(frozen=True)
class EControl(ResidualMemory):
    """The memory of EControl, which is EF21 plus a residual that is added back with the weight ``eta``.

    ``x_i = eta e_i + g_i - h_i``,  ``h_i = h_i + C(x_i)``,  ``e_i = e_i + g_i - h_i`` with the new ``h_i``; the
    optimizer gets ``h = mean h_i``. The residual is the error of the estimate, not of the message, so the parameters
    minus ``lr * mean e_i`` move as in SGD.

    Args:
        eta: weight of the residual, in [0, 1]; 0 is EF21, bit for bit. The density is a good value. Much larger values
            are unstable: five times the density was unstable at every learning rate tried.

    Raises:
        ThinwireError: ``eta`` is outside its range.

    State: three values per element (``e_i`` = residual, ``h_i`` and ``h`` = estimate). Works in float32 (float64 for
    float64 gradients).

    Example:
        >>> memory, g = EControl(0.5), torch.tensor([2.0, 1.0])
        >>> new = {"estimate": torch.empty(2), "residual": torch.empty(2)}
        >>> memory.compensate(g, g, {"residual": torch.tensor([0.0, 1.0]), "estimate": torch.tensor([2.0, 0.0])}, new)
        tensor([0.0000, 1.5000])

    Source: Y. Gao, R. Islamov, S. Stich, "EControl: Fast Distributed Optimization with Compression and Error Control",
    2024, arXiv:2311.05645, algorithm 1.

    Departures: both start from 0; see ``EF21`` for a dense first step. The theory's ``eta`` is 1/400 of the density.
    """

    eta: float

    def __post_init__(self) -> None:
        check_fields(self, eta=real(0.0, 1.0, hint=", and about the density to be stable"))

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"residual": Slot(Role.PENDING), "estimate": Slot(Role.ESTIMATE, "both")}

    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        e = old["residual"]
        h = new["estimate"].copy_(old["estimate"])  # sent() adds to it
        x = torch.neg(h).add_(e, alpha=self.eta).add_(grad, alpha=scale)
        torch.mul(e, 1.0 - self.eta, out=new["residual"]).add_(x)  # e + g - h
        return x

    def sent(self, decoded: Decompressed, new: State, sign: float = -1.0) -> None:
        decoded.add_to(new["estimate"], alpha=-sign)
        super().sent(decoded, new, sign)

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        return mean.copy_(torch.add(old["estimate"], mean, out=new["estimate"]))
