"""Models to train: the MLP of ``benchmarks.contenders``, and a transformer of the shape of GPT-2."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.contenders import MODELS
from thinwire.cli.demo_models import Transformer


class Gpt(Transformer):
    """The demo's transformer with the head of GPT-2, which is its table of tokens; its answer is the loss."""

    def __init__(self, tokens: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__(tokens, width, layers, heads, length)
        self.head.weight = self.embedding.weight
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        return cross_entropy(super().forward(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


class Squares(nn.Module):
    """A model whose answer is the loss, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().sum(-1).mean()


@dataclass(frozen=True)
class Task:
    """A function that builds a model, its batch, and True if it runs in bfloat16 autocast."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    autocast: bool


def mlp(name: str) -> Task:
    build, shape = MODELS[name]
    return Task(lambda: Squares(build()), lambda: torch.randn(shape), autocast=False)


def gpt(tokens: int, length: int, width: int, layers: int, heads: int, batch: int) -> Task:
    return Task(
        lambda: Gpt(tokens, length, width, layers, heads),
        lambda: torch.randint(tokens, (batch, length + 1)),
        autocast=True,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "mlp": lambda: mlp("mlp"),
    "gpt": lambda: gpt(50257, 1024, 768, 12, 12, 8),  # 124.4M parameters, 8192 tokens a step
    "mlp_tiny": lambda: mlp("tiny"),
    "gpt_tiny": lambda: gpt(64, 16, 32, 2, 2, 2),
}
