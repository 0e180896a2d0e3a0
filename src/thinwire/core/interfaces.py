"""The vocabulary: what every other file of thinwire is written in.

A compressed exchange is cut in the middle by the network, so a method is two local halves around one
collective: ``compensate -> compress`` on the sender, ``decompress -> receive`` on every receiver. A
``Compressor`` is pure tensor maths, a ``Memory`` is what is remembered between steps, and a ``Decompressed``
is what a receiver reconstructs from one payload, in a form that can be added without being made dense first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from thinwire.core.context import NOWHERE, Context
from thinwire.core.tensors import Decompressed, float_at_least_32

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


class Role(Enum):
    """The meaning of a slot, which decides what happens to it when a method changes or a world is folded."""

    PENDING = "what was not sent yet; it is passed on to the next method, and averaged over ranks in another world"
    ESTIMATE = "what the receivers believe; it is passed on in both states or in none"
    MOMENTUM = "an average of gradients"
    DERIVED = "it follows from the optimizer's state, and is in no checkpoint"


@dataclass(frozen=True)
class Slot:
    """One tensor of a memory's state, of the shape of the parameter; it begins with zeros.

    Args:
        where: ``"local"`` differs between ranks and is written by ``compensate`` and ``sent`` alone; ``"shared"`` is
            equal on all ranks and is written by ``receive`` alone; ``"both"`` is one of either, and the shared tensor
            is the mean over ranks of the local ones.
        wide: kept in float32 at least, whatever the dtype of the memory.
    """

    role: Role
    where: Literal["local", "shared", "both"] = "local"
    wide: bool = False


class Memory(ABC):
    """What is remembered of a parameter between steps: a frozen dataclass with slots and three functions on them.

    ``compensate`` and ``sent`` read ``old``, what the last finished step left, and fill ``new``, which counts only once
    the optimizer has stepped. ``compensate`` also finds the shared slots in ``old``, under the local ones of the same
    name. ``thinwire.core.memory_capabilities`` has what a memory may offer besides.
    """

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The tensors of its state, by name."""
        return {}

    @property
    def stateful(self) -> bool:
        """True if something is remembered, which must be kept from what is not finite."""
        return bool(self.slots)

    @property
    def linear(self) -> bool:
        """True if the result is linear in the gradients, number by number: a complex one may travel as two."""
        return False

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        """The dtype of the slots, and of what the compressor gets; by default that of the gradient."""
        return grad

    @abstractmethod
    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        """Return what is to be compressed, from the local gradient times ``scale`` (1 / loss scale)."""

    def sent(self, decoded: Decompressed, new: State, sign: float = -1.0) -> None:  # noqa: B027
        """Take what the receivers get, ``decoded``, off what is pending: add ``sign`` times it.

        With ``sign=1.0`` it comes back: the owner of a piece could not pass it on.
        """

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        """Return the gradient for the optimizer, from the mean over ranks (may be overwritten); ``ctx.rank`` is 0."""
        return mean


def local_state(memory: Memory, like: Tensor) -> State:
    """Return one rank's fresh state; ``like`` has the shape, layout and dtype of what is compressed."""
    return _state(memory, like, "local")


def shared_state(memory: Memory, like: Tensor) -> State:
    """Return the fresh state that is equal on all ranks."""
    return _state(memory, like, "shared")


def _state(memory: Memory, like: Tensor, where: str) -> State:
    slots = {k: s for k, s in memory.slots.items() if s.where in (where, "both") and s.role is not Role.DERIVED}
    dtypes = {key: float_at_least_32(like.dtype) if slot.wide else like.dtype for key, slot in slots.items()}
    return {k: torch.zeros_like(like, dtype=dtypes[k], memory_format=torch.preserve_format) for k in slots}


def feeds_back(memory: Memory) -> bool:
    """True if what was not sent comes back, which needs a compressor that contracts."""
    return any(s.where != "shared" and s.role in (Role.PENDING, Role.ESTIMATE) for s in memory.slots.values())


def named(memory: Memory, role: Role) -> frozenset[str]:
    """The names of the slots of a role."""
    return frozenset(key for key, slot in memory.slots.items() if slot.role is role)


def replicated(memory: Memory) -> frozenset[str]:
    """The names of the slots that both states have: an estimate on each rank, and the mean of them on all."""
    return frozenset(k for k, slot in memory.slots.items() if slot.where == "both" and slot.role is not Role.DERIVED)
