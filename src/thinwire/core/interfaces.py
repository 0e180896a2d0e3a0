"""The interfaces of compressors and memories.

A method has two local halves around a collective: ``compensate -> compress`` on the sender, and
``decompress -> receive`` on every receiver.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from thinwire.core.context import NOWHERE, Context
from thinwire.core.tensors import Decompressed, float_at_least_32

if TYPE_CHECKING:
    from thinwire.core.chain import Chain

Payload: TypeAlias = tuple[Tensor, ...]
"""The tensors that one unit sends: contiguous; shapes and dtypes depend on (compressor, shape, phase mod period)."""

State: TypeAlias = dict[str, Tensor]
"""The state of one unit, by slot; a checkpoint is a copy of it. ``residual`` is always the part not yet sent."""


def unknown(n: int) -> float | None:
    """Return None: no bound is known for tensors of n elements."""
    return None


@dataclass(frozen=True)
class Traits:
    """Facts of a compressor, all with a safe default; a wrapper returns ``replace(inner.traits, ...)``."""

    summable: bool = False
    """True if the sum of payloads decompresses to the sum of tensors, so that an all-reduce may sum them."""
    splittable: bool = False
    """True if any run of a tensor's elements can be compressed on its own, and a sum of such runs again."""
    min_ndim: int = 0
    """Tensors with fewer dimensions go to the method's next rule."""
    period: int = 1
    """The shapes of a payload repeat after so many steps; they may depend on ``ctx.phase % period``."""
    needs_feedback: bool = False
    """True if training may fail to converge with a memory that does not keep the compression error."""
    linear: bool = False
    """True if it is linear and compresses every number separately, so a complex number can be sent as two."""
    keeps_values: bool = False
    """True if its payload begins with the kept values, unchanged or all times one factor, so ``>>`` may code them."""
    votes: bool = False
    """True if it sends only the sign of each element."""
    warm_started: bool = False
    """True if its state follows the mean of all payloads, which needs a sum: see ``WarmStarted``."""
    selects: bool = False
    """True if its payload is the values of selected elements, which ranks may sum where they send the same elements,
    and then the indices; so a leader can select for all: see ``LeaderSelected``."""
    leader_selected: bool = False
    """True if all ranks send the elements that one of them has selected, whatever the method's route."""
    contraction: Callable[[int], float | None] = unknown
    """``alpha`` in (0, 1] with ``E||x - C(x)||^2 <= (1 - alpha) ||x||^2`` for n elements.

    0 if the error may be larger than the input, None if nothing is known.
    """
    variance: Callable[[int], float | None] = unknown
    """``omega`` with ``E C(x) = x``, ``E||x - C(x)||^2 <= omega ||x||^2`` for n elements; None if it is biased."""
    declines: Callable[[Sequence[int]], str | None] | None = None
    """Returns the reason why tensors of a shape go to the method's next rule; None if it compresses them."""
    title: str = ""
    """The name for errors, if the class name is not specific enough."""


class Compressor(ABC):
    """Pure tensor maths with frozen hyper-parameters: a dataclass with ``compress`` and ``decompress``.

    Both only read ``state``, which is equal on all ranks. Optional interfaces are in ``thinwire.core.capabilities``.
    """

    @cached_property
    def traits(self) -> Traits:
        """The facts that routes, rules and memories use."""
        return Traits()

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "traits"}  # may hold what can't be pickled

    def init(self, like: Tensor, ctx: Context) -> State:
        """Return the state of a fresh unit; ``ctx.rank`` is 0 on every rank."""
        return {}

    @abstractmethod
    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        """Encode ``x``; for a meta tensor, return meta tensors of the payload's shapes and dtypes."""

    @abstractmethod
    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        """Decode ``payload`` as any receiver does; ``like`` gives shape and dtype, never values."""

    def __rshift__(self, then: "Compressor") -> "Chain":
        """Return a chain: this compressor, with the values of its payload encoded by ``then``."""
        from thinwire.core.chain import Chain  # it imports this file

        return Chain(self, then)


class Role(Enum):
    """The meaning of a slot, which decides its migration to another method or world size."""

    PENDING = "what was not sent yet; it is passed on to the next method, and averaged over ranks in another world"
    ESTIMATE = "what the receivers believe; it is passed on in both states or in none"
    MOMENTUM = "an average of gradients"
    DERIVED = "it follows from the optimizer's state, and is in no checkpoint"


@dataclass(frozen=True)
class Slot:
    """One tensor of a memory's state, with the parameter's shape; it starts with zeros.

    Args:
        where: ``"local"`` differs between ranks, and only ``compensate`` and ``sent`` write it; ``"shared"`` is equal
            on all ranks, and only ``receive`` writes it; ``"both"`` is one tensor of each kind, where the shared tensor
            is the mean over ranks of the local ones.
        wide: True to keep it in float32 at least, whatever the dtype of the memory.
    """

    role: Role
    where: Literal["local", "shared", "both"] = "local"
    wide: bool = False


class Memory(ABC):
    """The rules for a parameter's state between steps: a frozen dataclass with slots and three functions on them.

    ``compensate`` reads ``old``, the state after the last finished step. ``compensate`` and ``sent`` write ``new``,
    which is committed when the optimizer steps. ``old`` also has the shared slots, except those that a local slot of
    the same name hides. Optional interfaces are in ``thinwire.core.memory_capabilities``.
    """

    stateful: ClassVar[bool] = True
    """True if it has state, which nonfinite gradients must not reach."""
    linear: ClassVar[bool] = False
    """True if the result is linear in each number of the gradients, so a complex number can be sent as two."""

    def __getstate__(self) -> dict[str, object]:
        fields = getattr(type(self), "__dataclass_fields__", vars(self))  # and nothing that was computed from them
        return {key: value for key, value in vars(self).items() if key in fields}

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The tensors of its state, by name."""
        return {}

    def dtype(self, grad: torch.dtype) -> torch.dtype:
        """Return the dtype of the slots and of the compensated tensor; by default that of the gradient."""
        return grad

    @abstractmethod
    def compensate(
        self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0, ctx: Context = NOWHERE
    ) -> Tensor:
        """Return the compensated tensor to compress, from the local gradient times ``scale`` (1 / loss scale)."""

    def sent(self, decoded: Decompressed, new: State, sign: float = -1.0) -> None:  # noqa: B027
        """Record that receivers get ``decoded``: add ``sign`` times it to a residual, ``-sign`` times to an estimate.

        ``sign=1.0`` takes back what the owner of a piece could not pass on.
        """

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State, ctx: Context = NOWHERE) -> Tensor:
        """Return the gradient for the optimizer, from the mean over ranks (may be overwritten); ``ctx.rank`` is 0."""
        return mean


def local_state(memory: Memory, like: Tensor) -> State:
    """Return one rank's fresh state; ``like`` has the shape, layout and dtype of the compensated tensor."""
    return _state(memory, like, "local")


def shared_state(memory: Memory, like: Tensor) -> State:
    """Return the fresh state that is equal on all ranks."""
    return _state(memory, like, "shared")


def _state(memory: Memory, like: Tensor, where: str) -> State:
    slots = {k: s for k, s in memory.slots.items() if s.where in (where, "both") and s.role is not Role.DERIVED}
    dtypes = {key: float_at_least_32(like.dtype) if slot.wide else like.dtype for key, slot in slots.items()}
    return {k: torch.zeros_like(like, dtype=dtypes[k], memory_format=torch.preserve_format) for k in slots}


def feeds_back(memory: Memory) -> bool:
    """Return True if the memory keeps the compression error, which needs a contracting compressor."""
    return any(s.where != "shared" and s.role in (Role.PENDING, Role.ESTIMATE) for s in memory.slots.values())


def named(memory: Memory, role: Role) -> frozenset[str]:
    """Return the names of the slots of a role."""
    return frozenset(key for key, slot in memory.slots.items() if slot.role is role)


def replicated(memory: Memory) -> frozenset[str]:
    """Return the names of the replicated slots: an estimate on each rank, and the mean of them on all."""
    return frozenset(k for k, slot in memory.slots.items() if slot.where == "both" and slot.role is not Role.DERIVED)
