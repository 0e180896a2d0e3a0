"""Stages of a method: the density, the routes, and the bucket plans of a session at its current stage."""

import math
from collections.abc import Sequence

from torch import Tensor

from thinwire.comm.collectives import Collective
from thinwire.comm.link import Link
from thinwire.core.errors import ThinwireError
from thinwire.exchange.buckets import Bucket, Routing, plan_bucket
from thinwire.exchange.units import TURN_BYTES, Unit, set_stage
from thinwire.methods.method import Method
from thinwire.report.ledger import Ledger


class Stages:
    """The bucket plans of the current stage, one for each composition and phase."""

    def __init__(self, collective: Collective, ledger: Ledger) -> None:
        self.collective, self.ledger = collective, ledger
        self.by_param: dict[int, Unit] = {}
        self.buckets: dict[tuple[int, ...], Bucket] = {}
        self.routing = Routing()
        self.reads = False
        """True if a step ends by reading its step statuses."""

    def begin(
        self, units: Sequence[Unit], method: Method, density: float | None, link: Link | None, turn_bytes: float
    ) -> None:
        """Begin a stage of this density; None for the method's own."""
        self.by_param = {id(unit.param): unit for unit in units}
        self.buckets.clear()
        self._period = math.lcm(*(unit.method_compressor.traits.period for unit in units))
        self.routing = Routing(method.route, method.second_stage_density_ratio, link)
        if method.second_stage_density_ratio != 1.0 and method.route == "all_gather":
            self.ledger.note("second_stage_density_ratio has no effect: route='all_gather' has one stage")
        summed = [unit for unit in units if unit.compressed and unit.method_compressor.traits.summable]
        if method.route != "all_gather" and summed:
            self.ledger.note(f"route={method.route!r} has no effect for {summed[0].name}: its payloads are summed")
        # a link without latency also takes time to start a message
        least, world = turn_bytes or TURN_BYTES, self.collective.world
        for note in set_stage(units, density, world, method.route, method.second_stage_density_ratio, least):
            self.ledger.note(note)

    def set_headers(self, units: Sequence[Unit], method: Method, optional: bool, pending: bool) -> None:
        """Decide which messages have a header, and if a step ends by reading them.

        While a residual of an earlier method is pending, a method without a memory needs headers too. Without memory or
        pending residual, a step does not wait for them on CUDA, nor on a sharded model whose units are all dense.
        ``optional``: see ``Unit``.
        """
        guarded = pending or any(rule.memory.stateful for rule in method.rules)
        for unit in units:
            unit.guarded, unit.optional = guarded, optional
        whole = self.collective.everyone.world == self.collective.world * self.collective.local_ranks
        told = whole or any(unit.compressed for unit in units)
        self.reads = guarded or (told and not any(unit.param.is_cuda for unit in units))
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
