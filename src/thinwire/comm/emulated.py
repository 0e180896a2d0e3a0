"""An emulated link: a real exchange is delayed until a link of the given speed would have finished it."""

import time
from dataclasses import replace
from queue import SimpleQueue
from threading import Thread
from typing import Any

from torch import Tensor

from thinwire.comm.collectives import Collective, Future, InFlight, Wrapped, in_future
from thinwire.comm.link import Kind, Link

GRACE = 5.0
"""Seconds for exchanges in progress when the link is closed, so that an unanswered one can't keep the process alive."""


class Paced(Wrapped):
    """A collective over an emulated link. Its label says that the link is emulated.

    The link carries one message at a time. An exchange ends when the emulated link has carried it or when the real
    exchange has ended, whichever is later. ``clock``: the module ``time``, or a test's own ``monotonic`` and ``sleep``.
    """

    def __init__(self, inner: Collective, link: Link, clock: Any = time) -> None:
        super().__init__(inner, f"{inner.label}, emulated {link}")
        self.link, self._pacing, self.clock = link, link, clock
        self._free_at = 0.0
        self._queue: SimpleQueue[tuple[Future, float, Future] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="thinwire-paced-link", daemon=True)
        self._thread.start()

    def started(self, kind: Kind, message: Tensor, inner: InFlight) -> InFlight:
        seconds = self._pacing.seconds(kind, message.nbytes, self.world)
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
        super().close()
