"""Stages of a method: the density, the routes, and the bucket plans of a session at its current stage."""

import math
from collections.abc import Sequence

from torch import Tensor

from thinwire.comm.collectives import Collective
from thinwire.comm.link import Link
from thinwire.core import ThinwireError
from thinwire.exchange.buckets import Bucket, Routing, plan_bucket
from thinwire.exchange.units import TURN_BYTES, Unit, all_dense, set_stage
from thinwire.exchange.workers import Worker, has_pending
from thinwire.methods.method import Method
from thinwire.report.ledger import Ledger


class Stages:
    """The bucket plans of the current stage, one for each composition and phase."""

    def __init__(self, collective: Collective, ledger: Ledger, workers: Sequence[Worker]) -> None:
        self.collective, self.ledger, self.workers = collective, ledger, workers
        self.buckets: dict[tuple[int, ...], Bucket] = {}
        self.density: float | None = -1.0
        """The density of this stage; None for the method's own, -1 before the first stage."""
        self.optional = False
        """True if a parameter may be unused on some ranks only, which only messages tell."""
        self.reads = False
        """True if a step ends by reading its step statuses."""

    def install(self, units: Sequence[Unit], method: Method, link: Link | None) -> None:
        """Go on with these units of a new method; ``link`` is None if its speed is not known."""
        self.units, self.method, self.link = units, method, link
        self.turn_bytes = TURN_BYTES if link is None else link.latency * link.bandwidth / 8
        """The bytes that the link carries in its latency: smaller messages travel together."""

    def begin(self, density: float | None) -> str | None:
        """Begin a stage of this density; returns a message for the user if the method sends every unit dense."""
        units, method, self.density = self.units, self.method, density
        self.by_param = {id(unit.param): unit for unit in units}
        self.buckets.clear()
        self._period = math.lcm(*(unit.method_compressor.traits.period for unit in units))
        self.routing = Routing(method.route, method.second_stage_density_ratio, self.link)
        if method.second_stage_density_ratio != 1.0 and method.route in ("all_gather", "leader"):
            self.ledger.note(f"second_stage_density_ratio has no effect: route={method.route!r} has one stage")
        summed = [unit for unit in units if unit.compressed and unit.method_compressor.traits.summable]
        if method.route != "all_gather" and summed:
            self.ledger.note(f"route={method.route!r} has no effect for {summed[0].name}: its payloads are summed")
        # a link without latency also takes time to start a message
        least, world = self.turn_bytes or TURN_BYTES, self.collective.world
        for note in set_stage(units, density, world, method.route, method.second_stage_density_ratio, least):
            self.ledger.note(note)
        return all_dense(units, method, density)

    def set_headers(self) -> None:
        """Decide which messages have a header, and if a step ends by reading them.

        While a residual of an earlier method is pending, a method without a memory needs headers too. Without memory or
        pending residual, a step does not wait for them on CUDA, nor on a sharded model whose units are all dense.
        """
        self.pending = has_pending(self.units, self.workers)
        """True if a residual of an earlier method is sent with the next step."""
        guarded = self.pending or any(rule.memory.stateful for rule in self.method.rules)
        for unit in self.units:
            unit.guarded, unit.optional = guarded, self.optional
        whole = self.collective.everyone.world == self.collective.world * self.collective.local_ranks
        told = whole or any(unit.compressed for unit in self.units)
        self.reads = guarded or (told and not any(unit.param.is_cuda for unit in self.units))
        self.buckets.clear()

    def bucket(self, params: Sequence[Tensor], turn: int) -> Bucket:
        """Return the bucket of these parameters in an exchange of this turn."""
        own = tuple(map(id, params))
        key = (turn % self._period, *own)
        if key not in self.buckets:
            if unknown := [p for p in params if id(p) not in self.by_param]:
                raise ThinwireError(
                    f"a parameter of shape {tuple(unknown[0].shape)} arrived that was not in the model at attach; "
                    "parameters must not be replaced (load_state_dict(assign=True) does it) or frozen after wrapping: "
                    "wrap and attach again"
                )
            units = [self.by_param[i] for i in own]
            bucket = self.buckets[key] = plan_bucket(units, self.collective.world, self.routing, turn)
            if self.routing.route == "auto" and turn % self._period == 0:
                more = f" and {len(units) - 1} more" if len(units) > 1 else ""
                self.ledger.note(f"{'two_phase' if bucket.relays else 'all_gather'} for {units[0].name}{more}")
        return self.buckets[key]
