"""A checkpoint of a plan: saved, loaded into a fresh run, and loaded by another number of ranks."""

import io
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from tests.plans.engines import Run, start
from tests.plans.model import loss
from tests.plans.plan import Plan, Spec
from tests.plans.ranks import group_of
from tests.plans.records import Report, digests, local_states, shared_states


def save(plan: Plan, run: Run, folder: str) -> bytes:
    state: dict[str, Any] = {"model": run.inner.state_dict(), "optimizer": run.optimizer.state_dict()}
    if plan.saved == "folder":
        dcp.save({"wire": run.wire}, checkpoint_id=folder, process_group=group_of(plan.world))
    else:
        state["wire"] = run.wire.state_dict()
    if run.scaler is not None:
        state["scaler"] = run.scaler.state_dict()
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


def _read(plan: Plan, saved: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(saved), weights_only=plan.engine != "fsdp2")  # DTensors of a model need more


def _trained(state: dict[str, Any], model: Any, optimizer: Any) -> None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def restore(plan: Plan, run: Run, saved: bytes, folder: str, trained: bool = True) -> None:
    """Load into an attached run."""
    state = _read(plan, saved)
    if trained:
        _trained(state, run.inner, run.optimizer)
    if run.scaler is not None:
        run.scaler.load_state_dict(state["scaler"])
    if plan.saved == "folder":
        run.wire.load(folder)
    else:
        run.wire.load_state_dict(state["wire"])


def load(plan: Plan, method: Spec, saved: bytes, folder: str) -> Run:
    """Another model, of other weights, that goes on where the first was."""
    before = plan.order == "before"
    state = _read(plan, saved)
    run = start(plan, method, plan.seed + 1, load=lambda *both: _trained(state, *both) if before else None)
    restore(plan, run, saved, folder, trained=not before)
    return run


def fold(plan: Plan, method: Spec, rank: int, saved: bytes, folder: str, report: Report) -> None:
    """The first ranks go on without the others, with the mean of what was pending."""
    world = plan.fold or plan.world
    every: list[Any] = [None] * plan.world
    dist.all_gather_object(every, saved, group=group_of(plan.world))
    if rank >= world:
        return
    run = start(plan, method, plan.seed + 2, world)
    _trained(_read(plan, saved), run.inner, run.optimizer)
    if plan.saved == "folder":
        run.wire.load(folder, on_world_change="fold")
    else:
        run.wire.load_state_dict([_read(plan, one)["wire"] for one in every], on_world_change="fold")
    report.folded = local_states(run), shared_states(run)
    run.optimizer.zero_grad()
    loss(plan, run.model, rank, plan.steps, 0).backward()
    run.optimizer.step()
    report.folded_digests = digests(run)
    run.wire.detach()
