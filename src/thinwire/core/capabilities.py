"""Capabilities: what a compressor may offer besides ``compress`` and ``decompress``, each as a small interface.

A compressor that offers one derives from its class. Everybody else calls the functions below, which know what to do for
a compressor without the capability. A ``Wrapper`` passes on those of the compressor in it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import Tensor

from thinwire.core.context import Context
from thinwire.core.interfaces import Compressor, Payload, State
from thinwire.core.loops import Found, Selection
from thinwire.core.tensors import Decompressed, Sparse


class WarmStarted(ABC):
    """A compressor whose state follows the mean of all payloads, as PowerSGD's factors do; only a sum gives it."""

    @abstractmethod
    def commit(self, payload: Payload, like: Tensor, old: State, new: State, ctx: Context) -> None:
        """Fill ``new``, from ``old`` and the mean of all ranks' payloads."""

    def inherit(self, old: State, fresh: State) -> State:
        """Return the state to begin with where another compressor left ``old``: what has the same name and shape."""
        return {key: old[key] if key in old and old[key].shape == x.shape else x for key, x in fresh.items()}

    def moved(self, old: State, fresh: State, order: Tensor) -> State:
        """Return the state to go on with where element j in memory was element ``order[j]`` before."""
        return {key: value.clone() for key, value in fresh.items()}


class Adjustable:
    """A compressor with a density that a warm-up raises and a second stage scales."""

    adjusts: ClassVar[str] = "density"
    """The name of the field that holds the density."""

    @property
    def _share(self) -> float:
        """The density: kept / total."""
        return getattr(self, self.adjusts)

    def with_density(self, density: float) -> Compressor:
        """Return the same compressor at a density no lower than this; at 1 a warm-up sends dense instead."""
        return replace(cast(Any, self), **{self.adjusts: max(density, self._share)})

    def scaled_density(self, factor: float) -> Compressor:
        """Return the same compressor at ``factor`` times its density, at most 1."""
        return replace(cast(Any, self), **{self.adjusts: min(1.0, factor * self._share)})


class Thresholded(ABC):
    """A sparsifier that selects by a threshold, so that a kernel can compensate and select in one pass."""

    @abstractmethod
    def sampling(self, shape: Sequence[int], ctx: Context) -> Selection | None:
        """The selection of this step's elements; None if this tensor is not selected by a threshold."""

    @abstractmethod
    def encode(self, chosen: Tensor, values: Tensor, n: int, ctx: Context) -> Payload:
        """The payload of a selection: ascending int64 indices into ``n`` elements, and the values there."""

    def own(self, payload: Payload, chosen: Tensor, like: Tensor, state: State, ctx: Context) -> Decompressed:
        """Decode what ``encode`` has just made of the elements ``chosen``."""
        return cast(Compressor, self).decompress(payload, like, state, ctx)


class SumsSparsely(ABC):
    """A sparsifier that decodes and sums the payloads of all ranks without making them dense."""

    @abstractmethod
    def together(
        self, payloads: Sequence[tuple[int, Payload]], like: Tensor, ctx: Context, alpha: float, most: float
    ) -> Found | None:
        """Decode and sum ``alpha`` times the payloads of all ranks, into sorted indices and values.

        None if more than a share ``most`` of the elements can be among them, or only ``decompress`` can decode them.
        """


class TakesSparse(ABC):
    """A splittable compressor that compresses a sparse tensor without making it dense."""

    @abstractmethod
    def compress_sparse(self, x: Sparse, like: Tensor, state: State, ctx: Context) -> Payload:
        """Encode the flat tensor that is 0 except at ``x`` (ascending, no index twice).

        ``like`` gives shape and dtype, never values. The payload has the shapes of ``compress(like)``.
        """


class LeaderSelected(ABC):
    """A sparsifier that can send the elements that another rank, the leader of the step, selects for all."""

    @abstractmethod
    def follow(self, x: Tensor, choice: Payload, state: State, ctx: Context) -> Payload:
        """Encode ``x`` at the elements that the leader chose.

        ``choice`` is the leader's payload without its first tensor. The result ends with it, and of payloads with one
        choice the first tensors may be summed.
        """


class ErrorTable(ABC):
    """A compressor whose error is known for several hyper-parameters at once, without trying each."""

    @abstractmethod
    def losses(self, x: Tensor, family: Sequence[Compressor]) -> list[float] | None:
        """``||x - C(x)||^2`` for each C of the family, which differs in hyper-parameters alone; None if unknown."""


def title(compressor: Compressor) -> str:
    """The name of a compressor in errors."""
    return compressor.traits.title or type(compressor).__name__


def declines(compressor: Compressor, shape: Sequence[int]) -> str | None:
    """The reason why tensors of this shape are passed on to the plan's next rule; None if they are taken."""
    traits = compressor.traits
    if len(shape) < traits.min_ndim:
        return f"fewer than {traits.min_ndim} dimensions"
    return None if traits.declines is None else traits.declines(shape)


def commit(compressor: Compressor, payload: Payload, like: Tensor, old: State, new: State, ctx: Context) -> None:
    """Update the state of a warm-started compressor."""
    if isinstance(compressor, WarmStarted):
        compressor.commit(payload, like, old, new, ctx)


def inherit(compressor: Compressor, old: State, fresh: State) -> State:
    """Return the state to begin with where another compressor left ``old``; only a warm start needs it."""
    return compressor.inherit(old, fresh) if isinstance(compressor, WarmStarted) else fresh


def moved(compressor: Compressor, old: State, fresh: State, order: Tensor) -> State:
    """Return the state to go on with where the elements have moved in memory; ``fresh`` is a new one."""
    if isinstance(compressor, WarmStarted):
        return compressor.moved(old, fresh, order)
    return {key: value.clone() for key, value in fresh.items()}


def with_density(compressor: Compressor, density: float) -> Compressor:
    """Return the same compressor at a density no lower than this; one without a density as it is."""
    return compressor.with_density(density) if isinstance(compressor, Adjustable) else compressor


def scaled_density(compressor: Compressor, factor: float) -> Compressor:
    """Return the same compressor at ``factor`` times its density, at most 1; one without a density as it is."""
    return compressor.scaled_density(factor) if isinstance(compressor, Adjustable) else compressor


def compress_sparse(compressor: Compressor, x: Sparse, like: Tensor, state: State, ctx: Context) -> Payload:
    """Compress a flat tensor that is 0 except at ``x``."""
    if isinstance(compressor, TakesSparse):
        return compressor.compress_sparse(x, like, state, ctx)
    return compressor.compress(x.dense(like), state, ctx)


def led(compressor: Compressor, route: str) -> bool:
    """Return True if a leader selects the elements for all ranks, with a method of this route."""
    return compressor.traits.leader_selected or (route == "leader" and compressor.traits.selects)


class Wrapper(Compressor, WarmStarted, Adjustable, TakesSparse):
    """A compressor around another one, the field ``adjusts``, which has the state and the density."""

    @property
    def wrapped(self) -> Compressor:
        return getattr(self, self.adjusts)

    def init(self, like: Tensor, ctx: Context) -> State:
        return self.wrapped.init(like, ctx)

    def commit(self, payload: Payload, like: Tensor, old: State, new: State, ctx: Context) -> None:
        commit(self.wrapped, payload, like, old, new, ctx)

    def inherit(self, old: State, fresh: State) -> State:
        return inherit(self.wrapped, old, fresh)

    def moved(self, old: State, fresh: State, order: Tensor) -> State:
        return moved(self.wrapped, old, fresh, order)

    def with_density(self, density: float) -> Compressor:
        return replace(cast(Any, self), **{self.adjusts: with_density(self.wrapped, density)})

    def scaled_density(self, factor: float) -> Compressor:
        return replace(cast(Any, self), **{self.adjusts: scaled_density(self.wrapped, factor)})

    def compress_sparse(self, x: Sparse, like: Tensor, state: State, ctx: Context) -> Payload:
        return compress_sparse(self.wrapped, x, like, state, ctx)
