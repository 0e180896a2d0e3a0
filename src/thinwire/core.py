"""The vocabulary: what every other file of thinwire is written in.

A compressed exchange is cut in the middle by the network, so a method is two local halves around one
collective: ``compensate -> compress`` on the sender, ``decompress -> receive`` on every receiver. A
``Compressor`` is pure tensor maths, a ``Memory`` is what is remembered between steps, and a ``Decompressed``
is what a receiver reconstructs from one payload, in a form that can be added without being made dense first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeAlias, TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor

Payload: TypeAlias = tuple[Tensor, ...]
"""What one unit sends: contiguous tensors whose shapes and dtypes follow from (compressor, shape) alone."""

State: TypeAlias = dict[str, Tensor]
"""What is remembered of one unit; a checkpoint is a copy of it. ``residual`` is always "asked, not yet sent"."""

Found: TypeAlias = tuple[Tensor, Tensor]
"""Elements of a flat tensor: ascending int64 indices, and the values there."""

D = TypeVar("D", bound="Memory")


class ThinwireError(Exception):
    """Something asked of thinwire cannot be done; the message names the value, the limit and the way out."""


@dataclass(frozen=True)
class Accumulation:
    """How a memory adds a gradient to what it holds, as far as a kernel needs to know.

    ``u' = m u + s g``, ``v' = v + u'``; with Nesterov ``u' = m (u + s g)``, ``v' = v + u' + s g``; without a momentum
    ``v' = v + s g``. ``s`` is 1 / loss scale, and each operation is rounded to float32.
    """

    momentum: float | None
    nesterov: bool = False


@dataclass(frozen=True)
class Pass:
    """One contiguous range of one unit, to be accumulated and looked through: 1-D tensors ``[n]``.

    ``grad`` has any floating dtype and is set to zero; the states are float32 or bfloat16, all alike.
    """

    rule: Accumulation
    grad: Tensor
    old_residual: Tensor
    new_residual: Tensor
    old_momentum: Tensor | None
    new_momentum: Tensor | None
    scale: float = 1.0


class Selection(Protocol):
    """Which elements are sent, where a threshold that is known beforehand decides it."""

    @property
    def start(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def run(self) -> int: ...

    def threshold(self, sampled: Tensor) -> Tensor:
        """The threshold, a scalar, from the magnitudes of ``run`` elements at every ``stride``-th from ``start`` on."""
        ...

    def settle(self, found: Found, threshold: Tensor, look: Callable[[Tensor], Found]) -> Found:
        """What is sent, where ``found`` is what is not below the threshold; ``look`` finds it for another one."""
        ...


class Kernels(Protocol):
    """The loops in which the time goes. All implementations give the same bits as plain PyTorch."""

    name: str

    def runs(self, work: Pass) -> bool:
        """Whether this dtype and device can be taken."""
        ...

    def sample(self, work: Pass, start: int, stride: int, run: int) -> Tensor:
        """``|v'|`` before the pass itself, in any order: ``run`` elements at every ``stride``-th from ``start`` on.

        The last run is left out where it would reach beyond the end. Writes nothing.
        """
        ...

    def accumulate(self, works: Sequence[Pass], thresholds: Sequence[Tensor]) -> list[Found]:
        """Write the new states, clear the gradients; answers where ``|v'|`` is not below the threshold (NaN never is).

        Thresholds are scalars of the state's dtype and device.
        """
        ...

    def look(self, x: Tensor, threshold: Tensor) -> Found:
        """Where ``|x|``, of one dimension, is not below the threshold."""
        ...

    def add(self, out: Tensor, indices: Tensor, values: Tensor, alpha: float) -> None:
        """``out[indices] += alpha * values``, one after the other, for ``out`` of one dimension."""
        ...

    def encode_indices(self, indices: Tensor, n: int) -> Tensor:
        """``wire.elias_fano.encode``."""
        ...

    def decode_indices(self, packed: Tensor, k: int, n: int) -> Tensor:
        """``wire.elias_fano.decode``."""
        ...

    def close(self) -> None:
        """Let go of threads."""
        ...


@dataclass(frozen=True)
class Context:
    """Where and when something is compressed; all randomness is a function of it, so none is checkpointed."""

    seed: int
    step: int
    unit: str
    rank: int
    kernels: Kernels | None = field(default=None, compare=False, repr=False)
    """Which loops to use; None for plain PyTorch. The result is the same."""

    def draw(self, bound: int) -> int:
        """An integer in [0, bound), the same on every machine for equal contexts."""
        return crc32(f"{self.seed}/{self.step}/{self.unit}/{self.rank}".encode()) % bound


def is_dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` fill one block of memory, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(x.stride(), x.shape, strict=True) if si != 1):
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True


def flat(x: Tensor) -> Tensor:
    """A 1-D view of ``x`` in the order of its memory, so channels_last tensors are not copied.

    Raises:
        ThinwireError: the elements of ``x`` do not fill one block of memory.
    """
    if x.is_contiguous():
        return x.view(-1)
    if not is_dense(x):
        raise ThinwireError(
            f"a tensor of shape {tuple(x.shape)} has strides {x.stride()}, which leave gaps; use x.contiguous()"
        )
    return x.as_strided((x.numel(),), (1,))


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm over all elements of all tensors, accumulated in float32 or better, on the first one's device."""
    each: list[Tensor] = []
    for x in tensors:
        own = cast(Tensor, torch.linalg.vector_norm(x, dtype=float_at_least_32(x.dtype)))
        each.append(own.to(each[0].device) if each else own)
    return torch.stack(each).square().sum().sqrt()


class Decompressed(ABC):
    """What a receiver reconstructs from one payload; ``density`` is the share of elements it carries."""

    density: float

    @abstractmethod
    def write_to(self, out: Tensor, alpha: float = 1.0) -> None:
        """``out = alpha * self``, whatever ``out`` held."""

    @abstractmethod
    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        """``out += alpha * self``."""

    @abstractmethod
    def clear(self, out: Tensor) -> None:
        """``out = 0`` at every element that was sent."""

    @abstractmethod
    def entries(self) -> tuple[Tensor, Tensor]:
        """Flat indices (int64) and values of the elements that were sent."""


@dataclass(frozen=True)
class Dense(Decompressed):
    """Every element is there: ``values`` is 1-D, in the order of memory."""

    values: Tensor
    density: float = 1.0

    def write_to(self, out: Tensor, alpha: float = 1.0) -> None:
        if out.data_ptr() != self.values.data_ptr() or out.dtype != self.values.dtype:  # summed in place
            flat(out).copy_(self.values)
        if alpha != 1.0:
            out.mul_(alpha)

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        flat(out).add_(self.values, alpha=alpha)

    def clear(self, out: Tensor) -> None:
        out.zero_()

    def entries(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.values.numel(), device=self.values.device), self.values


@dataclass(frozen=True)
class Sparse(Decompressed):
    """``values[j]`` stands at ``indices[j]`` (int64) of the flat tensor; an index that occurs twice adds twice."""

    indices: Tensor  # [k]
    values: Tensor  # [k]
    density: float
    kernels: Kernels | None = None

    def write_to(self, out: Tensor, alpha: float = 1.0) -> None:
        out.zero_()
        self.add_to(out, alpha)

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        values = self.values.to(out.dtype)
        if self.kernels is not None:
            self.kernels.add(flat(out), self.indices, values, alpha)
        else:
            flat(out).index_add_(0, self.indices, values, alpha=alpha)

    def clear(self, out: Tensor) -> None:
        flat(out).index_fill_(0, self.indices, 0.0)

    def entries(self) -> tuple[Tensor, Tensor]:
        return self.indices, self.values


class Compressor(ABC):
    """Pure tensor maths with frozen hyper-parameters; ``compress`` and ``decompress`` only read ``state``."""

    summable: ClassVar[bool] = False
    """Whether the sum of payloads decompresses to the sum of tensors, so that an all-reduce may carry them."""
    min_ndim: ClassVar[int] = 0
    """Tensors of fewer dimensions are passed on to the plan's next rule."""
    cuttable: ClassVar[bool] = False
    """Whether any run of a tensor's elements can be compressed on its own, and a sum of such runs once more."""

    @abstractmethod
    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        """Encode ``x``; on a meta tensor, only shapes and dtypes."""

    @abstractmethod
    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        """What any receiver gets from ``payload``; ``like`` gives shape and dtype, never values."""

    def sampling(self, shape: Sequence[int], ctx: Context) -> Selection | None:
        """How this step's elements are chosen by a threshold, so that a kernel may do it; None where they are not."""
        return None

    def encode(self, chosen: Tensor, values: Tensor, n: int, ctx: Context) -> Payload:
        """The payload of a selection: ascending int64 indices into ``n`` elements, and the values there."""
        raise ThinwireError(f"{type(self).__name__} answers a sampling() and so must have an encode() of its own")

    def with_density(self, density: float) -> "Compressor":
        """The same compressor at a density no lower than this, for a warm-up; one without a density answers itself."""
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


@dataclass(frozen=True)
class Absorbed:
    """What an SGD optimizer did for one parameter, and a memory does now."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0


class Memory(ABC):
    """What is remembered of a unit between steps, in two parts that never mix.

    The *local* state differs between ranks and is written on the sending side alone; the *shared* state is the
    same on every rank and is written on the receiving side alone. Each write reads ``old``, what the last finished
    step left, and fills ``new``, which counts only once the optimizer has stepped.
    """

    stateful: ClassVar[bool] = True
    """Whether anything is remembered at all, and so must be kept from what is not finite."""

    absorbs: ClassVar[bool] = False
    """Whether this memory takes momentum and weight decay over from the optimizer."""

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
    def compensate(self, grad: Tensor, param: Tensor, old: State, new: State, scale: float = 1.0) -> Tensor:
        """From the local gradient, times ``scale`` (1 / loss scale), to what is to be compressed."""

    def sent(self, x: Tensor, own: Decompressed, new: State) -> None:  # noqa: B027
        """Remember what of ``x`` the receivers did not get; ``own`` is what they got."""

    def returned(self, rest: Decompressed, new: State) -> None:  # noqa: B027
        """Take in, with the residual, what came back unsent: ``rest`` of all that ranks sent to this one to pass on."""

    def receive(self, mean: Tensor, param: Tensor, old: State, new: State) -> Tensor:
        """From the mean over ranks (may be overwritten) to the gradient for the optimizer."""
        return mean

    def absorb(self: D, settings: Absorbed) -> D:
        """The same memory, doing what the optimizer did with these settings."""
        return self

    def take_buffer(self, buffer: Tensor, local: State, shared: State) -> None:  # noqa: B027
        """Continue from an SGD momentum buffer."""

    def give_buffer(self, local: State, shared: State) -> tuple[Tensor | None, Tensor | None]:
        """The SGD momentum buffer to continue from, as (a part to be averaged over ranks, a part equal on all)."""
        return None, None


def float_at_least_32(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything shorter is remembered in float32."""
    return torch.promote_types(dtype, torch.float32)
