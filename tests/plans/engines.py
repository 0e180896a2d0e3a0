"""A plan's model under its engine, with the session attached."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.plans import methods
from tests.plans.model import Model, optimizer_of
from tests.plans.plan import Plan, Spec
from tests.plans.ranks import group_of, mesh_of

TIMEOUT = 60.0


@dataclass
class Run:
    """One attached model: ``model`` is what is called, ``inner`` what was built."""

    model: nn.Module
    inner: Model
    optimizer: torch.optim.Optimizer
    wire: thinwire.Session
    quiet: Callable[[], AbstractContextManager[Any]]
    """Backward passes inside it add up, and send nothing."""


def start(
    plan: Plan, method: Spec, seed: int, world: int | None = None, load: Callable[[Any, Any], None] | None = None
) -> Run:
    """Build, wrap and attach; ``load`` is called before attach, with the model and the optimizer.

    Args:
        world: another number of ranks than the plan's.
    """
    inner = Model(plan, seed)
    group = group_of(world or plan.world)
    made = methods.build(method)
    options: Spec = {"kernels": plan.kernels, "link": plan.link, "seed": plan.seed, "timeout": TIMEOUT}
    options |= plan.options or {}
    if plan.nodes and world is None:
        options["nodes"] = plan.nodes
    model: nn.Module = inner
    if plan.engine == "fsdp2":
        _shard(plan, inner, options)
    optimizer = optimizer_of(plan, inner)
    if load is not None:
        load(inner, optimizer)
    quiet: Callable[[], AbstractContextManager[Any]]
    if plan.engine == "ddp":
        model = DistributedDataParallel(inner, process_group=group, **(plan.wrap or {}))
        quiet = model.no_sync
    elif plan.engine == "bare":
        options["process_group"] = group
    wire = thinwire.attach(model, made, optimizer=optimizer, **options)
    if plan.engine == "bare":
        quiet = wire.no_sync
    elif plan.engine == "fsdp2":
        quiet = lambda: _unsynchronised(inner)  # noqa: E731
    return Run(model, inner, optimizer, wire, quiet)


def _shard(plan: Plan, inner: Model, options: Spec) -> None:
    mesh = mesh_of(plan.world // plan.shards, plan.shards)
    for module in inner.layers:
        fully_shard(module, mesh=mesh["shard"])
    fully_shard(inner, mesh=mesh["shard"])
    options["replicate"] = mesh["replicate"]
    for key in ("reduce_scatter", "all_gather"):
        if key in options:
            options[key] = methods.part(options[key])


@contextlib.contextmanager
def _unsynchronised(model: Any) -> Any:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
