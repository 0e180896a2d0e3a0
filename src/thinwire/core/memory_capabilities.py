"""Capabilities of memories: what a memory may offer besides ``compensate``, ``sent`` and ``receive``.

A memory that offers one derives from its class. Everybody else calls the functions below, which know what to do for a
memory without the capability.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

from torch import Tensor

from thinwire.core.interfaces import Memory, State
from thinwire.core.loops import Accumulation

M = TypeVar("M", bound=Memory)


@dataclass(frozen=True)
class Absorbed:
    """SGD settings of one parameter that a memory applies instead of the optimizer."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """The settings that are on; a memory's state tensors depend on that, not on the values."""
        return bool(self.momentum), self.nesterov, bool(self.weight_decay)


@dataclass(frozen=True)
class MemoryTraits:
    """Facts of a memory under its present settings, all with a safe default."""

    accumulation: Accumulation | None = None
    """The arithmetic of ``compensate``, if a kernel can do it together with the selection."""
    fused_slots: tuple[str, str] = ("residual", "momentum")
    """The slots that the kernel reads and writes: the pending one, and that of the momentum."""
    passes_on: bool = False
    """True if ``receive`` returns the mean as it is, so that one of few elements may stay a sparse tensor."""
    gives: str = "gradient"
    """The name of what the optimizer gets as ``grad``; the optimizer must take that."""
    uncompressed: Memory | None = None
    """The memory for parameters that are sent dense; None for one that forgets."""
    begins_as: Mapping[str, str] = field(default_factory=dict[str, str])
    """Local slots that begin as a copy of another one, where an earlier memory left that one alone."""
    rests: Set[str] = frozenset()
    """The slots that no step changes."""
    takes_votes: bool = False
    """True if training converges with compressors that send only signs, although it forgets what they lose."""
    residual_gain: float = 1.0
    """The share of a gradient's whole effect that one unit of the residual has, momentum included.

    A residual that another memory takes over is scaled by it: a velocity already has the momentum in it.
    """


PLAIN = MemoryTraits()


class HasTraits:
    """A memory with facts that differ from the defaults."""

    @cached_property
    def traits(self) -> MemoryTraits:
        """The facts; computed once, since the exchange reads them at every step."""
        return PLAIN


class FollowsOptimizer(ABC):
    """A memory whose hyper-parameters are the optimizer's."""

    @abstractmethod
    def absorb(self, settings: Absorbed) -> Memory:
        """Return the same memory with these settings."""


class OwnsMomentum(FollowsOptimizer):
    """A memory that does an SGD optimizer's momentum and weight decay, and gives them back at the end."""

    @property
    @abstractmethod
    def absorbed(self) -> Absorbed:
        """The settings of the SGD optimizer that it stands in for."""

    @abstractmethod
    def take_buffer(self, buffer: Tensor, local: State, shared: State) -> None:
        """Continue from an SGD momentum buffer."""

    @abstractmethod
    def give_buffer(self, local: State, shared: State) -> tuple[Tensor | None, Tensor | None]:
        """Return the SGD momentum buffer to continue from: a part to be averaged over ranks, a part equal on all."""

    def take_over(self, old: Memory, local: State, shared: State) -> None:
        """Go on from states of the same memory with other settings; what ``shared`` loses goes into ``local``."""


def traits_of(memory: Memory) -> MemoryTraits:
    return memory.traits if isinstance(memory, HasTraits) else PLAIN


def absorb(memory: M, settings: Absorbed) -> M:
    """Return the same memory with the optimizer's settings, if it follows them."""
    return cast(M, memory.absorb(settings)) if isinstance(memory, FollowsOptimizer) else memory


def absorbed(memory: Memory) -> Absorbed | None:
    """The settings of the SGD optimizer that a memory stands in for; None if it does nothing of it."""
    return memory.absorbed if isinstance(memory, OwnsMomentum) else None


def take_buffer(memory: Memory, buffer: Tensor, local: State, shared: State) -> None:
    """Continue from an SGD momentum buffer, if the memory owns the momentum."""
    if isinstance(memory, OwnsMomentum):
        memory.take_buffer(buffer, local, shared)


def give_buffer(memory: Memory, local: State, shared: State) -> tuple[Tensor | None, Tensor | None]:
    """Return the SGD momentum buffer to continue from: a part to be averaged over ranks, a part equal on all."""
    return memory.give_buffer(local, shared) if isinstance(memory, OwnsMomentum) else (None, None)


def inferred(memory: Memory, known: State) -> State:
    """Return further slots of a local state that follow from those that another memory left."""
    pairs = traits_of(memory).begins_as.items()
    return {key: known[other].clone() for key, other in pairs if key not in known and other in known}
