"""The vocabulary: what every other file of thinwire is written in.

A compressed exchange is cut in the middle by the network, so a method is two local halves around one
collective: ``compensate -> compress`` on the sender, ``decompress -> receive`` on every receiver. A
``Compressor`` is pure tensor maths, a ``Memory`` is what is remembered between steps, and a ``Decompressed``
is what a receiver reconstructs from one payload, in a form that can be added without being made dense first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

import torch
from torch import Tensor

from thinwire.core.absorbed import Absorbed, Absorbing
from thinwire.core.context import NOWHERE, Context
from thinwire.core.loops import Accumulation
from thinwire.core.tensors import Decompressed

if TYPE_CHECKING:
    from thinwire.core.chain import Chain

Payload: TypeAlias = tuple[Tensor, ...]
"""What one unit sends: contiguous tensors whose shapes and dtypes follow from (compressor, shape) alone."""

State: TypeAlias = dict[str, Tensor]
"""What is remembered of one unit; a checkpoint is a copy of it. ``residual`` is always "asked, not yet sent"."""


def unknown(n: int) -> float | None:
    """Nothing is known of tensors of n elements."""
    return None


@dataclass(frozen=True)
class Traits:
    """Facts of a compressor, all with a safe default; a wrapper answers ``replace(inner.traits, ...)``."""

    summable: bool = False
    """The sum of payloads decompresses to the sum of tensors, so that an all-reduce may carry them."""
    splittable: bool = False
    """Any run of a tensor's elements can be compressed on its own, and a sum of such runs once more."""
    min_ndim: int = 0
    """Tensors of fewer dimensions are passed on to the plan's next rule."""
    period: int = 1
    """The shapes of a payload repeat after so many steps; they may depend on ``ctx.phase % period``."""
    needs_feedback: bool = False
    """Training need not converge with a memory that forgets what the compressor loses."""
    linear: bool = False
    """It treats every number by itself and a sum as a sum, so that a complex one may travel as two."""
    keeps_values: bool = False
    """Its payload begins with the values that it keeps, as they are or all times a factor, so ``>>`` may code them."""
    votes: bool = False
    """All that it sends of an element is on which side of 0 it is."""
    warm_started: bool = False
    """Its state follows the mean of all payloads, which only a sum gives: see ``WarmStarted``."""
    leader_selected: bool = False
    """All ranks send the elements that one of them has chosen: see ``LeaderSelected``."""
    contraction: Callable[[int], float | None] = unknown
    """``alpha`` in (0, 1] with ``E||x - C(x)||^2 <= (1 - alpha) ||x||^2`` for n elements.

    0 if it may lose more than it is given, None if nothing is known.
    """
    variance: Callable[[int], float | None] = unknown
    """``omega`` with ``E C(x) = x``, ``E||x - C(x)||^2 <= omega ||x||^2`` for n elements; None if it is biased."""
    declines: Callable[[Sequence[int]], str | None] | None = None
    """The reason why tensors of a shape are passed on to the plan's next rule; None if they are taken."""
    title: str = ""
    """The name in errors, where that of the class does not say enough."""


class Compressor(ABC):
    """Pure tensor maths with frozen hyper-parameters: a dataclass with ``compress`` and ``decompress``.

    Both only read ``state``, which is equal on all ranks. ``thinwire.core.capabilities`` has what it may offer besides.
    """

    @cached_property
    def traits(self) -> Traits:
        """Facts that routes, rules and memories ask for."""
        return Traits()

    def init(self, like: Tensor, ctx: Context) -> State:
        """The state of a fresh unit; ``ctx.rank`` is 0 on every rank."""
        return {}

    @abstractmethod
    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        """Encode ``x``; on a meta tensor, only shapes and dtypes."""

    @abstractmethod
    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        """Decode ``payload`` as any receiver does; ``like`` gives shape and dtype, never values."""

    def __rshift__(self, then: "Compressor") -> "Chain":
        """Chain: this compressor, with the values of its payload sent as ``then`` codes them."""
        from thinwire.core.chain import Chain  # which is written in these words

        return Chain(self, then)


class Memory(Absorbing, ABC):
    """What is remembered of a unit between steps, in two parts that never mix.

    The *local* state differs between ranks and is written on the sending side alone; the *shared* state is the
    same on every rank and is written on the receiving side alone. Each write reads ``old``, what the last finished
    step left, and fills ``new``, which counts only once the optimizer has stepped. A key that both parts have is
    mirrored: the shared tensor is the mean over ranks of the local ones, so one is never kept without the other, and
    what is asked is a difference, to which nothing that is pending may be added. ``compensate`` also finds the shared
    state in ``old``, under what the local one has of the same name.
    """

    stateful: ClassVar[bool] = True
    """Whether anything is remembered at all, and so must be kept from what is not finite."""

    absorbs: ClassVar[bool] = False
    """Whether this memory takes momentum and weight decay over from the optimizer."""
    linear: ClassVar[bool] = False
    """Whether what the optimizer gets is linear in the gradients, number by number: a complex one may go as two."""
    feeds_back: ClassVar[bool] = False
    """Whether what was not sent comes back, which needs a compressor that contracts."""
    gives: ClassVar[str] = "gradient"
    """What the optimizer gets as ``grad``; it must be one that takes that."""

    @property
    def passes_on(self) -> bool:
        """Whether ``receive`` answers the mean as it is, so that one of few elements may stay a sparse tensor."""
        return type(self).receive is Memory.receive

    @property
    def uncompressed(self) -> "Memory | None":
        """The memory beside it for parameters that are sent dense; None for one that forgets."""
        return None

    derived: ClassVar[frozenset[str]] = frozenset()
    """What of the state follows from the optimizer's, and so is in no checkpoint."""

    def makes_up_for(self, compressor: "Compressor") -> bool:
        """Whether training converges under this memory although the compressor is biased."""
        return self.feeds_back

    @property
    def accumulation(self) -> Accumulation | None:
        """What ``compensate`` does, where it is no more than an accumulation that a kernel can do in its place."""
        return None

    @property
    def residual_gain(self) -> float:
        """How much of a gradient's whole effect one unit of the residual has, momentum included; 1 for gradients.

        A residual that changes hands is scaled by it: a velocity already has the momentum in it.
        """
        return 1.0

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        """The dtype this memory works in, and what it hands to the compressor."""
        return grad

    def init(self, like: Tensor) -> State:
        """The local state of a fresh unit."""
        return {}

    def init_shared(self, like: Tensor) -> State:
        """The shared state of a fresh unit."""
        return {}

    @abstractmethod
    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        """From the local gradient, times ``scale`` (1 / loss scale), to what is to be compressed."""

    def sent(self, x: Tensor, own: Decompressed, new: State) -> None:
        """Remember what of ``x`` the receivers did not get; ``own`` is what they got."""

    def returned(self, rest: Decompressed, new: State) -> None:
        """Take in, with the residual, what came back unsent: ``rest`` of all that ranks sent to this one to pass on."""

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        """From the mean over ranks (may be overwritten) to the gradient for the optimizer; ``ctx.rank`` is 0."""
        return mean

    def absorb(self, settings: Absorbed) -> Self:
        """The same memory, doing what the optimizer did with these settings."""
        return self

    def inferred(self, known: State) -> State:
        """What else of a local state follows from ``known``, which another memory left."""
        return {}

    def take_buffer(self, buffer: Tensor, local: State, shared: State) -> None:
        """Continue from an SGD momentum buffer."""

    def give_buffer(self, local: State, shared: State) -> tuple[Tensor | None, Tensor | None]:
        """The SGD momentum buffer to continue from, as (a part to be averaged over ranks, a part equal on all)."""
        return None, None
