"""Routes of rows: a reduce-scatter, an all-reduce built from it, and an all-gather of parameters.

The unit is a flat buffer with a name: the argument of an FSDP2 collective, or a bucket of a process group. No message
has a header, and the collective counts the bytes: ``stages``, which plans and the ledger read, is not used here.

In a reduce-scatter every rank keeps the sum of one row of all ranks' buffers. A rank compresses each row that it sends
once, and adds its own row uncompressed. The all-reduce gathers the sums; their owners compress them once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.coding.layout import Layout
from thinwire.comm.collectives import InFlight, RowCarrier
from thinwire.comm.link import Kind
from thinwire.core import NOWHERE, Compressor, Context, Memory, Payload, State, ThinwireError, flat
from thinwire.core.context import NUMBER
from thinwire.core.tensors import float_at_least_32
from thinwire.exchange.buckets import Bucket
from thinwire.exchange.routes.route import Route, Senders, Whole
from thinwire.exchange.units import Piece, Unit, payload_like
from thinwire.exchange.workers import Worker
from thinwire.memories.error_feedback import NoMemory


@lru_cache(maxsize=1024)
def layout_of(compressor: Compressor, numel: int, dtype: torch.dtype) -> Layout:
    """Return the layout of a compressed row of that many elements."""
    return Layout([payload_like(compressor, torch.empty(numel, dtype=dtype, device="meta"))])


@dataclass(frozen=True)
class Row(Piece):
    """The row that one rank sends to another; ``kept`` is its place in a state, which has none for the rank itself."""

    receiver: int = 0
    kept: tuple[int, int] = (0, 0)

    def of_state(self, state: State) -> State:
        return {key: flat(value)[slice(*self.kept)] for key, value in state.items()}

    def key(self, name: str) -> str:
        return f"{name}[{self.receiver}]"


@lru_cache(maxsize=1024)
def rows_sent(world: int, rank: int, n: int) -> tuple[Row, ...]:
    """Return the rows of n elements that a rank sends to all others."""
    others = enumerate(r for r in range(world) if r != rank)
    return tuple(Row(0, (r * n, (r + 1) * n), r, (i * n, (i + 1) * n)) for i, r in others)


@dataclass(frozen=True)
class GatheredRows(Whole):
    """An all-gather of parameters: all ranks, including the sender, use the decoded values. ``layout`` is of a row."""

    rank: int
    """The rank of this process in the group that exchanges."""
    first: int
    """The global number of the group's rank 0, so that all ranks use different random numbers."""

    def combine(
        self, unit: Unit, i: int, senders: Senders, out: Tensor, ctx: Context, *, zero: bool, sparse: bool
    ) -> Tensor:
        return self.write(unit, senders, out, ctx, unit.name, out.dtype)

    def write(self, unit: Unit, senders: Senders, out: Tensor, ctx: Context, key: str, dtype: torch.dtype) -> Tensor:
        """Decode the row of each sender, of ``dtype``, to its place in ``out``."""
        for (rank, (payload,)), row in zip(senders, flat(out).view(len(senders), -1), strict=True):
            like = row if row.dtype == dtype else torch.empty_like(row, dtype=dtype)
            unit.compressor.decompress(payload, like, {}, self.context(ctx, key, rank)).write_to(row)
        return out

    def context(self, ctx: Context, key: str, rank: int) -> Context:
        """Return the context in which a rank has compressed a row."""
        return replace(ctx, unit=key, rank=self.first + rank, kernels=None)


@dataclass(frozen=True)
class ReducedRows(GatheredRows):
    """A reduce-scatter: ``out = mine + sum of C(row)`` over the received rows, in float32 at least."""

    mine: Tensor
    """This rank's own row, ``[n]``; it may be overwritten."""
    loss_scale: float
    """The loss scale of this rank's row; what the others send is without it, if their memory remembers."""

    unscaled: ClassVar[bool] = False

    @cached_property
    def by_unit(self) -> dict[int, list[tuple[int, Piece]]]:
        return {0: list(enumerate(self.pieces))}  # also where there is nobody to send to

    def pack(self, payloads: Sequence[Payload], header: Sequence[Payload], *, in_place: bool) -> Tensor:
        message = self.mine.new_zeros(len(payloads) + 1, self.layout.nbytes, dtype=torch.uint8)
        others = (r for r in range(len(message)) if r != self.rank)
        for r, payload in zip(others, payloads, strict=True):
            message[r] = self.layout.pack([payload])
        return message

    def start(self, message: Tensor, collective: RowCarrier, turn: int) -> InFlight:
        return collective.all_to_all(message)

    def combine(
        self, unit: Unit, i: int, senders: Senders, out: Tensor, ctx: Context, *, zero: bool, sparse: bool
    ) -> Tensor:
        return self.total(unit, senders, ctx)

    def total(self, unit: Unit, senders: Senders, ctx: Context) -> Tensor:
        """Return the sum of this rank's row: its own first, then the others' in rank order."""
        total = self.mine.to(float_at_least_32(self.mine.dtype))
        like = torch.empty_like(total, dtype=unit.memory.dtype(self.mine.dtype))
        for rank, (payload,) in senders:
            if rank != self.rank:
                sent = self.context(ctx, f"{unit.name}[{self.rank}]", rank)
                unit.compressor.decompress(payload, like, {}, sent).add_to(total, self.loss_scale)
        return total


@dataclass(frozen=True)
class AllReducedRows(ReducedRows):
    """An all-reduce: owners compress the sums of a reduce-scatter once more, and all ranks gather them."""

    sums: Layout
    """Layout of a compressed sum."""

    relays: ClassVar[bool] = True

    def relay(
        self, units: Sequence[Unit], arrived: InFlight, worker: Worker, step: int, collective: RowCarrier
    ) -> InFlight:
        unit, ctx = units[0], Context(worker.seed, step, units[0].name, worker.rank)
        total = self.total(unit, super().opened(arrived)[0], ctx)
        own = self.context(ctx, f"{unit.name}[{collective.world}]", self.rank)
        return collective.all_gather(self.sums.pack([unit.compressor.compress(total, {}, own)]))

    @property
    def stages(self) -> Sequence[tuple[Kind, int]]:
        return [*super().stages, ("all_gather", self.sums.nbytes)]

    def opened(self, arrived: InFlight) -> tuple[Senders, Tensor | None]:
        return [(rank, self.sums.unpack(row)) for rank, row in enumerate(arrived.answer())], None

    def combine(
        self, unit: Unit, i: int, senders: Senders, out: Tensor, ctx: Context, *, zero: bool, sparse: bool
    ) -> Tensor:
        return self.write(unit, senders, out, ctx, f"{unit.name}[{len(senders)}]", float_at_least_32(out.dtype))


def _bucket(name: str, compressor: Compressor, memory: Memory, like: Tensor, route: Route) -> Bucket:
    """Return the bucket of a flat buffer; only the number of elements and the dtype of ``like`` matter."""
    buffer = torch.empty(like.numel(), dtype=like.dtype, device="meta")
    unit = Unit(name, buffer, compressor, memory, method_compressor=compressor, gathered=True)
    return Bucket((unit,), (route,))


def gathered(name: str, compressor: Compressor, like: Tensor, rank: int, first: int) -> Bucket:
    """Return the bucket that gathers the shards of all ranks, each like ``like`` ``[n]``."""
    layout = layout_of(compressor, like.numel(), like.dtype)
    route = GatheredRows("all_gather", (0,), (Piece(0),), torch.uint8, False, layout, rank, first)
    return _bucket(name, compressor, NoMemory(), like, route)


def reduced(
    name: str, compressor: Compressor, memory: Memory, rows: Tensor, rank: int, first: int, loss_scale: float = 1.0,
    *, to_all: bool = False,
) -> Bucket:  # fmt: skip
    """Return the bucket that sums rows ``[world, n]``; rank r gets row r, and with ``to_all`` all sums.

    **Wire**: ``(N-1) / N`` of the payloads of all rows, where float32 takes ``4 (N-1) / N`` bytes an element; twice
    that with ``to_all``.
    """
    world, n = rows.shape
    layout = layout_of(compressor, n, memory.dtype(rows.dtype))
    pieces = rows_sent(world, rank, n)
    fixed = ("all_to_all", (0,), pieces, torch.uint8, False, layout, rank, first, rows[rank], loss_scale)
    sums = layout_of(compressor, n, float_at_least_32(rows.dtype))
    route = AllReducedRows(*fixed, sums) if to_all else ReducedRows(*fixed)
    return _bucket(name, compressor, memory, rows, route)


def payload_bytes(compressor: Compressor, x: Tensor, world: int) -> int:
    """Return the bytes of the payloads of ``x``, which an all-reduce of rows sends instead of ``x.nbytes``."""
    return world * layout_of(compressor, -(-x.numel() // world), float_at_least_32(x.dtype)).nbytes


def check_flat(argument: str, carries: str, compressor: Compressor) -> None:
    """Raise a ``ThinwireError`` if a compressor can't compress a flat run of elements without a state."""
    if compressor.traits.min_ndim or compressor.traits.period != 1 or compressor.init(NUMBER, NOWHERE):
        raise ThinwireError(
            f"{argument}={type(compressor).__name__} needs matrices, keeps a state or changes its shapes; the "
            f"{carries}: use one like Quantize(8) or Cast('bfloat16')"
        )
    if type(compressor).__hash__ is None:
        raise ThinwireError(
            f"{argument}={type(compressor).__name__} can't be hashed; make it a @dataclass(frozen=True)"
        )
