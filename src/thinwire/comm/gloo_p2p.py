"""Point-to-point exchange of CPU tensors on gloo, each message sent directly to its receiver.

A gloo receiver announces each receive to the sender, over the same connection that carries data the other way. gloo's
own collectives send before they receive, so the announcement queues behind a whole message and the two directions
take turns. Here a rank posts all its receives before it sends anything, so both directions are busy at once.
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
"""Most ranks for this path: with more, the two directions of a connection seldom block each other."""
LEAST = 2**16
"""Fewest bytes to each rank for this path: it wakes a Python thread, which costs more than waking one of gloo's."""
FEW = 16
"""Most ranks for which a short all-gather is sent as one all-to-all. gloo's all-gather is a ring: every rank waits
N - 1 times for the rank before it."""
TAGS = range(2**20, 2**21)  # users rarely take these
NOBODY = TAGS.stop
GRACE = 2.0
"""Seconds for exchanges in progress when a group is closed."""


def pays(group: dist.ProcessGroup, row: Tensor) -> bool:
    """Return True if the direct path is faster for an exchange that sends such a row to each other rank."""
    return row.nbytes >= LEAST and _among(WORLD, group, row)


def at_once(group: dist.ProcessGroup, message: Tensor) -> bool:
    """Return True if an all-gather of this message should be sent as an all-to-all, which takes one stage."""
    return message.nbytes < LEAST and _among(FEW, group, message)


def _among(most: int, group: dist.ProcessGroup, row: Tensor) -> bool:
    fits = 1 < dist.get_world_size(group) <= most
    return fits and row.device.type == "cpu" and "cpu:gloo" in dist.get_backend_config(group)


class Sent:
    """An exchange in progress: like a ``torch.distributed`` work, plus a future."""

    def __init__(self, direct: "Direct", received: Tensor) -> None:
        self.future: Future = torch.futures.Future[Any]()
        self.works: list[Any] = []
        self.error: Exception | None = None
        self._direct, self._received = direct, received
        self._over = Event()

    def finish(self) -> None:
        """Wait for the network and complete the future; its callbacks run in this thread."""
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
        """Wait for this exchange and the callbacks of earlier ones; a timeout closes all connections of the group."""
        if not self._over.wait(timeout.total_seconds()):
            self._direct.hang_up()
            seconds = timeout.total_seconds()
            raise RuntimeError(f"timed out after {seconds:g} s; the connections of the group are closed now")
        if self.error is not None:
            raise self.error


class Direct:
    """The exchanges of one group; a thread waits for them in the order of their start."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._world = group, dist.get_rank(group), dist.get_world_size(group)
        self._started = 0
        self._queue: SimpleQueue[Sent | None] = SimpleQueue()
        self._thread: Thread | None = None

    def start(self, rows: Sequence[Tensor], received: Tensor) -> Sent:
        """Send row r of ``rows`` to rank r and receive row r of ``received`` from it; all ranks call in one order."""
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
        """Close all connections of the group so that no rank waits any longer: gloo does so when a wait times out."""
        if self._world == 1 or "cpu:gloo" not in dist.get_backend_config(self._group):
            return
        other = (self._rank + 1) % self._world
        for i in range(len(os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))):  # tags take turns on interfaces
            with contextlib.suppress(RuntimeError):
                nothing = torch.empty(1, dtype=torch.float32, device="cpu")
                work: Any = dist.irecv(nothing, group=self._group, tag=NOBODY + i, group_src=other)
                work.wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Stop the thread. Exchanges in progress have ``GRACE`` seconds to end; then the connections are closed."""
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
        del sent  # frees its messages before the next wait


_open: WeakSet[Direct] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop all threads at exit: one that returns from gloo during interpreter shutdown would abort the process."""
    for direct in [*_open]:
        direct.close()
