"""Buckets, and the choice of a collective for each payload.

Summable payloads take one all-reduce, all others one all-gather or two phases. So a bucket needs one message, or two if
it holds both kinds. If the method compresses, and the summable payloads of the whole model (biases, norms) are small,
they are gathered with the compressed ones: that saves a round trip, and does not depend on how the model is cut into
buckets. Payloads whose elements a leader selects take a broadcast of the selection, then an all-reduce.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from thinwire.coding import header
from thinwire.coding.layout import ROW_ALIGNMENT, Layout
from thinwire.comm.collectives import Collective
from thinwire.comm.link import Kind, Link, wire_bytes
from thinwire.core import Payload, ThinwireError
from thinwire.exchange.routes.leader import LeaderRoute
from thinwire.exchange.routes.route import Route, Whole
from thinwire.exchange.routes.two_phase import two_phase
from thinwire.exchange.units import Piece, Unit, payload_like
from thinwire.methods.method import RouteName
from thinwire.report.ledger import StepRow

START_COST = 3e-3
"""Seconds of CPU time to start an exchange during a backward pass, when the compression code is not in the cache."""
USUAL = Link(1e9)
"""The link that is assumed if the speed is not known: 1 Gb/s."""


@dataclass(frozen=True)
class Routing:
    """The route that a method chooses for compressed units, and the link if it is known."""

    route: RouteName = "all_gather"
    second: float = 1.0
    link: Link | None = None


@dataclass(frozen=True)
class Bucket:
    """Units whose gradients are exchanged together, and the routes of their messages."""

    units: tuple[Unit, ...]
    routes: tuple[Route, ...]

    @cached_property
    def lossy(self) -> frozenset[int]:
        """The indices of the units that the method compresses."""
        return frozenset(i for i, unit in enumerate(self.units) if unit.compressed)

    def wire_bytes(self, world: int) -> tuple[float, float]:
        """Return the bytes a worker sends for this bucket: in all, and for the compressed units with the header."""
        each = [route.wire_bytes(world, self.lossy) for route in self.routes]
        return sum(total for total, _ in each), sum(compressed for _, compressed in each)

    def book(self, row: StepRow, collective: Collective) -> None:
        """Add this rank's bytes for this bucket to the ledger row; the collective counts the total itself."""
        world, share = collective.world, 1 / collective.local_ranks
        row.compressed_wire_bytes += self.wire_bytes(world)[1] * share
        for i, unit in enumerate(self.units):
            plain = wire_bytes("all_reduce", unit.own.numel() * 4, world) * share
            row.dense_bytes += plain
            row.compressed_dense_bytes += plain if i in self.lossy else 0.0

    @property
    def joins(self) -> bool:
        """True if its message can share one all-gather with those of other buckets."""
        return len(self.routes) == 1 and self.routes[0].kind == "all_gather"

    @property
    def relays(self) -> bool:
        """True if any route has a second stage."""
        return any(route.relays for route in self.routes)


def plan_bucket(units: Sequence[Unit], world: int, routing: Routing = Routing(), step: int = 0) -> Bucket:
    """Sort the units of a bucket into messages, with the payload shapes of this step."""
    payloads = [payload_like(unit.compressor, unit.like, step) for unit in units]
    summed: dict[torch.dtype, list[int]] = {}
    led: dict[torch.dtype, list[int]] = {}
    gathered: list[int] = []
    for i, unit in enumerate(units):
        if unit.led:
            led.setdefault(payloads[i][0].dtype, []).append(i)
        elif unit.compressor.traits.summable and not unit.gathered:
            summed.setdefault(payloads[i][0].dtype, []).append(i)
        else:
            gathered.append(i)

    def header_of(chosen: list[int], dtype: torch.dtype) -> list[Payload]:
        size = header.size(len(chosen), dtype)
        return [(torch.empty(size, dtype=dtype, device="meta"),)] if any(units[i].told for i in chosen) else []

    def whole(kind: Kind, chosen: list[int], dtype: torch.dtype) -> Whole:
        headers = header_of(chosen, dtype)
        layout = Layout([*(payloads[i] for i in chosen), *headers], ROW_ALIGNMENT if kind == "all_gather" else 1)
        return Whole(kind, tuple(chosen), tuple(map(Piece, chosen)), dtype, bool(headers), layout)

    def following(chosen: list[int], dtype: torch.dtype) -> LeaderRoute:
        headers = header_of(chosen, dtype)
        values = Layout([*(payloads[i][:1] for i in chosen), *headers], 1)
        choices = Layout([payloads[i][1:] for i in chosen])
        return LeaderRoute("broadcast", tuple(chosen), tuple(map(Piece, chosen)), dtype, bool(headers), choices, values)

    gathering: list[Route] = [whole("all_gather", gathered, torch.uint8)] if gathered else []
    splittable = [i for i in gathered if units[i].compressor.traits.splittable]
    if routing.route in ("two_phase", "auto") and any(units[i].own.numel() for i in splittable):
        rest = [i for i in gathered if i not in splittable]
        owned: list[Route] = [two_phase(units, splittable, header_of(splittable, torch.uint8), routing.second, world)]
        owned += [whole("all_gather", rest, torch.uint8)] if rest else []
        if routing.route == "two_phase" or seconds(owned, routing, world) < seconds(gathering, routing, world):
            gathering = owned
    summing = [whole("all_reduce", chosen, dtype) for dtype, chosen in summed.items()]
    leading = [following(chosen, dtype) for dtype, chosen in led.items()]
    return Bucket(tuple(units), (*gathering, *summing, *leading))


def travel_together(nbytes: Iterable[float], least: float) -> int:
    """Return how many messages at the head of a queue are sent as one: as few as have ``least`` bytes; 0 if all wait.

    An exchange of fewer bytes than the link carries in the time that it takes to start one is better joined with the
    next. Messages that are ready wait for the link's latency (``Stages.turn_bytes``). Buckets whose gradients are not
    there yet wait also for the CPU (``start_bytes``), in plans, since to compress them together saves that time too.
    """
    return next((count for count, total in enumerate(accumulate(nbytes), 1) if total >= least), 0)


def start_bytes(link: Link | None) -> float:
    """Return the bytes that the link carries in ``START_COST``."""
    return START_COST * (link or USUAL).bandwidth / 8


def seconds(routes: Sequence[Route], routing: Routing, world: int) -> float:
    """Return the estimated seconds of these exchanges, one after the other."""
    if routing.link is None:
        raise ThinwireError("route 'auto' chooses by the speed of the link, which is not known here")
    return sum(routing.link.seconds(kind, nbytes, world) for route in routes for kind, nbytes in route.stages)
