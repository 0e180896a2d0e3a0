"""The status of a step, from the headers of its messages; the same on all ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from thinwire.exchange.units import Unit


@dataclass(frozen=True)
class StepStatus:
    """The contents of the headers of one message, the same on all ranks; a sum counts as one sender."""

    units: tuple[Unit, ...]
    used: Tensor  # bool [senders, units]
    nonfinite: Tensor  # bool [senders, units]
    apart: Tensor  # bool []: True if ranks are at different steps


def used(statuses: Iterable[StepStatus]) -> set[str]:
    """Return the names of units that any rank has used; synchronizes on CUDA."""
    return {status.units[i].name for status in statuses for i in status.used.any(0).nonzero().flatten()}


def unused(statuses: Iterable[StepStatus]) -> set[str]:
    """Return the names of units in these statuses that no rank has used; synchronizes on CUDA."""
    return {status.units[i].name for status in statuses for i in (~status.used.any(0)).nonzero().flatten()}
