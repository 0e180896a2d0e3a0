"""Small models and training loops for worlds of processes and for the simulator."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


class Net(nn.Module):
    """Matrices and biases, a tied pair, a frozen layer, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Linear(16, 48)
        self.middle = nn.Linear(48, 48)
        self.tied = nn.Linear(48, 48, bias=False)
        self.tied.weight = self.middle.weight
        self.frozen = nn.Linear(48, 48).requires_grad_(False)
        self.last = nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        x = torch.tanh(self.tied(torch.tanh(self.middle(self.first(x)))))
        return self.last(x + self.frozen(x))


def batch(worker: int, step: int, size: int = 6) -> torch.Tensor:
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(1000 * step + worker))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x.mean((2, 3)) @ torch.ones(3, 4, dtype=x.dtype)).square().mean()


def build(seed: int = 0, **sgd) -> tuple[Net, torch.optim.SGD]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **sgd})


def flat_parameters(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train_ddp(rank: int, method: thinwire.Method | None, steps: int, ddp_options=None, sgd=None, **options):
    """Parameters after training, and the session."""
    model, optimizer = build(**(sgd or {}))
    if options.pop("channels_last", False):
        model = model.to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model, **(ddp_options or {}))
    wire = thinwire.attach(ddp, method, optimizer=optimizer, **options) if method else None
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    return flat_parameters(model), wire


def accumulated(method: thinwire.Method, steps: int) -> torch.Tensor:
    """Parameters after training on two micro-batches a step, with two simulated workers."""
    model, optimizer = build()
    thinwire.simulate(
        model,
        method,
        optimizer=optimizer,
        batches=lambda worker, step: (batch(worker, 2 * step), batch(worker, 2 * step + 1)),
        loss=lambda m, pair: loss_of(m, pair[0]) / 2 + loss_of(m, pair[1]) / 2,
        workers=2,
        steps=steps,
    )
    return flat_parameters(model)


def simulated(method: thinwire.Method, workers: int, steps: int, sgd=None, channels_last: bool = False):
    model, optimizer = build(**(sgd or {}))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    result = thinwire.simulate(
        model, method, optimizer=optimizer, batches=batch, loss=loss_of, workers=workers, steps=steps
    )
    return flat_parameters(model), result
