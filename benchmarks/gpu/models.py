"""What is trained: the MLP of ``benchmarks.contenders``, and a transformer of the shape of GPT-2."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from benchmarks.contenders import MODELS


class Block(nn.Module):
    """Attention and two layers, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.before(x)).view(shape).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.between(x)), approximate="tanh"))


class Gpt(nn.Module):
    """A decoder whose head is its table of tokens; its answer is the loss."""

    def __init__(self, tokens: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.token.weight
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1] - 1, device=text.device)
        x = self.blocks(self.token(text[:, :-1]) + self.place(places))
        return cross_entropy(self.head(self.last(x)).flatten(0, 1), text[:, 1:].flatten())


class Squares(nn.Module):
    """A model whose answer is the loss, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().sum(-1).mean()


@dataclass(frozen=True)
class Task:
    """How to build a model, its batch, and whether it runs in bfloat16 autocast."""

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
