"""What became of a plan."""

from dataclasses import dataclass, field

from tests.plans.plan import Plan


@dataclass(frozen=True)
class Outcome:
    plan: Plan
    faults: list[str] = field(default_factory=list)
    refused: str = ""
    """Why attach did not take it."""
    held: tuple[str, ...] = ()
    """The laws that were looked at."""
    refused_switch: str = ""
