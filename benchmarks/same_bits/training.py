"""Training of a cell, and its results: hashes of parameters and of all states, and bytes."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.same_bits.methods import METHODS, OPTIMIZERS, Chosen
from benchmarks.same_bits.public import public as tw

STEPS = 5
BYTES = (("wire_bytes",), ("dense_bytes",), ("within_node_bytes", "inside_bytes"), ("gather_bytes",))
"""Of a step, with what other revisions call them."""
Found = dict[str, Any]
"""``params``, ``states`` and ``bytes``."""


@dataclass(frozen=True)
class Ranks:
    """The place of a cell: this process's number and the groups it is in, as far as so many were started."""

    rank: int
    pair: dist.ProcessGroup | None = None
    four: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    """Two replicas of two shards."""


class Network(nn.Module):
    """Layers on both sides of the size from which Top-k samples its threshold; ``side`` is used now and then."""

    def __init__(self, width: int = 330, side: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(320, width, dtype=dtype)
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.last = nn.Linear(width, 40, dtype=dtype)
        self.side = nn.Linear(width, 40, dtype=dtype) if side else None

    def forward(self, x: Tensor, use_side: bool = False) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return self.last(x) + self.side(x) if self.side is not None and use_side else self.last(x)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The rank's own inputs and targets of a step."""
    generator = torch.Generator().manual_seed(1009 * step + rank)
    x, y = (torch.randn(4, n, generator=generator) for n in (320, 40))
    return x.to(dtype), y.to(dtype)


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    first = next(model.parameters())
    x, y = batch(rank, step, first.dtype)
    use_side = {"use_side": True} if (rank + step) % 3 == 0 else {}
    return (model(x, **use_side) - y).square().mean()


def digest(*tensors: Tensor) -> str:
    """Equal for equal dtypes and bits."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        own = own.to_dense() if own.is_sparse else own
        digest.update(str(own.dtype).encode())
        digest.update(own.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_of(state: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """All tensors of nested mappings and lists, with the way to each."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from tensors_of(value, (*path, str(key)))
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from tensors_of(value, (*path, str(i)))


@dataclass
class Run:
    """A model in training: ``model`` is what is called, ``inner`` what was built."""

    ranks: Ranks
    inner: nn.Module
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    options: dict[str, Any]
    """Of attach."""
    wire: Any = None
    params: list[str] = field(default_factory=list)

    def attach(self, method: Any) -> None:
        stepped = self.optimizers if len(self.optimizers) > 1 else self.optimizers[0]
        self.wire = tw.attach(self.model, method, optimizer=stepped, **self.options)

    def train(self, *steps: int, parts: int = 1, broken: int | None = None) -> None:
        """Take these steps.

        Args:
            parts: micro-batches of a step, of which the last is exchanged with all that they add up to.
            broken: the step at which the gradients of rank 1 are not finite.
        """
        for step in steps:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            quiet = self.model.no_sync if isinstance(self.model, DistributedDataParallel) else self.wire.no_sync
            for part in range(parts):
                value = loss(self.model, self.ranks.rank, step + 100 * part)
                value = value * torch.inf if step == broken and self.ranks.rank == 1 else value
                with contextlib.nullcontext() if part == parts - 1 else quiet():
                    self._scaled(value).backward()
            self._step()
            self.params.append(digest(*self.inner.parameters()))

    def _scaled(self, value: Tensor) -> Tensor:
        scaler = self.options.get("scaler")
        return value if scaler is None else scaler.scale(value)

    def _step(self) -> None:
        scaler = self.options.get("scaler")
        for optimizer in self.optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()

    def saved(self) -> dict[str, Any]:
        return {
            "model": self.inner.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
            "wire": self.wire.state_dict(),
        }

    def load_trained(self, state: Mapping[str, Any]) -> None:
        """The rest of ``saved``, without the session."""
        self.inner.load_state_dict(state["model"])
        for one, its in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(its)

    def found(self) -> Found:
        """End it, and say what it has left."""
        names = {name for name, _ in self.inner.named_parameters()}
        states = {
            "/".join(path).replace("carried", "pending_residual"): digest(t)
            for path, t in tensors_of(self.wire.state_dict())
            if names & {*path}
        }
        states |= optimizer_states("optimizer", *self.optimizers)
        rows = [[figure(row, *names) for names in BYTES] for row in self.wire.ledger.rows]
        self.wire.detach()
        states |= optimizer_states("detached", *self.optimizers)
        return {"params": [*self.params, digest(*self.inner.parameters())], "states": states, "bytes": rows}


def figure(row: Any, *names: str) -> Any:
    """The first of these attributes that a step has."""
    return next((getattr(row, name) for name in names if hasattr(row, name)), None)


def optimizer_states(label: str, *optimizers: torch.optim.Optimizer) -> dict[str, str]:
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    return {"/".join((label, *path)): digest(t) for path, t in tensors_of(states)}


def start(
    ranks: Ranks,
    engine: str,
    method: str | Chosen,
    inner: nn.Module | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    wrap: Mapping[str, Any] | None = None,
    optimizers: list[torch.optim.Optimizer] | None = None,
    **options: Any,
) -> Run:
    """Build, wrap and attach; ``engine`` is ``"ddp"``, ``"bare"``, or ``"fsdp2"`` for a model that is sharded already.

    Args:
        group: the ranks; None for the pair.
        wrap: options of DDP.
        options: of attach.
    """
    chosen = METHODS[method] if isinstance(method, str) else method
    inner = inner or Network()
    group = group or ranks.pair
    optimizers = optimizers or [OPTIMIZERS[chosen.optimizer](inner.parameters())]
    model = DistributedDataParallel(inner, process_group=group, **(wrap or {})) if engine == "ddp" else inner
    options = {"kernels": "reference", "timeout": 60.0} | options
    run = Run(ranks, inner, model, optimizers, options | ({"process_group": group} if engine == "bare" else {}))
    run.attach(chosen.make())
    return run


def simulated(method: str, workers: int, kernels: str, **options: Any) -> Found:
    """Return the results of a simulation; it has no checkpoints, so its states are those of the optimizer."""
    model, params = Network(), list[str]()
    optimizer = OPTIMIZERS[METHODS[method].optimizer](model.parameters())
    result = tw.simulate(
        model,
        METHODS[method].make(),
        optimizer=optimizer,
        batches=lambda worker, step: (worker, step),
        loss=lambda model, where: loss(model, *where),
        workers=workers,
        steps=options.pop("steps", STEPS),
        kernels=kernels,
        after_step=lambda step, value: params.append(digest(*model.parameters())),
        **options,
    )
    rows = [[figure(row, *names) for names in BYTES] for row in result.ledger.rows]
    return {"params": params, "states": optimizer_states("detached", optimizer), "bytes": rows}
