"""A cheap check that all ranks have the same step and bit-identical parameters.

Every few exchanges all ranks exchange a few bytes of text. They are not part of a message header: only the replicas of
one shard read a header, it would change the message size, and dense messages have none. The check is due after a fixed
number of exchanges, which is equal on all ranks even if one of them left out a step. It reads each parameter once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from thinwire.comm.collectives import ControlChannel
from thinwire.comm.texts import known_to_all
from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import own
from thinwire.session.fingerprint import chained, fingerprint
from thinwire.session.transaction import Transaction

EVERY = 100
"""Exchanges from one check to the next: so reading the parameters takes less than 0.3 % of the time."""
ASIDE = "-"
"""Prefix of the hash of a rank that is not compared."""


class Replicas:
    """The comparison of parameters that several ranks hold: rank r holds the same as rank r + ``parts``."""

    def __init__(
        self, named: Sequence[tuple[str, Tensor]], channel: ControlChannel, parts: int = 1, every: int = EVERY
    ) -> None:
        if type(every) is not int or every < 0:
            raise ThinwireError(f"check_every is {every!r}; it is a number of exchanges, or 0 for no check")
        held = [(name, param) for name, param in named if _has_bits(param)]
        self.described = [(f"parameter {name!r}", f"of shape {tuple(p.shape)}, {p.dtype}") for name, p in held]
        """Lines that must be equal on all ranks before values are compared, as the number of texts depends on them."""
        self.named = held if channel.world > parts else []
        self.channel, self.parts, self.every = channel, parts, every
        self.aside = False
        """True if other ranks' parameters will replace this rank's; the engine sets it before a check."""
        self.strays: Sequence[int] = ()
        """The ranks aside whose parameters matched no other rank's at the last check; equal on all ranks."""
        self._begun = 0

    def due(self) -> bool:
        """Count one more exchange; returns True if a check is due, the same on all ranks."""
        self._begun += 1
        return self.every > 0 and self._begun % self.every == 0 and self.channel.world > 1

    def begin(self) -> None:
        """Compare the parameters before the first exchange, when ``described`` is the same on all ranks. Collective."""
        if self.named and (differs := self._look(0)[1]):
            raise known_to_all(
                ThinwireError(
                    f"the ranks begin with different weights: {differs}; load the same weights on all ranks, or wrap "
                    "the model after they have been changed, and attach again"
                )
            )

    def check(self, step: int, transaction: Transaction) -> None:
        """Compare the steps of all ranks, and the parameters of those that are not aside. A collective call."""
        steps, differs = self._look(step)
        transaction.check_steps(steps, step)
        if differs:
            transaction.refuse(
                f"step {step}: replicas differ: {differs}. Something changed it on some ranks only. Restart "
                "from the last checkpoint, and change parameters on all ranks alike; check_every=0 turns this check off"
            )

    def _look(self, step: int) -> tuple[list[int], str]:
        """Return all ranks' steps, and a text with the first parameter that differs and its ranks, or ""."""
        hashes = [fingerprint(own(param)) for _, param in self.named]
        steps, found = zip(*(text.split() for text in self._exchange(hashes, f"{step} ")), strict=True)
        self.strays = [r for r, text in enumerate(found) if text.startswith(ASIDE) and text[len(ASIDE) :] not in found]
        return [int(text) for text in steps], self._first(hashes) if self._odd(found) else ""

    def _odd(self, said: Sequence[str]) -> dict[int, int]:
        """Return, for each rank whose text differs, the first rank that holds the same shard."""
        first, odd = dict[int, int](), dict[int, int]()
        for rank, text in enumerate(said):
            if not text.startswith(ASIDE):
                one = first.setdefault(rank % self.parts, rank)
                if text != said[one]:
                    odd[rank] = one
        return odd

    def _exchange(self, hashes: Sequence[int], before: str = "") -> Sequence[str]:
        return self.channel.exchange_text(f"{before}{ASIDE * self.aside}{chained(hashes):016x}")

    def _first(self, hashes: Sequence[int]) -> str:
        """Find the first parameter that differs by bisection, with 16 characters a round; all ranks do the same."""
        low, high = 0, len(hashes)  # the first ``low`` are equal on all ranks, the first ``high`` are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._odd(self._exchange(hashes[:middle])) else (middle, high)
        first: dict[int, list[str]] = {}
        for rank, one in self._odd(self._exchange(hashes[low:high])).items():
            first.setdefault(one, []).append(str(rank))
        shard = ", which holds the same shard" if self.parts > 1 else ""
        said: list[str] = []
        for rank, odd in first.items():
            differ = f"ranks {' and '.join(odd)} differ" if len(odd) > 1 else f"rank {odd[0]} differs"
            said.append(f"{differ} from rank {rank}{shard}")
        return f"parameter {self.named[low][0]!r} is not the same on all ranks: {'; '.join(said)}"


def _has_bits(param: Tensor) -> bool:
    """Return True for an ordinary tensor in memory; frozen parameters may be of other kinds and are not compared."""
    if is_lazy(param) or param.is_meta or param.layout != torch.strided or param.is_quantized:
        return False
    return type(own(param).detach()) is Tensor
