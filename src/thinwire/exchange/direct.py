"""Messages straight to whom they are for, between CPU tensors on gloo.

gloo tells a sender that its message is awaited, over the connection that also carries what goes the other way, and its
own collectives send before they receive: that word then stands behind a whole message, and the two directions take
turns. Here a rank announces all that it awaits before it sends anything, and both directions are full.
"""

import atexit
import contextlib
from collections.abc import Sequence
from datetime import timedelta
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

Future: TypeAlias = torch.futures.Future[Any]

WORLD = 4
"""Up to how many ranks: with more, little of what a connection carries stands in the other direction's way."""
LEAST = 2**16
"""Bytes to a rank from which on it pays: this takes a thread of Python's, and gloo's own are cheaper to wake."""
FEW = 16
"""Up to how many ranks a short message goes from each to all others at once: gloo's all-gather is a ring, in which each
waits N - 1 times for the one before."""
TAGS = range(2**20, 2**21)  # away from those that people take
NOBODY = TAGS.stop


def pays(group: dist.ProcessGroup, row: Tensor) -> bool:
    """Whether a message of which each other rank gets such a row should go straight to them."""
    return row.nbytes >= LEAST and _among(WORLD, group, row)


def at_once(group: dist.ProcessGroup, message: Tensor) -> bool:
    """Whether what all are to get should be sent as an all-to-all: in one stage."""
    return message.nbytes < LEAST and _among(FEW, group, message)


def _among(most: int, group: dist.ProcessGroup, row: Tensor) -> bool:
    fits = 1 < dist.get_world_size(group) <= most
    return fits and not row.is_cuda and "cpu:gloo" in dist.get_backend_config(group)


class Sent:
    """An exchange under way: what ``torch.distributed`` calls a work, with a future besides."""

    def __init__(self, direct: "Direct", received: Tensor, works: Sequence[Any]) -> None:
        self.future: Future = torch.futures.Future[Any]()
        self._direct, self._received, self._works = direct, received, works
        self._over = Event()
        self._error: Exception | None = None

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def finish(self) -> None:
        """Wait for the network, and complete the future."""
        try:
            for work in self._works:
                work.wait()
        except Exception as error:
            self._error = error
            self._over.set()
            self.future.set_exception(error)
        else:
            self._over.set()
            self.future.set_result(self._received)

    def wait(self, timeout: timedelta) -> None:
        """Wait for the network.

        Raises:
            RuntimeError: what gloo raises, or it took longer; then all connections are closed.
        """
        if not self._over.wait(timeout.total_seconds()):
            self._direct.hang_up()
            raise RuntimeError(f"timed out after {timeout.total_seconds():g} s")
        if self._error is not None:
            raise self._error


class Direct:
    """The exchanges of one group, awaited by a thread in the order in which they were started."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._world = group, dist.get_rank(group), dist.get_world_size(group)
        self._started = 0
        self._last: Sent | None = None
        self._queue: SimpleQueue[Sent | None] = SimpleQueue()
        self._thread: Thread | None = None

    def start(self, rows: Sequence[Tensor], received: Tensor) -> Sent:
        """Row r of ``rows`` goes to rank r, and row r of ``received`` comes from it; all ranks call this in turn."""
        if self._thread is None:
            self._thread = Thread(target=_finish_all, args=(self._queue,), name="thinwire-direct", daemon=True)
            self._thread.start()
            _open.add(self)
        tag = TAGS[self._started % len(TAGS)]
        self._started += 1
        received[self._rank].copy_(rows[self._rank])
        others = [(self._rank + i) % self._world for i in range(1, self._world)]
        awaited = [dist.irecv(received[rank], group=self._group, tag=tag, group_src=rank) for rank in others]
        sent = [dist.isend(rows[rank], group=self._group, tag=tag, group_dst=rank) for rank in others]
        self._last = Sent(self, received, [*awaited, *sent])
        self._queue.put(self._last)
        return self._last

    def hang_up(self) -> None:
        """Close all connections, so that nobody waits any longer: gloo does so where a wait times out."""
        with contextlib.suppress(RuntimeError):
            other = (self._rank + 1) % self._world
            work: Any = dist.irecv(torch.empty(1), group=self._group, tag=NOBODY, group_src=other)
            work.wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Let go of the thread; what is under way is given up."""
        if self._thread is not None:
            if self._last is not None and not self._last.over:
                self.hang_up()
            self._queue.put(None)
            self._thread.join()
            self._thread = None


def _finish_all(queue: "SimpleQueue[Sent | None]") -> None:
    while (sent := queue.get()) is not None:
        sent.finish()


_open: WeakSet[Direct] = WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that comes back from gloo when the interpreter is shutting down would end the process."""
    for direct in [*_open]:
        direct.close()
