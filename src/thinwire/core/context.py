"""Where and when something is compressed."""

from dataclasses import dataclass, field
from zlib import crc32

import torch

from thinwire.core.loops import Kernels


@dataclass(frozen=True)
class Context:
    """Where and when something is compressed; all randomness is a function of it, so none is checkpointed."""

    seed: int
    step: int
    unit: str
    rank: int
    kernels: Kernels | None = field(default=None, compare=False, repr=False)
    """Which loops to use; None for plain PyTorch. The result is the same."""

    exact: bool = field(default=False, compare=False)
    """Whether all of what is asked arrives, as in a dense stage; only the sender is told."""
    saturates: float = field(default=0.0, compare=False)
    """At which share of a shorter dtype's range finite values saturate, where what they lose comes back; 0: they
    overflow, as a cast does. Only the sender is told."""
    turn: int | None = field(default=None, compare=False)
    """See ``phase``; None for the step."""

    @property
    def phase(self) -> int:
        """The step that all ranks are taken to be at, for shapes: the same on each, be one of them at another step."""
        return self.step if self.turn is None else self.turn

    def draw(self, bound: int) -> int:
        """An integer in [0, bound), the same on every machine for equal contexts."""
        return crc32(f"{self.seed}/{self.step}/{self.unit}/{self.rank}".encode()) % bound

    def generator(self, *, shared: bool = False) -> torch.Generator:
        """Randomness of this rank; or, where ``shared``, the same on all ranks."""
        who = "all" if shared else self.rank
        return torch.Generator().manual_seed(crc32(f"{self.seed}/{self.step}/{self.unit}/{who}".encode()))


NOWHERE = Context(seed=0, step=0, unit="", rank=0)
"""For what depends on no context: shapes, mostly."""

NUMBER = torch.zeros(1, dtype=torch.float32, device="meta")
"""One number of no value, for the question whether a compressor keeps a state of vectors."""
