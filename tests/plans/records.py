"""What one rank writes down of a run, so that the laws can be looked at elsewhere."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.plans.engines import Run
from thinwire.core.sharding import own
from thinwire.report.ledger import StepRow

States = dict[str, dict[str, Tensor]]


@dataclass
class Step:
    """One optimizer step of one rank, as seen from outside."""

    gradients: dict[str, Tensor | None]
    """The gradients of this rank alone, from a second model that nothing is attached to."""
    before: States
    shared_before: States
    params: dict[str, Tensor | None]
    units: dict[str, Any] = field(default_factory=dict)
    """Memory, the method's compressor, the one of this stage, and whether its payload is gathered."""
    clip: float | None = None
    received: dict[str, Tensor | None] = field(default_factory=dict)
    after: States = field(default_factory=dict)
    shared_after: States = field(default_factory=dict)
    params_after: dict[str, Tensor | None] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    row: StepRow | None = None
    counted: float = 0.0
    """Bytes that were handed to the collectives of the replicas."""
    skipped: bool = False
    left_out: bool = False
    """No rank called the optimizer."""
    scale: float = 1.0
    """Of the loss."""


@dataclass
class Report:
    """What one rank answers."""

    steps: list[Step] = field(default_factory=list)
    refused: str = ""
    refused_switch: str = ""
    changed_by_refusal: bool = False
    raised: str = ""
    warned: list[str] = field(default_factory=list)
    saved: States = field(default_factory=dict)
    resumed: dict[str, Tensor | None] | None = None
    folded: tuple[States, States] | None = None
    folded_digests: dict[str, str] = field(default_factory=dict)
    left: list[dict[str, Any]] = field(default_factory=list)
    left_digests: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def part_of(x: Tensor | None) -> Tensor | None:
    """What this rank holds of it, dense, and copied."""
    if x is None:
        return None
    return (x.to_dense() if x.is_sparse else own(x)).detach().clone()


def parts_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: part_of(param) for name, param in named(model).items()}


def local_states(run: Run) -> States:
    return {n: {k: t.clone() for k, t in two.now.items()} for n, two in run.wire.workers[0].local.items()}


def shared_states(run: Run) -> States:
    return {unit.name: {k: t.clone() for k, t in unit.shared.now.items()} for unit in run.wire.units}


def same(a: States, b: States) -> bool:
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(digest(x) == digest(b[n][k]) for k, x in a[n].items()) for n in a
    )


def digests(run: Run) -> dict[str, str]:
    """Of each parameter, what the optimizer keeps of it, whether it has a gradient, and the shared states."""
    found: dict[str, str] = {}
    shared = {unit.name: unit.shared.now for unit in run.wire.units}
    for name, param in run.inner.named_parameters():
        kept = {f"optimizer's {key}": value for key, value in run.optimizer.state.get(param, {}).items()}
        for key, value in ({"itself": param} | kept | shared.get(name, {})).items():
            found[f"{name}: {key}"] = digest(value) if isinstance(value, Tensor) else str(value)
        found[f"{name}: has a gradient"] = str(param.grad is not None)
    return found


def digest(x: Tensor) -> str:
    """Equal for equal bits; all that is not a number is alike."""
    x = (x.to_dense() if x.is_sparse else own(x)).detach()
    x = x.masked_fill(x.isnan(), torch.nan) if x.is_floating_point() else x
    return hashlib.sha1(x.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:12]
