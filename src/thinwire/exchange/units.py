"""Units: parameters with their compressors and memories, which are resolved once and not in the step.

A unit is compressed as a whole or in pieces; here, it is one parameter. Everything is keyed by its name, because a
bucket rebuild or a restart does not change it.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.comm.link import wire_bytes
from thinwire.compressors.cast import Cast
from thinwire.core import NOWHERE, Compressor, Context, Memory, Payload, State, ThinwireError, flat, registry
from thinwire.core.capabilities import led, scaled_density, with_density
from thinwire.core.interfaces import feeds_back, local_state, replicated, shared_state
from thinwire.core.memory_capabilities import Absorbed, OwnsMomentum, absorb, absorbed, traits_of
from thinwire.core.sharding import own
from thinwire.core.supported import check_complex, check_parameter
from thinwire.core.tensors import shortened
from thinwire.exchange.states import TwoCopies
from thinwire.methods.method import Method, RouteName

if TYPE_CHECKING:
    from thinwire.exchange.workers import Worker

DENSE = Cast()
GATHER_BYTES = 2**20
"""Uncompressed parameters of up to this size in all may be gathered with the compressed ones, if the added bytes take
no longer than the rounds of the all-reduce that this saves."""
TURN_BYTES = 2**14
"""Bytes that a link carries in its latency, if that is not known: 0.13 ms at 1 Gb/s."""


@dataclass
class Unit:
    """One parameter with its compressor, its memory, and the state that is equal on all ranks."""

    name: str
    param: Tensor
    compressor: Compressor
    memory: Memory
    shared: TwoCopies = field(default_factory=TwoCopies)
    method_compressor: Compressor = DENSE
    """The method's compressor, before a warm-up or the break-even rule changes it."""
    guarded: bool = False
    """True if a nonfinite gradient makes all ranks skip the step, because the method has a stateful memory."""
    optional: bool = False
    """True if it may be unused on some ranks only, which only messages tell."""
    gathered: bool = False
    """True if its payload is gathered although it could be summed."""
    kept: bool = False
    """True if the optimizer requires it dense at all steps."""
    seed: int = 0
    route: RouteName = "all_gather"
    """The method's route for compressed units."""
    declined: str | None = None
    """The reason why an earlier rule that matches the unit was not used."""
    _fed: tuple[Memory, bool] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def own(self) -> Tensor:
        """The part of the parameter that this rank holds, which is compressed."""
        return own(self.param)

    @property
    def like(self) -> Tensor:
        """A meta tensor with the shape, strides and dtype of the compressed tensor."""
        return torch.empty_like(self.own, device="meta", dtype=self.memory.dtype(self.own.dtype))

    @property
    def compressed(self) -> bool:
        """True if the method compresses this unit, even if it is sent dense for now."""
        return self.method_compressor != DENSE

    @property
    def told(self) -> bool:
        """True if its messages need a header; without one, a message can be a view of the gradients."""
        return self.guarded or self.compressed or self.optional

    @property
    def replicated(self) -> Set[str]:
        """The slots that its memory keeps in both the local and the shared state."""
        return replicated(self.memory)

    @property
    def feeds_back(self) -> bool:
        """True if what was not sent comes back."""
        if self._fed is None or self._fed[0] is not self.memory:  # kept, since a step reads it several times
            self._fed = self.memory, feeds_back(self.memory)
        return self._fed[1]

    @property
    def exact(self) -> bool:
        """True if the unit is sent uncompressed at this stage."""
        return self.compressor == DENSE

    @property
    def led(self) -> bool:
        """True if a leader selects the elements to send at this stage."""
        return led(self.compressor, self.route)

    @property
    def saturates(self) -> float:
        """See ``Context``; half of the range if payloads are summed, since a sum of rounded values may exceed it."""
        summed = self.led or (self.compressor.traits.summable and not self.gathered)
        return (0.5 if summed else 1.0) if self.feeds_back else 0.0

    def held(self, x: Tensor, loss_scale: float) -> Tensor:
        """Return ``x`` limited to the range of a float16 gradient if the memory keeps the rest; else ``x`` itself."""
        if self.param.dtype != torch.float16 or x.dtype == torch.float16 or not self.feeds_back:
            return x
        return shortened(x, x.dtype, torch.finfo(torch.float16).max / loss_scale)

    def fresh_local(self) -> TwoCopies:
        """Return one rank's state before the first step."""
        return TwoCopies.of(local_state(self.memory, self._blank()))

    def fresh_shared(self) -> TwoCopies:
        """Return the shared state of the memory and the compressor before the first step."""
        return TwoCopies.of(shared_state(self.memory, self._blank()) | self.init_packed())

    def init_packed(self) -> State:
        """Return the compressor's part of the fresh shared state."""
        return self.method_compressor.init(self._blank(), Context(self.seed, 0, self.name, 0))

    def _blank(self) -> Tensor:
        return torch.empty_like(self.own, dtype=self.memory.dtype(self.own.dtype))

    def go_on_with(self, memory: Memory, workers: Sequence["Worker"]) -> None:
        """Replace the memory by one with other settings, between two steps; its state is kept."""
        old, self.memory = self.memory, memory
        shared = self.shared.now
        for worker in workers:
            if isinstance(memory, OwnsMomentum):
                memory.take_over(old, worker.local[self.name].now, shared)
        if (absorbed(old) or Absorbed()).kind == (absorbed(memory) or Absorbed()).kind:
            return
        fresh = shared_state(memory, self._blank())
        for key in shared_state(old, self.like).keys() - fresh.keys() - traits_of(memory).rests:
            del shared[key]
        shared.update({key: value for key, value in fresh.items() if key not in shared})
        self.align(workers)

    def align(self, workers: Sequence["Worker"]) -> None:
        """Give the next states the keys of the present ones; see ``TwoCopies.align``."""
        for state in self.states(workers):
            state.align(traits_of(self.memory).rests)

    def states(self, workers: Sequence["Worker"]) -> list[TwoCopies]:
        """Return its shared state, and the local one of each worker."""
        return [self.shared, *(worker.local[self.name] for worker in workers)]

    def describe(self) -> str:
        """Return one line that must be the same on all ranks."""
        shape = f"shape {tuple(self.param.shape)}, strides {self.own.stride()}, {self.param.dtype}"
        return f"{shape}, {registry.to_json(self.method_compressor)}, {registry.to_json(self.memory)}"


@dataclass(frozen=True)
class Piece:
    """The elements that are compressed together: a whole unit of a bucket, or a run of its elements in memory order."""

    unit: int
    run: tuple[int, int] | None = None

    def of(self, x: Tensor) -> Tensor:
        """Return the piece of ``x`` as a view."""
        return x if self.run is None else flat(x)[slice(*self.run)]

    def of_state(self, state: State) -> State:
        """Return the pieces of all tensors of a state as views."""
        return state if self.run is None else {key: self.of(value) for key, value in state.items()}

    def key(self, name: str) -> str:
        """Return the key of the piece in a ``Context``; ``name`` is the unit's name."""
        return name if self.run is None else f"{name}[{self.run[0]}:{self.run[1]}]"


def payload_like(compressor: Compressor, like: Tensor, step: int = 0) -> Payload:
    """Return a payload of meta tensors with its shapes and dtypes, by compressing a meta tensor."""
    return compressor.compress(like, {}, replace(NOWHERE, step=step))


def payload_nbytes(compressor: Compressor, like: Tensor) -> int:
    """Return the bytes of a payload; their mean, rounded up, if they change from step to step."""
    steps = range(compressor.traits.period)
    return -(-sum(t.nbytes for step in steps for t in payload_like(compressor, like, step)) // compressor.traits.period)


def resolve(
    named: Iterable[tuple[str, Tensor]], method: Method, settings: Mapping[str, Absorbed], seed: int = 0
) -> list[Unit]:
    """Return the units of these parameters for a method, with fresh shared state.

    ``settings``: the optimizer's, by parameter, for the memories that take them over.
    """
    units: list[Unit] = []
    guarded = any(rule.memory.stateful for rule in method.rules)
    for name, param in named:
        check_parameter(name, param)
        rule, declined = method.choice(name, param.shape, param.numel())
        memory = absorb(rule.memory, settings[name]) if name in settings else rule.memory
        unit = Unit(
            name, param, rule.compressor, memory, method_compressor=rule.compressor, guarded=guarded, seed=seed,
            route=method.route, declined=declined,
        )  # fmt: skip
        check_complex(name, param, method.name, rule.compressor, memory)
        check_sum(unit)
        unit.shared = unit.fresh_shared()
        units.append(unit)
    return units


def check_sum(unit: Unit) -> None:
    """Reject a replicated estimate with a sum below 32 bits: the local and shared estimates would drift apart."""
    compressor = unit.method_compressor
    if unit.replicated and (compressor.traits.summable or led(compressor, unit.route)):
        dtype = payload_like(compressor, unit.like)[0].dtype
        if dtype.itemsize < 4:
            raise ThinwireError(
                f"{unit.name}: {type(unit.memory).__name__} never makes good what a sum in {dtype} rounds away; leave "
                "out the cast, or use ErrorFeedback()"
            )


def overflows(units: Sequence[Unit]) -> list[str]:
    """Return ledger notes on gradients that become infinite if they exceed float16, in which they are sent."""
    short = [
        unit.name
        for unit in units
        if not feeds_back(unit.memory)
        and payload_like(unit.method_compressor, unit.like)[0].dtype == torch.float16 != unit.like.dtype
    ]
    largest = f"{torch.finfo(torch.float16).max:,.0f}"
    return [f"{_listed(short)}: what exceeds {largest} becomes infinite, as in PyTorch's hook"] if short else []


def bytes_alone(compressor: Compressor, like: Tensor, world: int, route: RouteName, second: float) -> float:
    """Return the bytes a worker sends for a unit alone, on the allowed route that takes the fewest."""
    if compressor.traits.summable:
        return wire_bytes("all_reduce", payload_nbytes(compressor, like), world)
    if led(compressor, route):
        values, *choice = payload_like(compressor, like)
        chosen = sum(t.nbytes for t in choice)
        return wire_bytes("broadcast", chosen, world) + wire_bytes("all_reduce", values.nbytes, world)
    nbytes = payload_nbytes(compressor, like)
    gathered = wire_bytes("all_gather", nbytes, world)
    if route not in ("two_phase", "auto") or not compressor.traits.splittable:
        return gathered
    owned = wire_bytes("all_to_all", nbytes + payload_nbytes(scaled_density(compressor, second), like), world)
    return owned if route == "two_phase" else min(gathered, owned)


def set_stage(
    units: Sequence[Unit],
    density: float | None,
    world: int,
    route: RouteName = "all_gather",
    second: float = 1.0,
    turn_bytes: float = TURN_BYTES,
) -> list[str]:
    """Set each unit's compressor for a warm-up stage (``density=None``: the final one), or send it dense if cheaper.

    ``route`` and ``second`` are the method's. Return notes for the ledger, e.g. on units that are sent dense.
    """
    declined: dict[str, list[str]] = {}
    for unit in units:
        if unit.declined is not None:
            declined.setdefault(unit.declined, []).append(unit.name)
    notes = [f"{_listed(names)}: {reason}; the plan's next rule counts" for reason, names in declined.items()]
    notes += overflows(units)
    plain_nbytes = sum(payload_nbytes(unit.method_compressor, unit.like) for unit in units if not unit.compressed)
    extra = wire_bytes("all_gather", plain_nbytes, world) - wire_bytes("all_reduce", plain_nbytes, world)
    small = plain_nbytes <= GATHER_BYTES and (route == "two_phase" or extra <= 2 * (world - 1) * turn_bytes)
    compresses = any(
        not (unit.method_compressor.traits.summable or led(unit.method_compressor, route)) for unit in units
    )
    unchanged: list[str] = []
    for unit in units:
        unit.gathered = compresses and small and not unit.compressed
        compressor = unit.method_compressor if density is None else with_density(unit.method_compressor, density)
        if (density == 1.0 or unit.kept) and unit.compressed:
            compressor = DENSE
        elif density is not None and unit.compressed and compressor == unit.method_compressor:
            unchanged.append(unit.name)
        unit.compressor = compressor
        if compressor.traits.summable:
            continue
        like = unit.like
        compressed = bytes_alone(compressor, like, world, route, second)
        plain = wire_bytes("all_reduce", payload_nbytes(DENSE, like), world)
        if compressed >= plain and world > 1:
            unit.compressor = DENSE
            at = "" if density is None else f" at warm-up density {density:g}"
            notes.append(
                f"{unit.name} is sent dense{at}: compressed it would be {compressed:,.0f} bytes a worker and step, "
                f"dense {plain:,.0f}, with {world} workers"
            )
        elif route != "all_gather" and not (compressor.traits.splittable or led(compressor, route)):
            notes.append(f"{unit.name} takes an all-gather: {type(compressor).__name__} can't be cut into pieces")
    if unchanged:
        notes.append(f"{_listed(unchanged)}: a warm-up density of {density:g} changes nothing")
    return notes


def all_dense(units: Sequence[Unit], method: Method, density: float | None) -> str | None:
    """Return a message if a compressing method, outside of its warm-up, sends every unit dense; else None."""
    if density is not None or not all(unit.exact for unit in units) or all(r.compressor == DENSE for r in method.rules):
        return None
    if any(unit.compressed for unit in units):
        why = "compressed, each parameter would be more bytes with so many workers"
    else:
        why = "no parameter is one that it compresses: vectors are sent dense, and so is what keep_dense= names"
    shapes = sorted({tuple(unit.param.shape) for unit in units}, key=lambda shape: -torch.Size(shape).numel())
    return f"{method.name} compresses nothing here: {why} (shapes {', '.join(map(str, shapes[:3]))})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
