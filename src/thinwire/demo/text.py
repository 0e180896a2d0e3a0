"""Real text that comes with every CPython: the help topics of pydoc, as characters."""

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Text:
    """Characters as int64, split by topic into what is trained on and what is held out."""

    train: Tensor  # [characters]
    held_out: Tensor
    vocabulary: str

    def batch(self, step: int, worker: int, size: int, length: int, seed: int = 0) -> Tensor:
        """Windows of ``length + 1`` characters, int64 ``[size, length + 1]``, the same for equal arguments."""
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + worker) % 2**63)
        starts = torch.randint(self.train.numel() - length - 1, (size,), generator=generator)
        return self.train[starts.unsqueeze(1) + torch.arange(length + 1)]

    def held_out_batch(self, size: int, length: int) -> Tensor:
        """``size`` windows spread evenly over the held-out text, int64 ``[size, length + 1]``."""
        starts = torch.linspace(0, self.held_out.numel() - length - 2, size).long()
        return self.held_out[starts.unsqueeze(1) + torch.arange(length + 1)]


def load() -> Text:
    """The help topics; every tenth is held out."""
    from pydoc_data.topics import topics  # pyright: ignore[reportUnknownVariableType, reportMissingModuleSource]

    texts: list[str] = [topics[key] for key in sorted(topics)]  # pyright: ignore[reportUnknownVariableType]
    vocabulary = "".join(sorted(set("".join(texts))))
    code = {character: i for i, character in enumerate(vocabulary)}

    def encode(chosen: list[str]) -> Tensor:
        return torch.tensor([code[character] for character in "\n".join(chosen)])

    held_out = texts[::HELD_OUT_EVERY]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY]
    return Text(encode(train), encode(held_out), vocabulary)
