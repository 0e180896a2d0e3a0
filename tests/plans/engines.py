"""A plan's model under its engine, with the session attached."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
    scaler: Any
    options: Spec
    """Of attach."""
    wire: Any = None

    def attach(self, method: Spec) -> None:
        made = methods.build(method)
        self.wire = thinwire.attach(self.model, made, optimizer=self.optimizer, **self.options)

    def quiet(self) -> AbstractContextManager[Any]:
        """Backward passes inside it add up, and send nothing."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return self.wire.no_sync() if "process_group" in self.options else _unsynchronised(self.model)

    def step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


def start(
    plan: Plan, method: Spec, seed: int, world: int | None = None, load: Callable[[Any, Any], None] | None = None
) -> Run:
    """Build, wrap and attach.

    Args:
        world: another number of ranks than the plan's.
        load: called before attach, with the model and the optimizer.
    """
    inner = Model(plan, seed)
    options: Spec = {"kernels": plan.kernels, "emulate_link": plan.link, "seed": plan.seed, "timeout": TIMEOUT}
    options |= plan.options or {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) if plan.scaler else None
    if scaler is not None:
        options["scaler"] = scaler
    if plan.nodes and world is None:
        options["ranks_per_node"] = plan.nodes
    if plan.engine == "fsdp2":
        _shard(plan, inner, options)
    optimizer = optimizer_of(plan, inner)
    if load is not None:
        load(inner, optimizer)
    model: nn.Module = inner
    if plan.engine == "ddp":
        model = DistributedDataParallel(inner, process_group=group_of(world or plan.world), **(plan.wrap or {}))
    elif plan.engine == "bare":
        options["process_group"] = group_of(world or plan.world)
    run = Run(model, inner, optimizer, scaler, options)
    run.attach(method)
    return run


def replicas(plan: Plan) -> dist.ProcessGroup | None:
    """The ranks that exchange what thinwire sends."""
    if plan.engine == "fsdp2":
        return mesh_of(plan.world // plan.shards, plan.shards)["replicate"].get_group()
    return group_of(plan.world)


def _shard(plan: Plan, inner: Model, options: Spec) -> None:
    mesh = mesh_of(plan.world // plan.shards, plan.shards)
    for module in inner.layers:
        fully_shard(module, mesh=mesh["shard"])
    fully_shard(inner, mesh=mesh["shard"])
    parts = {key: methods.part(options.pop(key)) for key in ("reduce_scatter", "all_gather") if key in options}
    options["fsdp2"] = thinwire.Fsdp2Options(mesh["replicate"], **parts)


@contextlib.contextmanager
def _unsynchronised(model: Any) -> Any:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
