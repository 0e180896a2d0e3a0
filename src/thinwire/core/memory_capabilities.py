"""Capabilities of memories: what a memory may offer beside ``compensate``, ``sent`` and ``receive``.

A memory that offers one derives from its class. Everybody else calls the functions below, which know what to do for a
memory without the capability.
"""

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import TypeVar, cast

from torch import Tensor

from thinwire.core.absorbed import Absorbed
from thinwire.core.interfaces import Compressor, Memory, State, feeds_back
from thinwire.core.loops import Accumulation

M = TypeVar("M", bound=Memory)


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

    @property
    @abstractmethod
    def rests(self) -> Set[str]:
        """The slots that no step changes under the present settings."""

    @abstractmethod
    def take_buffer(self, buffer: Tensor, local: State, shared: State) -> None:
        """Continue from an SGD momentum buffer."""

    @abstractmethod
    def give_buffer(self, local: State, shared: State) -> tuple[Tensor | None, Tensor | None]:
        """Return the SGD momentum buffer to continue from: a part to be averaged over ranks, a part equal on all."""

    def take_over(self, old: Memory, local: State, shared: State) -> None:
        """Go on from states of the same memory with other settings; what ``shared`` loses goes into ``local``."""


class Fusable(ABC):
    """A memory whose ``compensate`` is an accumulation that a kernel can do together with the selection."""

    @property
    @abstractmethod
    def accumulation(self) -> Accumulation | None:
        """The arithmetic of the kernel; None if the present settings need more."""

    @property
    def fused_slots(self) -> tuple[str, str]:
        """The names of the slots that the kernel reads and writes: the pending one, and that of the momentum."""
        return "residual", "momentum"


class PassesOn:
    """A memory whose ``receive`` returns the mean as it is, so that one of few elements may stay a sparse tensor."""

    @property
    def passes_on(self) -> bool:
        """False if the present settings change the mean."""
        return True


class GivesMomentum(ABC):
    """A memory that hands the optimizer something else than a gradient; the optimizer must take that."""

    @property
    @abstractmethod
    def gives(self) -> str:
        """The name of what the optimizer gets as ``grad``."""


class HasDenseForm(ABC):
    """A memory that stands beside another one for parameters that are sent dense."""

    @property
    @abstractmethod
    def uncompressed(self) -> Memory:
        """The memory for parameters that are sent dense."""


class AcceptsBias(ABC):
    """A memory under which training converges with some biased compressors although it forgets what they lose."""

    @abstractmethod
    def makes_up_for(self, compressor: Compressor) -> bool:
        """True if it does with this one."""


class ScaledResidual(ABC):
    """A memory whose residual is not in units of gradients."""

    @property
    @abstractmethod
    def residual_gain(self) -> float:
        """The share of a gradient's whole effect that one unit of the residual has, momentum included.

        A residual that changes hands is scaled by it: a velocity already has the momentum in it.
        """


class Infers(ABC):
    """A memory that can make a slot of its own from the slots of another memory."""

    @abstractmethod
    def inferred(self, known: State) -> State:
        """Return further slots of a local state that follow from ``known``, which another memory left."""


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


def rests(memory: Memory) -> Set[str]:
    """The slots that no step changes under the present settings."""
    return memory.rests if isinstance(memory, OwnsMomentum) else frozenset()


def accumulation(memory: Memory) -> Accumulation | None:
    """The arithmetic that a kernel can do in place of ``compensate``; None if it can't."""
    return memory.accumulation if isinstance(memory, Fusable) else None


def passes_on(memory: Memory) -> bool:
    """True if ``receive`` returns the mean as it is."""
    return isinstance(memory, PassesOn) and memory.passes_on


def gives(memory: Memory) -> str:
    """The name of what the optimizer gets as ``grad``."""
    return memory.gives if isinstance(memory, GivesMomentum) else "gradient"


def uncompressed(memory: Memory) -> Memory | None:
    """The memory for parameters that are sent dense; None for one that forgets."""
    return memory.uncompressed if isinstance(memory, HasDenseForm) else None


def makes_up_for(memory: Memory, compressor: Compressor) -> bool:
    """True if training converges under this memory although the compressor is biased."""
    return memory.makes_up_for(compressor) if isinstance(memory, AcceptsBias) else feeds_back(memory)


def residual_gain(memory: Memory) -> float:
    """The share of a gradient's whole effect that one unit of the residual has; 1 for gradients."""
    return memory.residual_gain if isinstance(memory, ScaledResidual) else 1.0


def inferred(memory: Memory, known: State) -> State:
    """Return further slots of a local state that follow from those that another memory left."""
    return memory.inferred(known) if isinstance(memory, Infers) else {}
