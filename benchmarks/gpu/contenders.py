"""Ways of training on one rank, each with a model, an optimizer and a process group's hooks of its own."""

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import thinwire
from benchmarks.contenders import LEARNING_RATE, bf16_hook
from benchmarks.gpu.models import Task
from thinwire.comm.link import Kind, Link

Setup = Callable[[DistributedDataParallel], object]


class AsForTwo(Link):
    """Takes as long for the messages of one rank as it would between two workers: one rank sends nothing."""

    def seconds(self, kind: Kind, nbytes: int, world: int) -> float:
        return super().seconds(kind, nbytes, max(world, 2))


LINK = AsForTwo(1e9, 1e-4)
SLOW = ("1gbit",)
"""Names of what waits for an emulated link."""


@dataclass
class Contender:
    """One way of training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task
    device: str
    wire: thinwire.Session | None = None

    def step(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        short = torch.autocast(self.device, dtype=torch.bfloat16) if self.task.autocast else contextlib.nullcontext()
        with short:
            loss = self.model(x)
        loss.backward()
        self.optimizer.step()


def hook_of_torch(ddp: DistributedDataParallel) -> None:
    """PyTorch's own, which is for NCCL."""
    ddp.register_comm_hook(None, bf16_compress_hook if dist.get_backend() == "nccl" else bf16_hook)


def power_sgd(ddp: DistributedDataParallel) -> None:
    ddp.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2), powerSGD_hook)


WAYS: dict[str, tuple[str, Any]] = {
    "local": ("alone", None),
    "dense": ("ddp", None),
    "bf16_hook": ("ddp", hook_of_torch),
    "powersgd_hook": ("ddp", power_sgd),
    "dgc_ddp": ("ddp", lambda: thinwire.dgc(0.001)),
    "dgc_bare": ("bare", lambda: thinwire.dgc(0.001)),
    "dgc_sparse": ("sparse", lambda: thinwire.dgc(0.001)),
    "dgc_bf16_state": ("bare", lambda: thinwire.dgc(0.001, state_dtype="bfloat16")),
    "topk_ddp": ("ddp", lambda: thinwire.topk(0.001)),
    "topk_bare": ("bare", lambda: thinwire.topk(0.001)),
    "thinwire_dense": ("ddp", thinwire.dense),
    "dense_1gbit": ("ddp", thinwire.dense),
    "dgc_1gbit": ("bare", lambda: thinwire.dgc(0.001)),
}
"""Where: without any exchange; under DDP, with a hook of PyTorch's (None for DDP's own all-reduce) or a method; on the
bare model; or with sparse gradients."""

OPTIMIZERS = {
    "mlp": {"sgd": list(WAYS)},
    "gpt": {
        "adamw": ["local", "dense", "bf16_hook", "powersgd_hook", "topk_ddp", "topk_bare"],
        "sgd": ["local", "dense", "dgc_ddp", "dgc_bare", "dgc_sparse", "dense_1gbit", "dgc_1gbit"],
    },
}
"""Of each model: what is trained with which optimizer. DGC takes over the momentum of SGD."""


def build(task: Task, way: str, kind: str, device: str) -> Contender:
    """One of them, with fresh weights."""
    where, how = WAYS[way]
    torch.manual_seed(0)
    model = task.build().to(device)
    method = how() if how is not None and how not in (hook_of_torch, power_sgd) else None
    trained = model
    if where == "ddp":
        trained = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if how in (hook_of_torch, power_sgd):
            how(trained)
    if kind == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.SGD(trained.parameters(), lr=LEARNING_RATE, momentum=0.9)
    if method is None:
        return Contender(trained, optimizer, task, device)
    options: dict[str, Any] = {"kernels": "auto" if device == "cuda" else "reference"}
    if way.endswith(SLOW):
        options["emulate_link"] = LINK
    if where != "ddp":
        options |= {"process_group": dist.group.WORLD, "sparse_gradients": where == "sparse"}
    wire = thinwire.attach(trained, method, optimizer=optimizer, **options)
    return Contender(trained, optimizer, task, device, wire)


def let_go(contender: Contender) -> None:
    """Its memory, for those that come after it."""
    if contender.wire is not None:
        contender.wire.detach()
    gc.collect()
    if contender.device == "cuda":
        torch.cuda.empty_cache()
