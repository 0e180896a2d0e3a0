"""Diagnosis after a failed exchange: which ranks are gone, which did not answer, and what they reported.

gloo tells for every connection if the other end closed it, or this end after a timed-out wait. A failure closes
connections between survivors too, so survivors also write a key into the group's store.
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
"""Time for a closed connection to show that it is closed."""
WORD_SECONDS = 2.0
"""Time for survivors to write to the store."""
SHORT = 300
"""Characters of a rank's message in the store."""
WORD = "thinwire/word"
CLOSED = ("closed by peer", "reset by peer", "Broken pipe", "refused", "Socket closed")
"""Parts of gloo's error messages that blame the other end."""


class Lost(NamedTuple):
    """The state of the other ranks after a failed exchange, as one rank sees it."""

    gone: Sequence[int] = ()
    """Ranks whose connection is closed and that did not write to the store."""
    silent: Sequence[int] = ()
    """Ranks that did not answer; they may be alive and late."""
    raised: str = ""
    """The error that a rank left in the store."""
    said: Sequence[tuple[int, str]] = ()
    """The status of each rank that wrote it to the store."""

    def __str__(self) -> str:
        if self.raised:
            return self.raised
        if self.gone:
            return f"{_ranks(self.gone)} {'seem' if len(self.gone) > 1 else 'seems'} to be gone"
        return f"{_ranks(self.silent)} did not answer" if self.silent else ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {' and '.join(map(str, ranks))}"


class Liveness:
    """The liveness of the ranks of one group, as this rank sees it."""

    spoke: ClassVar[set[str]] = set()
    """Groups in whose store this process has written."""

    def __init__(self, group: dist.ProcessGroup, rank: int, world: int) -> None:
        self.group, self.rank, self.world = group, rank, world

    def lost(self, status: str = "") -> Lost:
        """Find out which ranks are lost. On gloo this closes all connections of this rank and ends its exchanges."""
        self.here(status)
        closed = self._closed()
        others = [rank for rank in range(self.world) if rank != self.rank]
        found: list[Lost] = []
        # if the link to the store's host is cut, the store never answers and has no timeout: ask in a thread
        asking = threading.Thread(target=lambda: found.append(self._words(others, closed)), daemon=True)
        asking.start()
        asking.join(2 * WORD_SECONDS)
        return found[0] if found else Lost(closed, [rank for rank in others if rank not in closed])

    def _words(self, others: Sequence[int], closed: Sequence[int]) -> Lost:
        """Read the messages of the other ranks from the store."""
        deadline = time.monotonic() + WORD_SECONDS
        try:
            while (quiet := self._quiet(others)) and time.monotonic() < deadline:
                time.sleep(0.1)
            raised = self._store.get(WORD)[: 4 * SHORT].decode(errors="replace") if self._store.check([WORD]) else ""
        except (AttributeError, RuntimeError):  # no store, or its host is the one that is gone
            host = [rank for rank in closed if dist.get_global_rank(self.group, rank) == 0]
            return Lost(host or closed)
        gone = [rank for rank in closed if rank in quiet]
        said = [(rank, self._store.get(_alive(rank)).decode(errors="replace")) for rank in others if rank not in quiet]
        return Lost(gone, [rank for rank in quiet if rank not in gone], raised, said)

    def here(self, status: str = "") -> None:
        """Write to the store that this rank is alive, and its status."""
        self._say(_alive(self.rank), status[:SHORT] or "yes")

    def leave_word(self, text: str) -> None:
        """Write to the store why this rank will not answer."""
        self._say(WORD, text[:SHORT])
        self.here()

    def forget(self) -> None:
        """Delete this rank's keys from the store: all ranks have answered, so the keys are out of date."""
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
        """Return the ranks that have not written that they are alive; halving keeps store requests few."""
        if not ranks or self._store.check([_alive(rank) for rank in ranks]):
            return []
        half = len(ranks) // 2
        return [*ranks] if half == 0 else [*self._quiet(ranks[:half]), *self._quiet(ranks[half:])]

    def _closed(self) -> list[int]:
        """Return the ranks that have closed their connection to this one; empty for backends other than gloo."""
        if dist.get_backend(self.group) != "gloo":
            return []
        closed: list[int] = []
        probes: dict[int, Any] = {}
        for rank in (rank for rank in range(self.world) if rank != self.rank):
            nothing = torch.zeros(1, dtype=torch.uint8, device="cpu")
            try:  # even a message that no rank receives fails at once on a closed connection
                probes[rank] = dist.isend(nothing, dist.get_global_rank(self.group, rank), group=self.group)
            except RuntimeError as error:
                closed += [rank] * _by_the_other(error)
        deadline = time.monotonic() + PROBE_SECONDS
        for rank, work in probes.items():
            try:
                work.wait(timedelta(seconds=max(0.01, deadline - time.monotonic())))
            except RuntimeError as error:
                closed += [rank] * _by_the_other(error)
        return sorted(closed)


def _alive(rank: int) -> str:
    return f"thinwire/alive/{rank}"


def _by_the_other(error: RuntimeError) -> bool:
    return any(words in str(error) for words in CLOSED)
