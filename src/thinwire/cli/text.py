"""Real text as characters: the help topics of pydoc, which come with every CPython, or any file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thinwire.core.errors import ThinwireError

HELD_OUT_EVERY = 10
SHORTEST = 10_000
"""Fewest characters of a file."""


@dataclass(frozen=True)
class Text:
    """Characters as int64, split into a training part and a held-out part."""

    train: Tensor  # [characters]
    held_out: Tensor
    vocabulary: str

    def batch(self, step: int, worker: int, size: int, length: int, seed: int = 0) -> Tensor:
        """Draw windows of ``length + 1`` characters, int64 ``[size, length + 1]``, the same for equal arguments."""
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + worker) % 2**63)
        starts = torch.randint(self.train.numel() - length - 1, (size,), generator=generator)
        return self.train[starts.unsqueeze(1) + torch.arange(length + 1)]

    def held_out_batch(self, size: int, length: int) -> Tensor:
        """Return ``size`` windows spread evenly over the held-out text, int64 ``[size, length + 1]``."""
        starts = torch.linspace(0, self.held_out.numel() - length - 2, size).long()
        return self.held_out[starts.unsqueeze(1) + torch.arange(length + 1)]


def read(path: str | Path) -> Text:
    """Read a UTF-8 file, e.g. tiny Shakespeare; its last tenth is held out.

    Raises:
        ThinwireError: the file is too short to learn from, or can't be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ThinwireError(f"no text can be read from {path}: {error}") from error
    if len(text) < SHORTEST:
        raise ThinwireError(f"{path} has {len(text)} characters; training needs {SHORTEST:,} at least")
    end = len(text) - len(text) // HELD_OUT_EVERY
    return _encoded(text[:end], text[end:])


def load() -> Text:
    """Load the help topics; every tenth is held out."""
    from pydoc_data.topics import topics  # pyright: ignore[reportUnknownVariableType, reportMissingModuleSource]

    texts: list[str] = [topics[key] for key in sorted(topics)]  # pyright: ignore[reportUnknownVariableType]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY]
    return _encoded("\n".join(train), "\n".join(texts[::HELD_OUT_EVERY]))


def _encoded(train: str, held_out: str) -> Text:
    vocabulary = "".join(sorted(set(train) | set(held_out)))
    code = {character: i for i, character in enumerate(vocabulary)}
    return Text(
        torch.tensor([code[character] for character in train]),
        torch.tensor([code[character] for character in held_out]),
        vocabulary,
    )
