"""Character-level language models: the demo's two-layer LSTM, and a small transformer for training with Adam."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from thinwire.core.errors import ThinwireError


class CharLM(nn.Module):
    """An LSTM that predicts the next character; 3.5 million parameters at the default size."""

    def __init__(self, vocabulary: int, embedding: int = 128, hidden: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:  # [batch, length] -> [batch, length, vocabulary]
        return self.head(self.lstm(self.embedding(characters))[0])


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each with a norm before it and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, length, width], twice
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_attention(x)).chunk(3, 2)
        )  # [batch, heads, length, width / heads]
        attention = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attended(attention.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm_mlp(x))))


class Transformer(nn.Module):
    """A transformer that predicts the next character; made by ``transformer``."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, characters: Tensor) -> Tensor:  # [batch, length] -> [batch, length, vocabulary]
        x = self.embedding(characters) + self.position.weight[: characters.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def transformer(vocabulary: int, *, width: int = 64, layers: int = 2, heads: int = 4, length: int = 128) -> Transformer:
    """Make a small GPT without dropout, initialised as GPT-2: 120,000 parameters at the default size.

    Raises:
        ThinwireError: ``heads`` does not divide ``width``.

    Source: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.

    Departures: the head is not tied to the embedding.
    """
    if width % heads:
        raise ThinwireError(f"width is {width}, which {heads} heads can't share; make it a multiple of heads")
    model = Transformer(vocabulary, width, layers, heads, length)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(".bias"):
                param.zero_()
            elif param.ndim == 2:  # layers that add to the residual stream start smaller with more blocks
                adds = name.endswith(("attended.weight", "down.weight"))
                param.normal_(std=0.02 / (2 * layers) ** 0.5 if adds else 0.02)
    return model


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats per character, of windows ``[batch, length + 1]``."""
    logits: Tensor = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
