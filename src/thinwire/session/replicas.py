"""A cheap look at what must be equal on all ranks: their steps, and the bits of their parameters.

It is a few bytes of text every so many exchanges, between all ranks, and rides in no header: a header is read by the
replicas of one shard alone, its size is part of a message's, and dense messages have none. When it is due follows from
the number of exchanges begun, which is equal on all ranks even where one of them left out a step. It costs one read of
the parameters.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from thinwire.comm.collectives import Talk
from thinwire.comm.texts import known_to_all
from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import own
from thinwire.session.clock import apart, parted
from thinwire.session.fingerprint import chained, fingerprint

EVERY = 100
"""Exchanges from one look to the next: at that, reading the parameters takes less than 0.3 % of the time."""
ASIDE = "-"
"""Before the hash of a rank that is not compared."""


class Replicas:
    """What a rank holds that others hold too.

    Args:
        named: its parameters; none, where no other rank holds the same.
        talk: all ranks of the model.
        parts: into how many the model is sharded: rank r holds the same as r + parts.
        every: exchanges from one look to the next, 0 for none.

    Raises:
        ThinwireError: ``every`` is no whole number from 0.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], talk: Talk, parts: int = 1, every: int = EVERY) -> None:
        if type(every) is not int or every < 0:
            raise ThinwireError(f"check_every is {every!r}; it is a number of exchanges, or 0 for no check")
        held = [(name, param) for name, param in named if _has_bits(param)]
        self.described = [(f"parameter {name!r}", f"of shape {tuple(p.shape)}, {p.dtype}") for name, p in held]
        """What must be equal on all ranks before values are compared: the number of texts follows from it."""
        self.named = held if talk.world > parts else []
        self.talk, self.parts, self.every = talk, parts, every
        self.aside = False
        """Whether the others' parameters will replace this rank's; the engine's to say, before a check."""
        self.strays: Sequence[int] = ()
        """The ranks aside whose parameters were not the others' at the last look; all ranks know the same."""
        self._begun = 0

    def due(self) -> bool:
        """One more exchange has been made; whether it is time to look, which all ranks answer alike."""
        self._begun += 1
        return self.every > 0 and self._begun % self.every == 0 and self.talk.world > 1

    def begin(self) -> None:
        """Compare the parameters, once all ranks have the same ``described``, before the first exchange. A collective
        call.

        Raises:
            ThinwireError: they differ; it is the same on all ranks.
        """
        if self.named and (differs := self._look(0)[1]):
            raise known_to_all(
                ThinwireError(
                    f"the ranks begin with different weights: {differs}; load the same weights on all ranks, or wrap "
                    "the model after they have been changed, and attach again"
                )
            )

    def check(self, step: int, refuse: Callable[[str], None]) -> None:
        """Compare the steps of all ranks, and the parameters of those that are not aside. A collective call.

        Args:
            step: that this rank is at.
            refuse: raises an error, after which no step is made of what has been exchanged.
        """
        steps, differs = self._look(step)
        if others := apart(steps):
            refuse(parted(step, others))
        if differs:
            refuse(
                f"step {step}: the replicas have parted: {differs}. Something changed it on some ranks only. Restart "
                "from the last checkpoint, and change parameters on all ranks alike; check_every=0 turns this check off"
            )

    def _look(self, step: int) -> tuple[list[int], str]:
        """The steps of all ranks, and the first parameter that differs with the ranks where it does, or ""."""
        hashes = [fingerprint(own(param)) for _, param in self.named]
        said = [text.split() for text in self.talk.exchange_text(f"{step} {self._said(hashes)}")]
        found = [text for _, text in said]
        self.strays = [r for r, text in enumerate(found) if text.startswith(ASIDE) and text[len(ASIDE) :] not in found]
        differs = self._first(hashes) if self._odd(found) else ""
        return [int(text) for text, _ in said], differs

    def _said(self, hashes: Sequence[int]) -> str:
        return f"{ASIDE * self.aside}{chained(hashes):016x}"

    def _odd(self, said: Sequence[str]) -> dict[int, int]:
        """The ranks that said something else than the first that holds the same part, and that one."""
        first: dict[int, int] = {}
        for rank, text in enumerate(said):
            if not text.startswith(ASIDE):
                first.setdefault(rank % self.parts, rank)
        others = [(rank, first[rank % self.parts]) for rank, text in enumerate(said) if not text.startswith(ASIDE)]
        return {rank: one for rank, one in others if said[rank] != said[one]}

    def _asked(self, hashes: Sequence[int]) -> dict[int, int]:
        return self._odd(self.talk.exchange_text(self._said(hashes)))

    def _first(self, hashes: Sequence[int]) -> str:
        """Find the first that differs by halves, each a text of 16 characters; all ranks take the same halves."""
        low, high = 0, len(hashes)  # the first low are alike, the first high are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._asked(hashes[:middle]) else (middle, high)
        ranks = self._asked(hashes[low:high])
        return f"parameter {self.named[low][0]!r} is not the same on all ranks: {self._listed(ranks)}"

    def _listed(self, ranks: Mapping[int, int]) -> str:
        first: dict[int, list[str]] = {}
        for rank, one in ranks.items():
            first.setdefault(one, []).append(str(rank))
        shard = ", which holds the same shard" if self.parts > 1 else ""
        said = [
            ("ranks {} differ" if len(odd) > 1 else "rank {} differs").format(" and ".join(odd))
            for odd in first.values()
        ]
        return "; ".join(f"{what} from rank {rank}{shard}" for rank, what in zip(first, said, strict=True))


def _has_bits(param: Tensor) -> bool:
    """Whether it is an ordinary tensor in memory; what is frozen may be anything else, and is not compared."""
    if is_lazy(param) or param.is_meta or param.layout != torch.strided or param.is_quantized:
        return False
    return type(own(param).detach()) is Tensor
