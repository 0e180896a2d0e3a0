"""Checkpoints of a session, which can be loaded at another world size or under another method.

The state is a dict of tensors, ints and strings, so ``torch.load(weights_only=True)`` reads it::

    version, world, step, installed_at    ints
    method                                the method in JSON
    rank                                  tensor [world], a DTensor of which each rank holds its own number
    shard                                 tensor [shards], the same along the mesh's other axis, if the model is sharded
    plan      {unit: JSON of its shape, compressor, memory and keys in local}
    local     {unit: {key: tensor [world, *shape]}}    a DTensor of which each rank holds its row, or its shard of it
    shared    {unit: {key: tensor [*shape]}}           equal on all ranks; in a sharded model it is sharded alike, and
                                                       a compressor's state is [shards, *its shape]
    round                                 JSON of a round that is not at its end; its tensors are in local and shared,
                                          under keys that begin with "round."
    distance                              tensor [world], like rank
    checks    checksums of all of it, see ``thinwire.session.checksums``; version 1 has none

Rows are DTensors because ``torch.distributed.checkpoint`` treats plain tensors of equal names as copies of each other:
it would save one rank's residual and give it to all.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from thinwire.core import Context, Memory, Role, State, ThinwireError, flat, registry
from thinwire.core.interfaces import named, replicated
from thinwire.core.memory_capabilities import inferred, traits_of
from thinwire.core.sharding import cut, place, shape_of, shard_dim
from thinwire.core.tensors import float_at_least_32, norm
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker
from thinwire.session import checksums
from thinwire.session.migrate import slot_for
from thinwire.session.rounds import RoundState
from thinwire.session.untrusted import UNREADABLE, check_plan, read_integer, read_mapping, read_states, read_tensor

VERSION = 2
ROUND = "round."
"""Beginning of the keys of a source's tensors."""
OnWorldChange: TypeAlias = Literal["error", "fold", "reset"]
Form: TypeAlias = Callable[..., Tensor]
"""A function from this rank's tensor, and the parameter that it is shaped like, to the tensor that it is a part of."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read and checked; the session installs it."""

    step: int
    installed_at: int
    local: dict[str, State]
    shared: dict[str, State]
    notes: list[str]
    round: RoundState | None = None

    def clock(self) -> str:
        """Return the text that must be the same on all ranks."""
        return f"step {self.step}, method since {self.installed_at}"

    def fingerprint(self) -> str:
        """Return the text that must be the same on all replicas."""
        digest = hashlib.sha256()
        for state in self.shared.values():
            for key in sorted(state):
                digest.update(flat(state[key].cpu()).contiguous().view(torch.uint8).numpy().tobytes())
        return f"{self.clock()}, shared state {digest.hexdigest()[:16]}"


def _as_it_is(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    return tensor


def save(
    units: Sequence[Unit],
    worker: Worker,
    rows: Form,
    clock: Mapping[str, int],
    method: str,
    shared: Form = _as_it_is,
    round_state: RoundState | None = None,
) -> dict[str, Any]:
    """Return the state of one rank. All tensors are copies, because a load in place writes into them.

    Args:
        rows, shared: the functions of the checkpoint group that make the global tensors.
        round_state: the state of a source in the middle of a round, or None.
    """
    shard, shards = place(units[0].param)
    own: dict[str, dict[str, State]] = {
        "local": {u.name: {key: t.clone() for key, t in _saved(u, worker.local[u.name].now).items()} for u in units},
        "shared": {unit.name: _saved_shared(unit) for unit in units},
    }
    more: dict[str, Any] = {}
    if round_state is not None:
        for part, states in (("local", round_state.local), ("shared", round_state.shared)):
            for name, its in states.items():
                own[part][name] |= {f"{ROUND}{key}": tensor.clone() for key, tensor in its.items()}
        distance = torch.tensor(round_state.distance, dtype=torch.float64, device="cpu")
        more = {"round": round_state.numbers, "distance": rows(distance)}
    state: dict[str, Any] = {
        "version": VERSION,
        **clock,
        **more,
        "method": method,
        "plan": {unit.name: plan_of(unit, own["local"][unit.name]) for unit in units},
        "rank": rows(torch.tensor(float(worker.rank), dtype=torch.float32, device="cpu")),
        **({"shard": shared(torch.tensor(float(shard), dtype=torch.float32, device="cpu"))} if shards > 1 else {}),
        "local": {u.name: {key: rows(t, u.param) for key, t in own["local"][u.name].items()} for u in units},
        "shared": {
            u.name: {key: shared(t, _like(u, key, t)) for key, t in own["shared"][u.name].items()} for u in units
        },
    }
    layout: list[checksums.Entry] = []
    tensors: list[Tensor] = []
    for part, unit in itertools.product(own, units):
        for key, t in own[part][unit.name].items():
            stacked = part == "shared" and state[part][unit.name][key].ndim > t.ndim
            dim = -1 if stacked else shard_dim(unit.param) if shards > 1 else None
            layout.append((part, unit.name, key, str(t.dtype), dim))
            tensors.append(t)
    row = checksums.of_rank(worker.rank, shard, tensors).unsqueeze(0)
    mesh = cast(Any, units[0].param).device_mesh if shards > 1 else None
    like = DTensor.from_local(row, mesh, [Shard(0)], run_check=False) if shards > 1 else None
    return {**state, "checks": {**checksums.said(state, layout), "rows": rows(row, like)}}


def _saved(unit: Unit, state: State) -> State:
    return {key: value for key, value in state.items() if key not in named(unit.memory, Role.DERIVED)}


def _saved_shared(unit: Unit) -> State:
    """Return a copy of the shared state; compressor state is padded to the size that the largest shard needs."""
    state = {key: value.clone() for key, value in _saved(unit, unit.shared.now).items()}
    for key, like in _largest(unit).items():
        mine, state[key] = state.get(key), torch.zeros_like(like, device=unit.own.device)
        if mine is not None:
            state[key][tuple(map(slice, mine.shape))] = mine
    return state


def _largest(unit: Unit) -> State:
    """Return the compressor state of the largest shard as meta tensors; empty if there is only one shard."""
    dim, (_, shards) = shard_dim(unit.param), place(unit.param)
    if dim is None or shards == 1:
        return {}
    shape = [-(-n // shards) if i == dim else n for i, n in enumerate(shape_of(unit.param))]
    like = torch.empty(shape, device="meta", dtype=unit.like.dtype)
    return unit.method_compressor.init(like, Context(unit.seed, 0, unit.name, 0))


def _like(unit: Unit, key: str, value: Tensor) -> Tensor | None:
    """Return the parameter if the value is sharded like it; None for compressor state."""
    packed = unit.init_packed() | _largest(unit)
    return unit.param if value.shape == unit.own.shape and key not in packed else None


def plan_of(unit: Unit, local: State) -> str:
    compressor, memory = registry.to_json(unit.method_compressor), registry.to_json(unit.memory)
    said = {"shape": list(shape_of(unit.param)), "compressor": compressor, "memory": memory, "local": sorted(local)}
    return json.dumps(said, sort_keys=True)


@torch.no_grad()
def restore(
    given: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    units: Sequence[Unit],
    rank: int,
    world: int,
    on_world_change: OnWorldChange,
) -> Restored:
    """Check a checkpoint against the running session, and return the states to install.

    Args:
        given: the state of this rank, or a list of those of all saved ranks, in rank order.
    """
    if on_world_change not in ("error", "fold", "reset"):
        raise ThinwireError(f"on_world_change is {on_world_change!r}; choose 'error', 'fold' or 'reset'")
    states = read_states(given)
    state = states[rank] if len(states) == world and len(states) > 1 else states[0]
    saved_world = read_integer(state, "world", 1)
    if (version := read_integer(state, "version", 1)) > VERSION:
        raise ThinwireError(f"the checkpoint has version {version}; this thinwire reads version 1 to {VERSION}")
    clock = read_integer(state, "step", 0), read_integer(state, "installed_at", 0)
    same_world = saved_world == world
    if not same_world and on_world_change == "error":
        raise ThinwireError(
            f"the checkpoint was saved by {saved_world} workers, and {world} load it; choose on_world_change='fold' to "
            "give each of them the mean of what was pending, or 'reset' to drop it"
        )
    if clock[1] > clock[0]:
        raise ThinwireError(
            f"the checkpoint's method is from step {clock[1]}, after its step {clock[0]}; it is damaged"
        )
    if same_world and (saver := float(_rows(state.get("rank"), "rank", (), rank, world))) != rank:
        raise ThinwireError(f"this is the state of rank {saver:g}, and rank {rank} loads it; every rank has its own")
    if "shard" in state:
        saved, (shard, shards) = read_tensor(state["shard"], "shard"), place(units[0].param)
        if saved.numel() == 1 and shards > 1 and float(saved) != shard:
            raise ThinwireError(f"this is the state of shard {float(saved):g}, and shard {shard} loads it")
    plan, local, shared = (read_mapping(state, key) for key in ("plan", "local", "shared"))
    for other in states:
        check_plan(read_mapping(other, "plan"), units)
        theirs = [read_integer(other, key, 0) for key in ("version", "world", "step", "installed_at")]
        if theirs != [version, saved_world, *clock] or read_mapping(other, "plan") != plan:
            raise ThinwireError(
                f"the states are not of one checkpoint: one is of step {clock[0]}, another of {theirs[2]}"
            )
    if not same_world:
        _check_ranks(states, saved_world)
    notes, new_local, new_shared = list[str](), dict[str, State](), dict[str, State]()
    round_local, round_shared = dict[str, State](), dict[str, State]()
    for unit in units:
        saved = read_mapping(local, unit.name)
        was = _memory(plan[unit.name], saved, unit)
        pending = named(was, Role.PENDING)
        if same_world:
            mine = {key: _row(value, unit, key, rank, saved_world) for key, value in saved.items()}
        else:
            mine = {key: _mean_row(states, unit, key, saved_world) for key in saved}
            if on_world_change == "reset":
                if held := [mine[key] for key in pending if key in mine]:
                    notes.append(f"{unit.name}: a mean pending update of norm {float(norm(held)):.3g} was dropped")
                mine = {key: value for key, value in mine.items() if key not in pending | {"pending_residual"}}
        gain = traits_of(was).residual_gain / traits_of(unit.memory).residual_gain
        fresh, begun = unit.fresh_local().now, unit.fresh_shared().now
        packed, largest = unit.init_packed(), _largest(unit)
        both = {
            key: _shared(value, unit, key, begun[key].shape if key in begun else unit.own.shape, key in packed)
            for key, value in read_mapping(shared, unit.name).items()
            if key in begun or key not in largest  # a shard may be too small for state that larger shards keep
        }
        both = {key: value for key, value in both.items() if value is not None}
        round_local[unit.name], round_shared[unit.name] = _of_round(mine), _of_round(both)
        before = replicated(was)
        alone = (before | unit.replicated) - (before & unit.replicated & mine.keys() & both.keys())
        if unit.replicated:  # what is compensated is a difference, to which nothing pending can be added
            alone |= {"pending_residual", *(pending - fresh.keys())}
        for key in alone & mine.keys():
            notes.append(f"{unit.name}: the checkpoint's {key} has no place in the present method and was dropped")
        left = {key: value for key, value in mine.items() if key not in alone}
        both = {key: value for key, value in both.items() if key == "pending_residual" or key not in alone}
        new_local[unit.name] = _fit(left | inferred(unit.memory, left), fresh, gain, unit, notes, was)
        new_shared[unit.name] = _fit(both, begun, None, unit, notes, was)
    if version == 1 and "checks" not in state:
        notes.append("the checkpoint is from before there were checksums, so its bytes were not checked")
    else:
        for other in [state] if same_world else states:
            notes += checksums.check(other, rank if same_world else None)
    round_state = None
    if "round" in state:
        distance = _rows(state.get("distance"), "distance", (), rank, world) if same_world else 0.0
        round_state = RoundState(str(state["round"]), round_local, round_shared, float(distance))
    return Restored(*clock, new_local, new_shared, notes, round_state)


def _of_round(state: State) -> State:
    """Take the tensors of a source out of a state, by their own names."""
    return {key.removeprefix(ROUND): state.pop(key) for key in [*state] if key.startswith(ROUND)}


def _fit(saved: State, fresh: State, gain: float | None, unit: Unit, notes: list[str], was: Memory) -> State:
    """Return the memory's slots, filled with those that the memory ``was`` has saved, see ``slot_for``.

    ``gain`` scales a pending residual; None for the shared state, which has none.
    """
    fitted = dict(fresh)
    for key, value in saved.items():
        place = key if key == "pending_residual" else slot_for(key, was, unit.memory, fresh)
        if place is None or (gain is None and place != key):
            notes.append(f"{unit.name}: the checkpoint's {key} has no place in the present method and was dropped")
            continue
        pending = key == "pending_residual" or key in named(was, Role.PENDING)
        scale = gain if gain is not None and pending else 1.0
        now = (value * scale if scale != 1.0 else value).to(fresh.get(place, value).dtype)
        if not bool(now.isfinite().all()):
            raise ThinwireError(f"{unit.name}: the checkpoint's {key} is not finite, as {now.dtype} at least")
        fitted[place] = now
    for key in fresh.keys() - saved.keys():
        notes.append(f"{unit.name}: {key} is not in the checkpoint and starts from zero")
    return fitted


def _memory(plan: str, saved: Mapping[str, Any], unit: Unit) -> Memory:
    """Return the memory that the plan describes, after checking that all of its local slots came along."""
    try:
        said = json.loads(plan)
        missing = [key for key in said["local"] if key not in saved]
        memory = None if missing else registry.from_json(said["memory"], registry.MEMORIES)
    except UNREADABLE as error:
        raise ThinwireError(f"{unit.name}: the checkpoint's plan can't be read: {error!r:.100}") from error
    if memory is None:
        raise ThinwireError(
            f"{unit.name}: the checkpoint has {missing[0]!r}, which did not come along; this method has no place "
            "for it, so dcp.load left it out: use wire.load(folder)"
        )
    return memory


def _row(value: Any, unit: Unit, key: str, rank: int, world: int) -> Tensor:
    rows = _cut(value, unit, key, 1)
    return _plain(_rows(rows, f"{unit.name}: {key}", tuple(unit.own.shape), rank, world), unit, key)


def _cut(value: Any, unit: Unit, key: str, leading: int = 0) -> Tensor:
    """Return this rank's shard of a whole tensor, such as one read from a folder; another tensor unchanged."""
    tensor = read_tensor(value, f"{unit.name}: {key}")
    return cut(tensor, unit.param, leading) if tensor.shape[leading:] == shape_of(unit.param) else tensor


def _shared(value: Any, unit: Unit, key: str, shape: torch.Size, packed: bool) -> Tensor | None:
    """Return a tensor that is equal on all replicas; None if it was saved for another number of shards."""
    tensor = read_tensor(value, f"{unit.name}: {key}")
    shard, shards = place(unit.param)
    if not packed and shape == unit.own.shape:
        tensor = _cut(tensor, unit, key)
    elif tensor.ndim == len(shape) + 1:
        if tensor.shape[0] not in (1, shards):
            return None
        tensor = tensor[shard if tensor.shape[0] == shards else 0]
        if packed and key in (largest := _largest(unit)) and tensor.shape == largest[key].shape:
            tensor = tensor[tuple(map(slice, shape))]
    return _plain(tensor, unit, key, shape)


def _rows(value: Any, what: str, shape: tuple[int, ...], rank: int, world: int) -> Tensor:
    """Return this rank's row of a DTensor, of that row alone, or of all rows."""
    tensor = read_tensor(value, what)
    if tensor.ndim == 0 or tensor.shape[0] not in (1, world) or tuple(tensor.shape[1:]) != shape:
        raise ThinwireError(f"{what} in the checkpoint is of shape {tuple(tensor.shape)}, not of {(world, *shape)}")
    return tensor[rank if tensor.shape[0] == world else 0]


def _check_ranks(states: Sequence[Mapping[str, Any]], world: int) -> None:
    """Check that each saved rank's state is given once, as their mean requires."""
    ranks = torch.cat([read_tensor(state.get("rank"), "rank").flatten() for state in states])
    if len(ranks) != world or ranks.sort().values.tolist() != list(range(world)):
        raise ThinwireError(
            f"the states of all {world} ranks, each once, are needed to change the world size, and {len(ranks)} are "
            "here; use wire.load(checkpoint folder), or give load_state_dict a list of all ranks' states"
        )


def _mean_row(states: Sequence[Mapping[str, Any]], unit: Unit, key: str, world: int) -> Tensor:
    """Return the mean over all saved rows. It preserves the mean pending update at any world size."""
    values = [read_mapping(read_mapping(state, "local"), unit.name).get(key) for state in states]
    parts = [_cut(value, unit, key, 1) for value in values]
    shape = tuple(unit.own.shape)
    if sum(part.shape[0] if part.ndim else 0 for part in parts) != world or any(p.shape[1:] != shape for p in parts):
        raise ThinwireError(f"{unit.name}: the checkpoint's {key} is not {world} rows of shape {shape}; it is damaged")
    stacked = torch.cat(parts)
    return _plain(stacked.double().mean(0).to(float_at_least_32(stacked.dtype)), unit, key)


def _plain(tensor: Tensor, unit: Unit, key: str, shape: torch.Size | None = None) -> Tensor:
    expected = unit.own.shape if shape is None else shape
    if tensor.shape != expected:
        raise ThinwireError(
            f"{unit.name}: the checkpoint's {key} is of shape {tuple(tensor.shape)}, not of {tuple(expected)}"
        )
    like = unit.own if expected == unit.own.shape else tensor  # tensors of the parameter's shape take its strides
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
