"""From parameters to units: each parameter gets its compressor and memory, resolved once and not in the step.

A unit is what is compressed at once; here, one parameter. Everything is keyed by its name, which neither a bucket
rebuild nor a restart changes.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.comm.link import wire_bytes
from thinwire.compressors.cast import Cast
from thinwire.core import registry
from thinwire.core.absorbed import Absorbed
from thinwire.core.capabilities import scaled_density, with_density
from thinwire.core.context import NOWHERE, Context
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import (
    Compressor,
    Memory,
    Payload,
    State,
    feeds_back,
    local_state,
    replicated,
    shared_state,
)
from thinwire.core.memory_capabilities import OwnsMomentum, absorb, absorbed, rests
from thinwire.core.sharding import own
from thinwire.core.supported import check_complex, check_parameter
from thinwire.core.tensors import is_dense, shortened
from thinwire.exchange.states import TwoCopies
from thinwire.methods.method import Method, RouteName

if TYPE_CHECKING:
    from thinwire.exchange.workers import Worker

DENSE = Cast()
GATHER_BYTES = 2**20
"""Uncompressed parameters of this size, all together, may be gathered with the compressed ones, while the bytes that
this adds take no longer than the turns of the all-reduce that it saves."""
TURN_BYTES = 2**14
"""What a link carries while a message sets out, where its latency is not known: 0.13 ms at 1 Gb/s."""


@dataclass
class Unit:
    """One parameter, how it is compressed, and the state that is equal on all ranks."""

    name: str
    param: Tensor
    compressor: Compressor
    memory: Memory
    shared: TwoCopies = field(default_factory=TwoCopies)
    method_compressor: Compressor = DENSE
    """What the method asks for, before a warm-up or the break-even rule changed it."""
    guarded: bool = False
    """Whether a gradient that is not finite makes all ranks skip the step: where the method remembers anything."""
    optional: bool = False
    """Whether one rank may use it in a step where another does not, and nobody but the message tells."""
    gathered: bool = False
    """Whether its payload is gathered although it could be summed."""
    kept: bool = False
    """Whether the optimizer wants it dense at all steps."""
    seed: int = 0
    declined: str | None = None
    """Why an earlier rule that was written for it does not count."""

    @property
    def own(self) -> Tensor:
        """What this rank holds of the parameter, and what is compressed."""
        return own(self.param)

    @property
    def like(self) -> Tensor:
        """A meta tensor with the shape, strides and dtype of what is compressed."""
        return torch.empty_like(self.own, device="meta", dtype=self.memory.dtype(self.own.dtype))

    @property
    def compressed(self) -> bool:
        """Whether the method compresses this unit, be it sent dense for now or not."""
        return self.method_compressor != DENSE

    @property
    def told(self) -> bool:
        """Whether its messages have a head: not where they may be what lies in memory, and all ranks know the rest."""
        return self.guarded or self.compressed or self.optional

    @property
    def replicated(self) -> Set[str]:
        """What both parts of its memory's state have."""
        return replicated(self.memory)

    @property
    def exact(self) -> bool:
        """Whether what is asked arrives as it is."""
        return self.compressor == DENSE

    @property
    def saturates(self) -> float:
        """See ``Context``; half of the range where it is summed on the way, since rounded parts may be more."""
        summed = self.compressor.traits.leader_selected or (self.compressor.traits.summable and not self.gathered)
        return (0.5 if summed else 1.0) if feeds_back(self.memory) else 0.0

    def held(self, x: Tensor, loss_scale: float) -> Tensor:
        """As much of ``x`` as a float16 gradient can hold, where the rest comes back; else ``x`` itself."""
        if self.param.dtype != torch.float16 or x.dtype == torch.float16 or not feeds_back(self.memory):
            return x
        return shortened(x, x.dtype, torch.finfo(torch.float16).max / loss_scale)

    def grad_like(self, grad: Tensor) -> Tensor:
        """``grad`` with the strides of the parameter, which is how DDP lays it out in its buckets."""
        param = self.own
        if grad.stride() == param.stride() or not is_dense(param):
            return grad
        return grad.as_strided(param.shape, param.stride(), grad.storage_offset())

    def fresh_local(self) -> TwoCopies:
        """One rank's state before the first step."""
        return TwoCopies.of(local_state(self.memory, self._blank()))

    def fresh_shared(self) -> TwoCopies:
        """The state before the first step that is equal on all ranks: the memory's, and the compressor's."""
        return TwoCopies.of(shared_state(self.memory, self._blank()) | self.init_packed())

    def init_packed(self) -> State:
        """The part of it that is the compressor's."""
        return self.method_compressor.init(self._blank(), Context(self.seed, 0, self.name, 0))

    def _blank(self) -> Tensor:
        return torch.empty_like(self.own, dtype=self.memory.dtype(self.own.dtype))

    def go_on_with(self, memory: Memory, workers: Sequence["Worker"]) -> None:
        """Take the same memory with other settings, between two steps; what is remembered stays what it is."""
        old, self.memory = self.memory, memory
        shared = self.shared.now
        for worker in workers:
            if isinstance(memory, OwnsMomentum):
                memory.take_over(old, worker.local[self.name].now, shared)
        if (absorbed(old) or Absorbed()).kind == (absorbed(memory) or Absorbed()).kind:
            return
        fresh = shared_state(memory, self._blank())
        for key in shared_state(old, self.like).keys() - fresh.keys() - rests(memory):
            del shared[key]
        shared.update({key: value for key, value in fresh.items() if key not in shared})
        self.align(workers)

    def align(self, workers: Sequence["Worker"]) -> None:
        """Let the next states have what the present ones have; what rests is one tensor in both."""
        for state in (self.shared, *(worker.local[self.name] for worker in workers)):
            state.align(rests(self.memory))

    def describe(self) -> str:
        """One line that must be the same on all ranks."""
        shape = f"shape {tuple(self.param.shape)}, strides {self.own.stride()}, {self.param.dtype}"
        return f"{shape}, {registry.to_json(self.method_compressor)}, {registry.to_json(self.memory)}"


def payload_like(compressor: Compressor, like: Tensor, step: int = 0) -> Payload:
    """The shapes and dtypes of a payload, by running the compressor on a meta tensor."""
    return compressor.compress(like, {}, replace(NOWHERE, step=step))


def payload_nbytes(compressor: Compressor, like: Tensor) -> int:
    """Bytes of a payload, the mean where they change from step to step, rounded up."""
    steps = range(compressor.traits.period)
    return -(-sum(t.nbytes for step in steps for t in payload_like(compressor, like, step)) // compressor.traits.period)


def resolve(
    named: Iterable[tuple[str, Tensor]], method: Method, settings: Mapping[str, Absorbed], seed: int = 0
) -> list[Unit]:
    """The units of these parameters under a method, with fresh shared state.

    Args:
        settings: what the optimizer did for each parameter, for the memories that absorb it.
    """
    units: list[Unit] = []
    guarded = any(rule.memory.stateful for rule in method.rules)
    for name, param in named:
        check_parameter(name, param)
        rule, declined = method.choice(name, param.shape, param.numel())
        memory = absorb(rule.memory, settings[name]) if name in settings else rule.memory
        unit = Unit(
            name, param, rule.compressor, memory, method_compressor=rule.compressor, guarded=guarded, seed=seed,
            declined=declined,
        )  # fmt: skip
        check_complex(name, param, method.name, rule.compressor, memory)
        check_sum(unit)
        unit.shared = unit.fresh_shared()
        units.append(unit)
    return units


def check_sum(unit: Unit) -> None:
    """What keeps count of what it sent, as every rank does of the mean, must be summed as it was sent."""
    compressor = unit.method_compressor
    if unit.replicated and (compressor.traits.summable or compressor.traits.leader_selected):
        dtype = payload_like(compressor, unit.like)[0].dtype
        if dtype.itemsize < 4:
            raise ThinwireError(
                f"{unit.name}: {type(unit.memory).__name__} never makes good what a sum in {dtype} rounds away; leave "
                "out the cast, or use ErrorFeedback()"
            )


def overflows(units: Sequence[Unit]) -> list[str]:
    """Notes for the ledger: which gradients become infinite where they are beyond the dtype that they are sent in."""
    short = [
        unit.name
        for unit in units
        if not feeds_back(unit.memory)
        and payload_like(unit.method_compressor, unit.like)[0].dtype == torch.float16 != unit.like.dtype
    ]
    largest = f"{torch.finfo(torch.float16).max:,.0f}"
    return [f"{_listed(short)}: what exceeds {largest} becomes infinite, as in PyTorch's hook"] if short else []


def bytes_alone(compressor: Compressor, like: Tensor, world: int, route: RouteName, second: float) -> float:
    """Bytes a worker sends for a unit alone, on the route that takes the fewest of those allowed."""
    if compressor.traits.summable:
        return wire_bytes("all_reduce", payload_nbytes(compressor, like), world)
    if compressor.traits.leader_selected:
        values, *choice = payload_like(compressor, like)
        chosen = sum(t.nbytes for t in choice)
        return wire_bytes("broadcast", chosen, world) + wire_bytes("all_reduce", values.nbytes, world)
    nbytes = payload_nbytes(compressor, like)
    gathered = wire_bytes("all_gather", nbytes, world)
    if route == "all_gather" or not compressor.traits.splittable:
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
    """Give each unit the compressor of a warm-up stage (None: the final one), or none where dense is cheaper.

    Args:
        route, second: of the method.
        turn_bytes: see ``TURN_BYTES``.

    Returns:
        Notes for the ledger: what goes by another rule than it was meant for, and what is sent dense because compressed
        it would be more bytes.
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
        not (unit.method_compressor.traits.summable or unit.method_compressor.traits.leader_selected) for unit in units
    )
    unchanged: list[str] = []
    for unit in units:
        unit.gathered = compresses and small and not unit.compressed
        asked = unit.method_compressor if density is None else with_density(unit.method_compressor, density)
        if (density == 1.0 or unit.kept) and unit.compressed:
            asked = DENSE
        elif density is not None and unit.compressed and asked == unit.method_compressor:
            unchanged.append(unit.name)
        unit.compressor = asked
        if asked.traits.summable:
            continue
        like = unit.like
        compressed = bytes_alone(asked, like, world, route, second)
        plain = wire_bytes("all_reduce", payload_nbytes(DENSE, like), world)
        if compressed >= plain and world > 1:
            unit.compressor = DENSE
            at = "" if density is None else f" at warm-up density {density:g}"
            notes.append(
                f"{unit.name} is sent dense{at}: compressed it would be {compressed:,.0f} bytes a worker and step, "
                f"dense {plain:,.0f}, with {world} workers"
            )
        elif route != "all_gather" and not (asked.traits.splittable or asked.traits.leader_selected):
            notes.append(f"{unit.name} takes an all-gather: {type(asked).__name__} can't be cut into pieces")
    if unchanged:
        notes.append(f"{_listed(unchanged)}: a warm-up density of {density:g} changes nothing")
    return notes


def all_dense(units: Sequence[Unit], method: Method, density: float | None) -> str | None:
    """A word to the user where a method compresses, no warm-up is under way, and yet every unit is sent dense."""
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
