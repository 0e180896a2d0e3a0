"""Models, and ways of training them that differ in how gradients are exchanged.

A DDP model takes one communication hook for life, so there is one DDP for plain training, one for PyTorch's hooks, and
one for thinwire, each with a copy of the same model; and copies without a wrapper, where thinwire is fastest.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import thinwire

LEARNING_RATE = 1e-6  # numbers stay as they are, however long it runs


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def mlp(width: int, layers: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (partial(mlp, 2048, 6), (64, 2048)),  # 25.2M parameters
    "lstm": (partial(Recurrent, 1250, 1250, num_layers=2), (16, 16, 1250)),  # 25.0M; 16 steps of 16 sequences
    "tiny": (partial(mlp, 96, 3), (8, 96)),
}
"""A function that builds it, and the shape of a rank's batch."""

PLAIN = {"local": (False, 0.9), "dense": (True, 0.9), "local_sgd": (False, 0.0), "dense_sgd": (True, 0.0)}
"""(whether gradients are exchanged, momentum of the optimizer). DGC's momentum is in its memory, at the price of an
optimizer without; so plain training is measured with momentum and without."""

THINWIRE: dict[str, tuple[Callable[[], thinwire.Method], str]] = {
    "dgc": (lambda: thinwire.dgc(0.001), "sparse"),
    "dgc_bf16_state": (lambda: thinwire.dgc(0.001, state_dtype="bfloat16"), "sparse"),
    "dgc_int4": (lambda: thinwire.dgc(0.001, values="int4"), "sparse"),
    "dgc_two_phase": (lambda: thinwire.dgc(0.001, route="two_phase"), "sparse"),
    "dense_bare": (lambda: thinwire.dense(), "bare"),
    "dgc_bare": (lambda: thinwire.dgc(0.001), "bare"),
    "dgc_ddp": (lambda: thinwire.dgc(0.001), "ddp"),
    "topk": (lambda: thinwire.topk(0.001), "ddp"),
    "cast": (thinwire.cast, "ddp"),
    "thinwire_powersgd1": (lambda: thinwire.powersgd(1), "ddp"),
    "thinwire_powersgd4": (lambda: thinwire.powersgd(4), "ddp"),
}
"""One line for each method of thinwire that is to be measured, and where: under DDP; on the bare model; or on the bare
model with sparse gradients for the optimizer."""


def bf16_hook(_: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's own refuses gloo, which can sum bfloat16 all the same."""
    buffer = bucket.buffer()
    short = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(short, async_op=True).get_future()
    return future.then(lambda done: buffer.copy_(done.value()[0]))


def power_sgd(rank: int) -> Callable[[object, GradBucket], torch.futures.Future[torch.Tensor]]:
    """PyTorch's PowerSGD, one bucket after the other: it starts collectives from callbacks, which gloo mixes up."""
    state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)

    def hook(_: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        future = powerSGD_hook(state, bucket)
        future.wait()
        return future

    return hook


HOOKS: dict[str, Callable[[], Callable[[Any, GradBucket], torch.futures.Future[torch.Tensor]]]] = {
    "fp16": lambda: fp16_compress_hook,
    "bf16": lambda: bf16_hook,
    "powersgd1": lambda: power_sgd(1),
    "powersgd4": lambda: power_sgd(4),
}
NAMES = (*PLAIN, *HOOKS, *THINWIRE)


@dataclass
class Contender:
    """One way of training; ``enter`` makes its model train this way from now on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    exchanges: bool = True
    enter: Callable[[], object] = lambda: None
    wire: thinwire.Session | None = None

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        with contextlib.nullcontext() if self.exchanges else cast(DistributedDataParallel, self.model).no_sync():
            self.model(x).square().sum(-1).mean().backward()
        self.optimizer.step()


def build(model: str, names: Iterable[str]) -> dict[str, Contender]:
    """The contenders of these names, on this rank. A collective call."""
    names = list(names)

    def wrap() -> DistributedDataParallel:
        torch.manual_seed(0)
        return DistributedDataParallel(MODELS[model][0](), gradient_as_bucket_view=True)  # no copies, for all alike

    found: dict[str, Contender] = {}
    if plain := [name for name in names if name in PLAIN]:
        ddp = wrap()
        for name in plain:
            exchanges, momentum = PLAIN[name]
            found[name] = Contender(ddp, sgd(ddp, momentum), exchanges)
    if hooked := [name for name in names if name in HOOKS]:
        ddp, dispatcher = wrap(), Dispatcher()
        ddp.register_comm_hook(None, dispatcher.hook)
        optimizer = sgd(ddp, 0.9)
        for name in hooked:
            found[name] = Contender(ddp, optimizer, enter=partial(dispatcher.enter, HOOKS[name]()))
    for place in ("ddp", "bare", "sparse"):
        wired = {name: THINWIRE[name][0] for name in names if name in THINWIRE and THINWIRE[name][1] == place}
        if not wired:
            continue
        torch.manual_seed(0)
        trained = wrap() if place == "ddp" else MODELS[model][0]()
        optimizer = sgd(trained, 0.9)
        options = {} if place == "ddp" else {"process_group": dist.group.WORLD, "sparse_gradients": place == "sparse"}
        wire = thinwire.attach(trained, next(iter(wired.values()))(), optimizer=optimizer, **options)
        for name, method in wired.items():
            found[name] = Contender(trained, optimizer, enter=partial(change, wire, method()), wire=wire)
    return {name: found[name] for name in names}


def sgd(model: nn.Module, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=momentum)


def change(wire: thinwire.Session, method: thinwire.Method) -> None:
    if wire.method != method:
        wire.set_method(method)


class Dispatcher:
    """The one hook of a DDP model that several take turns in."""

    def enter(self, own: Callable[[Any, GradBucket], torch.futures.Future[torch.Tensor]]) -> None:
        self.own = own

    def hook(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        return self.own(None, bucket)
