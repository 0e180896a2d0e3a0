"""The two-phase route: the bytes that a worker sends do not grow with the number of workers.

The elements of a bucket are cut, in order, into N runs of equal bytes, and rank r owns the r-th. Every rank compresses
each piece (a run of one unit) separately and sends it to its owner only. The owner adds the N payloads, compresses
their mean again, and sends it to all. A worker sends ``(N-1)/N (C1 + C2)`` bytes, where C1 and C2 are the bytes of one
rank's whole bucket in the two phases; an all-gather sends ``(N-1) C1``.

The error of the second compression is not lost: the owner adds it, times N, to its own residual (``Memory.sent`` with
``sign=1``). The pending update is the mean of all ranks' residuals, so it grows by exactly what the owner could not
send. So "sent + residual = compensated" holds without more state.

Source: H. Tang et al., "DoubleSqueeze: Parallel Stochastic Gradient Descent with Double-Pass Error-Compensated
Compression", 2019, arXiv:1905.05957, with an owner for each run instead of one server.

Departures: DoubleSqueeze keeps the second error in a residual of its own, which checkpoints would have to store and
convert to other world sizes; here it is added to the owner's first residual.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor

from thinwire.coding.layout import Layout
from thinwire.comm.collectives import Carrier, InFlight
from thinwire.comm.link import Kind, wire_bytes
from thinwire.core import Compressor, Context, Decompressed, Payload, Sparse
from thinwire.core.capabilities import compress_sparse, scaled_density
from thinwire.core.loops import Found
from thinwire.exchange.receiving import added
from thinwire.exchange.routes.route import Route, Senders
from thinwire.exchange.units import Piece, Unit, payload_like, payload_nbytes
from thinwire.exchange.workers import Worker


def cut(units: Sequence[Unit], chosen: Sequence[int], world: int) -> list[list[Piece]]:
    """Return the pieces that each rank owns; there are at most units + world - 1, and none is empty.

    Units are sorted by name, so their order in the bucket does not matter. Runs are equal in bytes, because rows are
    padded to one size: one element that is sent dense counts as much as many compressed ones.
    """
    owned: list[list[Piece]] = [[] for _ in range(world)]
    nbytes = {i: payload_nbytes(units[i].compressor, units[i].like) for i in chosen}
    total, before, owner = sum(nbytes.values()), 0, 0  # bytes of all units, and of those before this one
    for i in sorted((i for i in chosen if nbytes[i]), key=lambda i: units[i].name):
        n, start = units[i].own.numel(), 0
        while start < n:
            end = (owner + 1) * total // world - before  # of this owner's run, in bytes of this unit
            stop = min(n, max(start, end * n // nbytes[i]))
            if stop > start:
                owned[owner].append(Piece(i, None if stop - start == n else (start, stop)))
            owner += stop < n
            start = stop
        before += nbytes[i]
    return owned


@dataclass(frozen=True)
class Rows:
    """A message of rows, padded to one size, with the layout of each."""

    layouts: tuple[Layout, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return max(layout.nbytes for layout in self.layouts)

    def fill(self, out: Tensor, row: int, payloads: Sequence[Payload]) -> None:
        """Write one row; its padding is left unchanged."""
        if payloads:
            message = self.layouts[row].pack(payloads)
            out[: message.numel()] = message


@dataclass(frozen=True)
class TwoPhase(Route):
    """A route on which units go to their owners in pieces, and come back as means."""

    owned: tuple[tuple[Piece, ...], ...]
    """The pieces of each rank; ``pieces`` has all of them in this order."""
    first: Rows
    """The message of a rank, one row for each owner, each with the header."""
    second: Rows
    """The messages of the owners to all ranks."""
    budget: float
    """Density of the second phase over that of the first."""

    relays: ClassVar[bool] = True

    def pack(self, payloads: Sequence[Payload], header: Sequence[Payload], *, in_place: bool) -> Tensor:
        message = payloads[0][0].new_zeros((len(self.owned), self.first.nbytes), dtype=torch.uint8)
        rest = iter(payloads)
        for owner, pieces in enumerate(self.owned):
            self.first.fill(message[owner], owner, [*(next(rest) for _ in pieces), *header])
        return message

    def start(self, message: Tensor, collective: Carrier, turn: int) -> InFlight:
        return collective.all_to_all(message)

    def relay(
        self, units: Sequence[Unit], arrived: InFlight, worker: Worker, step: int, collective: Carrier
    ) -> InFlight:
        received = arrived.answer()
        rows, columns = self.first.layouts[worker.rank].unpack_all(received)
        means = [
            self._pass_on(units[piece.unit], piece, [payloads[j] for payloads in rows], worker, step)
            for j, piece in enumerate(self.owned[worker.rank])
        ]
        message = received.new_zeros(self.second.nbytes)
        self.second.fill(message, worker.rank, means)
        return replace(collective.all_gather(message), side_data=columns[-1] if self.has_header else None)

    def _pass_on(self, unit: Unit, piece: Piece, payloads: Sequence[Payload], worker: Worker, step: int) -> Payload:
        """Sum all ranks' payloads of an owned piece, compress the mean, and add the error to the residual."""
        world, like, known = len(payloads), piece.of(unit.like), piece.of_state(unit.shared.now)
        key = piece.key(unit.name)
        # a rank number above all others, whichever rank owns the piece
        ctx = Context(worker.seed, step, key, world, worker.kernels, saturates=unit.saturates)
        there, total = cast(Found, added(unit.compressor, [*enumerate(payloads)], like, known, ctx))
        mean = Sparse(there, total, there.numel() / like.numel())
        mean.values.mul_(1.0 / world)
        again = self.decoder(unit)
        payload = compress_sparse(again, mean, like, known, ctx)
        rest = without(mean, again.decompress(payload, like, known, ctx))
        rest.values.mul_(world)
        unit.memory.sent(rest, piece.of_state(worker.local[unit.name].next), sign=1.0)
        return payload

    def decoder(self, unit: Unit) -> Compressor:
        return scaled_density(unit.compressor, self.budget)

    def opened(self, arrived: InFlight) -> tuple[Senders, Tensor | None]:
        rows = zip(self.second.layouts, arrived.answer(), strict=True)
        return [
            (len(self.owned), [payload for layout, row in rows for payload in layout.unpack(row)])
        ], arrived.side_data

    @property
    def stages(self) -> Sequence[tuple[Kind, int]]:
        return [("all_to_all", len(self.owned) * self.first.nbytes), ("all_gather", self.second.nbytes)]

    def plain_bytes(self, world: int, lossy: frozenset[int]) -> float:
        plain = 0
        for layouts in (self.first.layouts, self.second.layouts):
            for pieces, layout in zip(self.owned, layouts, strict=True):
                sizes = zip(pieces, layout.unit_nbytes, strict=False)  # the header and the padding come last
                plain += sum(size for piece, size in sizes if piece.unit not in lossy)
        return wire_bytes("all_to_all", plain, world)


def two_phase(
    units: Sequence[Unit], chosen: Sequence[int], header: Sequence[Payload], budget: float, world: int
) -> TwoPhase:
    """Plan two phases for some units of a bucket; ``header`` is like the header of their message."""
    owned = cut(units, chosen, world)

    def rows(factor: float, header: Sequence[Payload]) -> Rows:
        parts = [
            [
                *(payload_like(scaled_density(unit.compressor, factor), piece.of(unit.like)) for piece, unit in own),
                *header,
            ]
            for own in ([(piece, units[piece.unit]) for piece in pieces] for pieces in owned)
        ]
        alignment = max(t.itemsize for payloads in parts for payload in payloads for t in payload)
        return Rows(tuple(Layout(payloads, alignment) for payloads in parts))

    return TwoPhase(
        kind="all_to_all",
        units=tuple(chosen),
        pieces=tuple(piece for pieces in owned for piece in pieces),
        dtype=torch.uint8,
        has_header=bool(header),
        owned=tuple(map(tuple, owned)),
        first=rows(1.0, header),
        second=rows(budget, []),
        budget=budget,
    )


def without(x: Sparse, sent: Decompressed) -> Sparse:
    """Return ``x - sent``; ``sent`` has only elements that ``x`` has."""
    indices, values = sent.entries()
    place = torch.searchsorted(x.indices, indices)
    return replace(x, values=x.values.index_add(0, place, values.to(x.values.dtype), alpha=-1.0))
