"""After an exchange has failed: which ranks are gone, which did not answer, and what the others say of it.

gloo tells of every connection why it was closed: by the other end, or by this one, where a wait has timed out. Those
who live say so in the group's store, since a failure closes connections between survivors too.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist

PROBE_SECONDS = 0.5
"""For a connection to show that it is closed."""
WORD_SECONDS = 2.0
"""For survivors to say that they live."""
SHORT = 300
"""Characters of what a rank leaves in the store."""
WORD = "thinwire/word"
CLOSED = ("closed by peer", "reset by peer", "Broken pipe", "refused", "Socket closed")
"""Of gloo's messages, those about the other end."""


class Lost(NamedTuple):
    """What one rank can tell of the others after an exchange has failed."""

    gone: Sequence[int] = ()
    """Their connections are closed, and they don't say that they live."""
    silent: Sequence[int] = ()
    """They say nothing; they may live, and be late."""
    raised: str = ""
    """What a rank raised that the others could not be told otherwise."""

    def __str__(self) -> str:
        if self.raised:
            return self.raised
        if self.gone:
            return f"{_ranks(self.gone)} {'seem' if len(self.gone) > 1 else 'seems'} to be gone"
        return f"{_ranks(self.silent)} did not answer" if self.silent else ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {' and '.join(map(str, ranks))}"


class Liveness:
    """The ranks of one group, as this one sees them."""

    spoke: ClassVar[set[str]] = set()
    """Groups in whose store this process has said something."""

    def __init__(self, group: dist.ProcessGroup, rank: int, world: int) -> None:
        self.group, self.rank, self.world = group, rank, world

    def lost(self) -> Lost:
        """Look for the others. What is under way on gloo ends here: it closes all connections of this rank."""
        self.here()
        closed = self._closed()
        others = [rank for rank in range(self.world) if rank != self.rank]
        found: list[Lost] = []
        # the store answers never where the link to its host is cut, and nothing bounds that wait
        asking = threading.Thread(target=lambda: found.append(self._words(others, closed)), daemon=True)
        asking.start()
        asking.join(2 * WORD_SECONDS)
        return found[0] if found else Lost(closed, [rank for rank in others if rank not in closed])

    def _words(self, others: Sequence[int], closed: Sequence[int]) -> Lost:
        """Read in the store what the others say."""
        deadline = time.monotonic() + WORD_SECONDS
        try:
            while (quiet := self._quiet(others)) and time.monotonic() < deadline:
                time.sleep(0.1)
            raised = self._store.get(WORD)[: 4 * SHORT].decode(errors="replace") if self._store.check([WORD]) else ""
        except (AttributeError, RuntimeError):  # no store, or its host is the one that is gone
            host = [rank for rank in closed if dist.get_global_rank(self.group, rank) == 0]
            return Lost(host or closed)
        gone = [rank for rank in closed if rank in quiet]
        return Lost(gone, [rank for rank in quiet if rank not in gone], raised)

    def here(self) -> None:
        """Say that this rank lives."""
        self._say(_alive(self.rank), "yes")

    def leave_word(self, text: str) -> None:
        """Say why this rank will not answer."""
        self._say(WORD, text[:SHORT])
        self.here()

    def forget(self) -> None:
        """All ranks have answered, so nothing that was said before holds any longer."""
        name = self.group.group_name
        if name in self.spoke:
            self.spoke.discard(name)
            with contextlib.suppress(AttributeError, RuntimeError):
                self._store.delete_key(_alive(self.rank))
                self._store.delete_key(WORD)

    @property
    def _store(self) -> Any:
        return cast(Any, self.group).get_group_store()

    def _say(self, key: str, text: str) -> None:
        with contextlib.suppress(AttributeError, RuntimeError):
            self._store.set(key, text)
            self.spoke.add(self.group.group_name)

    def _quiet(self, ranks: Sequence[int]) -> list[int]:
        """Those of these ranks that do not say that they live, in few questions to the store."""
        if not ranks or self._store.check([_alive(rank) for rank in ranks]):
            return []
        half = len(ranks) // 2
        return [*ranks] if half == 0 else [*self._quiet(ranks[:half]), *self._quiet(ranks[half:])]

    def _closed(self) -> list[int]:
        """The ranks that have closed their connection to this one; only gloo tells."""
        if dist.get_backend(self.group) != "gloo":
            return []
        closed: list[int] = []
        asked: dict[int, Any] = {}
        for rank in (rank for rank in range(self.world) if rank != self.rank):
            nothing = torch.zeros(1, dtype=torch.uint8, device="cpu")
            try:  # a message that nobody awaits fails at once where the connection is closed
                asked[rank] = dist.isend(nothing, dist.get_global_rank(self.group, rank), group=self.group)
            except RuntimeError as error:
                closed += [rank] * _by_the_other(error)
        deadline = time.monotonic() + PROBE_SECONDS
        for rank, work in asked.items():
            try:
                work.wait(timedelta(seconds=max(0.01, deadline - time.monotonic())))
            except RuntimeError as error:
                closed += [rank] * _by_the_other(error)
        return sorted(closed)


def _alive(rank: int) -> str:
    return f"thinwire/alive/{rank}"


def _by_the_other(error: RuntimeError) -> bool:
    return any(words in str(error) for words in CLOSED)
