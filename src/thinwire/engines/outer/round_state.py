"""The state of a round of local updates, for a checkpoint that may be written in the middle of it."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from thinwire.core.errors import ThinwireError
from thinwire.session.rounds import RoundState

if TYPE_CHECKING:
    from thinwire.engines.outer.local_rounds import LocalRounds

NUMBERS = ("inner", "count", "exchanged_at", "lr", "moved")
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
    numbers = {key: getattr(rounds, key) for key in NUMBERS} | {"late": waiting}
    return RoundState(json.dumps(numbers), local, shared, rounds.first[0])


def restored(rounds: "LocalRounds", state: RoundState | None) -> None:
    """Put the round's state back; None is that of a run which exchanged gradients."""
    [replica], units = rounds.replicas, rounds.session.units
    if state is None:
        rounds.inner, rounds.exchanged_at = 0, [0] * len(rounds.fragments)
        for unit, param in zip(units, replica.params, strict=True):
            unit.own.copy_(param)
        return
    try:
        numbers: dict[str, Any] = json.loads(state.numbers)
        for key in NUMBERS:
            setattr(rounds, key, numbers[key])
        waiting = numbers["late"]
    except (ValueError, KeyError, TypeError) as error:
        raise ThinwireError(f"the checkpoint's round can't be read: {error!r:.100}") from error
    if len(rounds.exchanged_at) != len(rounds.fragments):
        raise ThinwireError(
            f"the checkpoint has {len(rounds.exchanged_at)} fragments, and this run {len(rounds.fragments)}; load it "
            "with the same fragments="
        )
    rounds.first = [state.distance]
    for i, unit in enumerate(units):
        shared = state.shared[unit.name]
        unit.own.copy_(shared["anchor"])
        replica.restore(i, state.local[unit.name])
        if "momentum" in shared:
            rounds.momentum[unit.name] = shared["momentum"]
    if waiting is not None:
        chosen: list[int] = rounds.fragments[int(waiting["fragment"])]
        found = [state.shared[units[i].name].get("late") for i in chosen]
        means = [mean for mean in found if mean is not None]
        rounds.late = Late(waiting["fragment"], waiting["due"], means, waiting["divisor"])
