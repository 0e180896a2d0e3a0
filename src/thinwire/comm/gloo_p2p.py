"""Messages straight to whom they are for, between CPU tensors on gloo.

gloo tells a sender that its message is awaited, over the connection that also carries what goes the other way, and its
own collectives send before they receive: that word then stands behind a whole message, and the two directions take
turns. Here a rank announces all that it awaits before it sends anything, and both directions are full.
"""

import atexit
import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeAlias
from weakref import WeakSet, finalize

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
GRACE = 2.0
"""Seconds for what is under way when a group is let go of."""


def pays(group: dist.ProcessGroup, row: Tensor) -> bool:
    """Whether a message of which each other rank gets such a row should go straight to them."""
    return row.nbytes >= LEAST and _among(WORLD, group, row)


def at_once(group: dist.ProcessGroup, message: Tensor) -> bool:
    """Whether what all are to get should be sent as an all-to-all: in one stage."""
    return message.nbytes < LEAST and _among(FEW, group, message)


def _among(most: int, group: dist.ProcessGroup, row: Tensor) -> bool:
    fits = 1 < dist.get_world_size(group) <= most
    return fits and row.device.type == "cpu" and "cpu:gloo" in dist.get_backend_config(group)


class Sent:
    """An exchange under way: what ``torch.distributed`` calls a work, with a future besides."""

    def __init__(self, direct: "Direct", received: Tensor) -> None:
        self.future: Future = torch.futures.Future[Any]()
        self.works: list[Any] = []
        self.error: Exception | None = None
        self._direct, self._received = direct, received
        self._over = Event()

    def finish(self) -> None:
        """Wait for the network, and complete the future, which runs its callbacks here."""
        try:
            for work in self.works if self.error is None else ():
                work.wait()
        except RuntimeError as error:
            self.error = error
        self.works.clear()
        self._over.set()
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self._received)

    def wait(self, timeout: timedelta) -> None:
        """Wait for the network, and for what the exchanges before have called back.

        Raises:
            RuntimeError: what gloo raises, or it took longer; then all connections are closed.
        """
        if not self._over.wait(timeout.total_seconds()):
            self._direct.hang_up()
            seconds = timeout.total_seconds()
            raise RuntimeError(f"timed out after {seconds:g} s; the connections of the group are closed now")
        if self.error is not None:
            raise self.error


class Direct:
    """The exchanges of one group, awaited by a thread in the order in which they were started."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._world = group, dist.get_rank(group), dist.get_world_size(group)
        self._started = 0
        self._queue: SimpleQueue[Sent | None] = SimpleQueue()
        self._thread: Thread | None = None

    def start(self, rows: Sequence[Tensor], received: Tensor) -> Sent:
        """Row r of ``rows`` goes to rank r, and row r of ``received`` comes from it; all ranks call this in turn.

        Where a connection is gone, waiting says so.
        """
        if self._thread is None:
            self._thread = Thread(target=_finish_all, args=(self._queue,), name="thinwire-direct", daemon=True)
            self._thread.start()
            _open.add(self)
            finalize(self, self._queue.put, None)
        tag = TAGS[self._started % len(TAGS)]
        self._started += 1
        received[self._rank].copy_(rows[self._rank])
        others = [(self._rank + i) % self._world for i in range(1, self._world)]
        sent = Sent(self, received)
        try:
            for rank in others:
                sent.works.append(dist.irecv(received[rank], group=self._group, tag=tag, group_src=rank))
            for rank in others:
                sent.works.append(dist.isend(rows[rank], group=self._group, tag=tag, group_dst=rank))
        except RuntimeError as error:
            sent.error = error
        self._queue.put(sent)
        return sent

    def hang_up(self) -> None:
        """Close all connections of the group, so that nobody waits any longer: gloo does so where a wait times out."""
        if self._world == 1 or "cpu:gloo" not in dist.get_backend_config(self._group):
            return
        other = (self._rank + 1) % self._world
        for i in range(len(os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))):  # tags take interfaces in turn
            with contextlib.suppress(RuntimeError):
                nothing = torch.empty(1, dtype=torch.float32, device="cpu")
                work: Any = dist.irecv(nothing, group=self._group, tag=NOBODY + i, group_src=other)
                work.wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Let go of the thread. What is under way has some time to end; then the group's connections are closed."""
        thread, self._thread = self._thread, None
        if thread is None or not thread.is_alive():  # as in a child that was forked
            return
        self._queue.put(None)
        thread.join(GRACE)
        if thread.is_alive():
            self.hang_up()
            thread.join(GRACE)


def _finish_all(queue: "SimpleQueue[Sent | None]") -> None:
    while (sent := queue.get()) is not None:
        sent.finish()
        del sent  # and its messages, while this waits for the next


_open: WeakSet[Direct] = WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that comes back from gloo when the interpreter is shutting down would end the process."""
    for direct in [*_open]:
        direct.close()
