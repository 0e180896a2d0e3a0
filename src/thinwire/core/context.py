"""The context of a compression: seed, step, unit and rank."""

from dataclasses import dataclass, field
from zlib import crc32

import torch

from thinwire.core.loops import Kernels


@dataclass(frozen=True)
class Context:
    """The step, unit and rank of a compression. All randomness is a function of it, so checkpoints store none."""

    seed: int
    step: int
    unit: str
    rank: int
    kernels: Kernels | None = field(default=None, compare=False, repr=False)
    """The kernels to use; None for plain PyTorch. The result is the same."""

    exact: bool = field(default=False, compare=False)
    """True if this step is sent uncompressed, as in a dense stage; set only on the sender."""
    saturates: float = field(default=0.0, compare=False)
    """Share of a shorter dtype's range at which finite values saturate, if error feedback returns the rest; 0: they
    overflow, as in a cast. Set only on the sender."""
    turn: int | None = field(default=None, compare=False)
    """The value of ``phase``; None for the step."""

    @property
    def phase(self) -> int:
        """The step that decides the shapes of payloads; equal on all ranks even if one is at another step."""
        return self.step if self.turn is None else self.turn

    def draw(self, bound: int) -> int:
        """Draw an integer in [0, bound), the same on every machine for equal contexts."""
        return crc32(f"{self.seed}/{self.step}/{self.unit}/{self.rank}".encode()) % bound

    def generator(self, *, shared: bool = False) -> torch.Generator:
        """Make a random generator for this rank; with ``shared`` it is the same on all ranks."""
        who = "all" if shared else self.rank
        return torch.Generator().manual_seed(crc32(f"{self.seed}/{self.step}/{self.unit}/{who}".encode()))


NOWHERE = Context(seed=0, step=0, unit="", rank=0)
"""A context for results that do not depend on one, mostly shapes."""

NUMBER = torch.zeros(1, dtype=torch.float32, device="meta")
"""A meta vector of one element, to test if a compressor keeps a state for vectors."""
