"""An emulated link: a real exchange is delayed until a link of the given speed would have finished it."""

import time
from dataclasses import replace
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

from torch import Tensor

from thinwire.comm.collectives import Collective, Future, InFlight, OneLevel, in_future
from thinwire.comm.link import Kind, Link
from thinwire.comm.liveness import Lost

GRACE = 5.0
"""Seconds for exchanges in progress when the link is closed, so that an unanswered one can't keep the process alive."""


class Time(Protocol):
    """A clock with ``sleep``: the module ``time``, or a test's own."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class Paced(OneLevel):
    """A collective over an emulated link. Its label says that the link is emulated.

    The link carries one message at a time. An exchange ends when the emulated link has carried it or when the real
    exchange has ended, whichever is later.
    """

    def __init__(self, inner: Collective, link: Link, clock: Time = time) -> None:
        self.inner, self.clock = inner, clock
        self.link: Link | None = link
        self._pacing = link
        self.label = f"{inner.label}, emulated {link}"
        self.rank = inner.rank
        self.world = inner.world
        self._free_at = 0.0
        self._queue: SimpleQueue[tuple[Future, float, Future] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="thinwire-paced-link", daemon=True)
        self._thread.start()

    @property
    def sent(self) -> float:
        return self.inner.sent

    def all_reduce(self, message: Tensor) -> InFlight:
        return self._pace("all_reduce", message.nbytes, self.inner.all_reduce(message))

    def all_gather(self, message: Tensor) -> InFlight:
        return self._pace("all_gather", message.nbytes, self.inner.all_gather(message))

    def all_to_all(self, message: Tensor) -> InFlight:
        return self._pace("all_to_all", message.nbytes, self.inner.all_to_all(message))

    def broadcast(self, message: Tensor, source: int) -> InFlight:
        return self._pace("broadcast", message.nbytes, self.inner.broadcast(message, source))

    def exchange_text(self, text: str, timeout: float | None = None) -> list[str]:
        return self.inner.exchange_text(text, timeout)

    def rows(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        return self.inner.rows(tensor, like)

    def lost(self) -> Lost:
        return self.inner.lost()

    def here(self) -> None:
        self.inner.here()

    def leave(self, word: str) -> None:
        self.inner.leave(word)

    def hang_up(self) -> None:
        self.inner.hang_up()

    def _pace(self, kind: Kind, nbytes: int, inner: InFlight) -> InFlight:
        seconds = self._pacing.seconds(kind, nbytes, self.world)
        self._free_at = max(self.clock.monotonic(), self._free_at) + seconds
        paced = in_future(inner.result)
        self._queue.put((inner.future, self._free_at, paced))
        return replace(inner, future=paced)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            real, deadline, paced = item
            try:
                real.wait()
            except Exception as error:
                paced.set_exception(error)
                continue
            self.clock.sleep(max(0.0, deadline - self.clock.monotonic()))
            paced.set_result(real.value())

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(GRACE)
        self.inner.close()
