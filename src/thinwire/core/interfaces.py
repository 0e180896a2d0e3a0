"""The vocabulary: what every other file of thinwire is written in.

A compressed exchange is cut in the middle by the network, so a method is two local halves around one
collective: ``compensate -> compress`` on the sender, ``decompress -> receive`` on every receiver. A
``Compressor`` is pure tensor maths, a ``Memory`` is what is remembered between steps, and a ``Decompressed``
is what a receiver reconstructs from one payload, in a form that can be added without being made dense first.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

import torch
from torch import Tensor

from thinwire.core.absorbed import Absorbed, Absorbing
from thinwire.core.context import NOWHERE, Context
from thinwire.core.errors import ThinwireError
from thinwire.core.loops import Accumulation, Found, Selection
from thinwire.core.tensors import Decompressed, Sparse

if TYPE_CHECKING:
    from thinwire.core.chain import Chain

Payload: TypeAlias = tuple[Tensor, ...]
"""What one unit sends: contiguous tensors whose shapes and dtypes follow from (compressor, shape) alone."""

State: TypeAlias = dict[str, Tensor]
"""What is remembered of one unit; a checkpoint is a copy of it. ``residual`` is always "asked, not yet sent"."""


class Compressor(ABC):
    """Pure tensor maths with frozen hyper-parameters; ``compress`` and ``decompress`` only read ``state``.

    The state of a compressor, if it has one, is equal on all ranks, and ``commit`` alone writes it.
    """

    summable: ClassVar[bool] = False
    """Whether the sum of payloads decompresses to the sum of tensors, so that an all-reduce may carry them."""
    min_ndim: ClassVar[int] = 0
    """Tensors of fewer dimensions are passed on to the plan's next rule."""
    cuttable: ClassVar[bool] = False
    """Whether any run of a tensor's elements can be compressed on its own, and a sum of such runs once more."""
    period: ClassVar[int] = 1
    """After how many steps the shapes of a payload repeat; they may depend on ``ctx.phase % period``."""
    learns: ClassVar[bool] = False
    """Whether its state follows the mean of all payloads, which only a sum gives."""
    linear: ClassVar[bool] = False
    """Whether it treats every number by itself and a sum as a sum, so that a complex one may go as two."""
    led: ClassVar[bool] = False
    """Whether all ranks send the elements that one of them, the leader of the step, has chosen: see ``follow``."""

    @property
    def title(self) -> str:
        """How errors call it."""
        return type(self).__name__

    @property
    def valued(self) -> bool:
        """Whether its payload begins with the values that it keeps, as they are or all times a factor.

        Then what stands after ``>>`` may code them, and what that loses of them is lost of the whole.
        """
        return False

    @property
    def needs_feedback(self) -> bool:
        """Whether what it loses must be remembered: with a memory that forgets, training need not converge."""
        return False

    @property
    def votes(self) -> bool:
        """Whether all that it sends is on which side of 0 an element is."""
        return False

    def contraction(self, n: int) -> float | None:
        """``alpha`` in (0, 1] with ``E||x - C(x)||^2 <= (1 - alpha) ||x||^2`` for n elements.

        0 where it may lose more than it is given, None where nothing is known.
        """
        return None

    def variance(self, n: int) -> float | None:
        """``omega`` with ``E C(x) = x``, ``E||x - C(x)||^2 <= omega ||x||^2`` for n elements; None if it is biased."""
        return None

    def declines(self, shape: Sequence[int]) -> str | None:
        """Why tensors of this shape are passed on to the plan's next rule; None where they are taken."""
        return None if len(shape) >= self.min_ndim else f"fewer than {self.min_ndim} dimensions"

    def losses(self, x: Tensor, family: Sequence["Compressor"]) -> list[float] | None:
        """``||x - C(x)||^2`` for each C that differs from this in hyper-parameters alone; None if only trying tells."""
        return None

    def __rshift__(self, then: "Compressor") -> "Chain":
        """This compressor, with the values of its payload sent as ``then`` codes them."""
        from thinwire.core.chain import Chain  # which is written in these words

        return Chain(self, then)

    def init(self, like: Tensor, ctx: Context) -> State:
        """The state of a fresh unit; ``ctx.rank`` is 0 on every rank."""
        return {}

    def commit(self, payload: Payload, like: Tensor, old: State, new: State, ctx: Context) -> None:  # noqa: B027
        """Fill ``new``, from ``old`` and the mean of all ranks' payloads; asked of a summable one alone."""

    def inherit(self, old: State, fresh: State) -> State:
        """The state to begin with where another compressor left ``old``: what has the same name and shape."""
        return {key: old[key] if key in old and old[key].shape == x.shape else x for key, x in fresh.items()}

    def moved(self, old: State, fresh: State, order: Tensor) -> State:
        """The state to go on with where element j in memory was element ``order[j]`` before; ``fresh`` is a new one."""
        return {key: value.clone() for key, value in fresh.items()}

    @abstractmethod
    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        """Encode ``x``; on a meta tensor, only shapes and dtypes."""

    @abstractmethod
    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        """What any receiver gets from ``payload``; ``like`` gives shape and dtype, never values."""

    def together(
        self, payloads: Sequence[tuple[int, Payload]], like: Tensor, ctx: Context, alpha: float, most: float
    ) -> Found | None:
        """What ranks sent, at once: ascending indices, and the sum of ``alpha`` times the values at each.

        None where only ``decompress`` knows, or where more than a share ``most`` of the elements can be among them.
        """
        return None

    def sampling(self, shape: Sequence[int], ctx: Context) -> Selection | None:
        """How this step's elements are chosen by a threshold, so that a kernel may do it; None where they are not."""
        return None

    def encode(self, chosen: Tensor, values: Tensor, n: int, ctx: Context) -> Payload:
        """The payload of a selection: ascending int64 indices into ``n`` elements, and the values there."""
        raise ThinwireError(f"{type(self).__name__} answers a sampling() and so must have an encode() of its own")

    def own(self, payload: Payload, chosen: Tensor, like: Tensor, state: State, ctx: Context) -> Decompressed:
        """``decompress`` of what ``encode`` has just made of the elements ``chosen``."""
        return self.decompress(payload, like, state, ctx)

    def with_density(self, density: float) -> "Compressor":
        """The same compressor at a density no lower than this, for a warm-up; one without a density answers itself.

        At a density of 1 a warm-up sends dense, whatever the compressor.
        """
        return self

    def denser(self, factor: float) -> "Compressor":
        """The same compressor at ``factor`` times its density, at most 1; one without a density answers itself."""
        return self

    def compress_sparse(self, x: Sparse, like: Tensor, state: State, ctx: Context) -> Payload:
        """Encode the flat tensor that is 0 but where ``x`` (ascending, no index twice) says; asked of a cuttable one.

        ``like`` gives shape and dtype, never values. The payload is of the shapes of ``compress(like)``.
        """
        raise ThinwireError(
            f"{type(self).__name__} says it is cuttable and so must have a compress_sparse() of its own"
        )

    def follow(self, x: Tensor, choice: Payload, state: State, ctx: Context) -> Payload:
        """Encode ``x`` at the elements that the leader chose; asked of a led one.

        ``choice`` is the leader's payload without its first tensor. The result ends with it, and of payloads with one
        choice the first tensors may be summed.
        """
        raise ThinwireError(f"{type(self).__name__} says it is led and so must have a follow() of its own")


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
