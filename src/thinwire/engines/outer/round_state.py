"""The state of a round of local updates, for a checkpoint that may be written in the middle of it."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from thinwire.core.errors import ThinwireError
from thinwire.session.rounds import RoundState

if TYPE_CHECKING:
    from thinwire.engines.outer.local_rounds import LocalRounds

NUMBERS = ("inner", "count", "exchanged_at", "lr", "lr_sum", "moved")
"""The numbers of a round that are equal on all ranks."""


@dataclass
class Late:
    """Decoded updates of one fragment that wait for their outer step."""

    fragment: int
    due: int
    means: list[Tensor] = field(default_factory=list[Tensor])
    """One for each unit; empty if an update was not finite."""
    divisor: float = 1.0


def saved(rounds: "LocalRounds") -> RoundState:
    """Return the round's state; nothing may be in flight."""
    [replica], units, late = rounds.replicas, rounds.session.units, rounds.late
    local = {unit.name: replica.state(i) for i, unit in enumerate(units)}
    shared = {unit.name: {"anchor": unit.own} for unit in units}
    for name, momentum in rounds.momentum.items():
        shared[name]["momentum"] = momentum
    for i, mean in zip(rounds.fragments[late.fragment], late.means, strict=True) if late and late.means else ():
        shared[units[i].name]["late"] = mean
    waiting = None if late is None else {"fragment": late.fragment, "due": late.due, "divisor": late.divisor}
    numbers = {key: getattr(rounds, key) for key in NUMBERS} | {"late": waiting, "local": rounds.local.to_json()}
    return RoundState(json.dumps(numbers), local, shared, rounds.first[0])


def checked(rounds: "LocalRounds", state: RoundState | None) -> dict[str, Any]:
    """Return the numbers of a checkpoint's round, or raise a ``ThinwireError`` if it can't be continued here."""
    units, fragments = rounds.session.units, len(rounds.fragments)
    if state is None:
        return {}
    try:
        numbers: dict[str, Any] = json.loads(state.numbers)
        waiting, local = numbers["late"], numbers["local"]
        same = [len(numbers[key]) == len(units) for key in ("lr", "lr_sum")]
        starts = waiting is None and {*numbers["exchanged_at"]} == {numbers["inner"]}
        sound = [float(numbers[key]) >= 0 for key in ("inner", "count", "moved")] + same
        if waiting is not None:
            sound += [
                0 <= int(waiting["fragment"]) < fragments,
                float(waiting["divisor"]) >= 1,
                int(waiting["due"]) > 0,
            ]
        complete = all("anchor" in state.shared[u.name] and "parameter" in state.local[u.name] for u in units)
        if not (all(sound) and complete):
            raise ValueError("a part is missing, or out of its range")
    except (ValueError, KeyError, TypeError) as error:
        raise ThinwireError(f"the checkpoint's round can't be read: {error!r:.100}") from error
    if len(numbers["exchanged_at"]) != fragments:
        raise ThinwireError(
            f"the checkpoint has {len(numbers['exchanged_at'])} fragments, and this run {fragments}; load it with the "
            "same fragments="
        )
    here = rounds.local.to_json()
    if not starts and local != here:
        differ = [f"{key} {local.get(key)!r}, here {value!r}" for key, value in here.items() if local.get(key) != value]
        raise ThinwireError(
            f"the checkpoint was written in the middle of a round with other settings ({'; '.join(differ)}); load it "
            "with the same ones, and change them after a round"
        )
    return numbers


def restored(rounds: "LocalRounds", state: RoundState | None) -> None:
    """Put the round's state back; None is that of a run which exchanged gradients."""
    [replica], units, numbers = rounds.replicas, rounds.session.units, checked(rounds, state)
    if state is None:
        rounds.inner = rounds.count = 0
        rounds.exchanged_at, rounds.lr_sum = [0] * len(rounds.fragments), [0.0] * len(units)
        for unit, param in zip(units, replica.params, strict=True):
            unit.own.copy_(param)
        return
    for key in NUMBERS:
        setattr(rounds, key, numbers[key])
    rounds.first = [state.distance]
    for i, unit in enumerate(units):
        shared = state.shared[unit.name]
        unit.own.copy_(shared["anchor"])
        replica.restore(i, state.local[unit.name])
        if "momentum" in shared:
            rounds.momentum[unit.name] = shared["momentum"]
    if (waiting := numbers["late"]) is not None:
        chosen: list[int] = rounds.fragments[int(waiting["fragment"])]
        found = [state.shared[units[i].name].get("late") for i in chosen]
        means = [mean for mean in found if mean is not None]
        rounds.late = Late(waiting["fragment"], waiting["due"], means, waiting["divisor"])
