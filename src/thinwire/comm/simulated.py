"""Collectives of the simulator: N workers in one process that take turns in rank order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.collectives import Collective, Future, InFlight
from thinwire.comm.link import Link
from thinwire.comm.liveness import Lost
from thinwire.core.errors import ThinwireError

ASSUMED = Link(1e9, 1e-4)
"""The link of a simulation, for methods whose route depends on the link."""


@dataclass
class _Meeting:
    """One collective of the simulator, until its last worker has joined; all workers share the result."""

    result: Tensor
    messages: list[Tensor] = field(default_factory=list[Tensor])
    waiting: list[Future] = field(default_factory=list[Future])


class Local(Collective):
    """The collectives of one worker of N in one process; the workers call them in rank order.

    Sums are taken in rank order, so they are bit-equal to any real exchange that gathers, and to a real all-reduce
    of two workers. All workers get the same result tensor and must not write to it.
    """

    label = "simulated"
    link = ASSUMED

    def __init__(self, rank: int, world: int, meetings: dict[int, _Meeting]) -> None:
        self.rank, self.world = rank, world
        self._meetings = meetings  # the n-th collective of each worker belongs to the n-th of all others
        self._started = 0

    @staticmethod
    def of(world: int) -> "list[Local]":
        """Make the collectives of ``world`` workers, one for each rank."""
        meetings: dict[int, _Meeting] = {}
        return [Local(rank, world, meetings) for rank in range(world)]

    def all_reduce(self, message: Tensor) -> InFlight:
        self._count("all_reduce", message)
        return self._meet(message, message.shape, _sum_in_order)

    def all_gather(self, message: Tensor) -> InFlight:
        self._count("all_gather", message)
        return self._meet(message, (self.world, message.numel()), _stack)

    def all_to_all(self, message: Tensor) -> InFlight:
        self._count("all_to_all", message)
        met = self._meet(message, (self.world, *message.shape), _stack)
        return replace(met, result=met.result[:, self.rank])

    def broadcast(self, message: Tensor, source: int) -> InFlight:
        self._count("broadcast", message)
        return self._meet(message, message.shape, lambda messages, out: out.copy_(messages[source]))

    def _meet(
        self, message: Tensor, shape: Sequence[int], combine: Callable[[list[Tensor], Tensor], object]
    ) -> InFlight:
        if self.rank == 0:
            self._meetings[self._started] = _Meeting(message.new_empty(*shape))
        meeting = self._meetings.get(self._started)
        if meeting is None or len(meeting.messages) != self.rank:
            raise ThinwireError(f"worker {self.rank} of a simulation speaks out of turn; they go in rank order")
        future, result = torch.futures.Future[Any](), meeting.result
        meeting.messages.append(message)
        meeting.waiting.append(future)
        if len(meeting.messages) == self.world:
            combine(meeting.messages, result)
            del self._meetings[self._started]
            for done in meeting.waiting:
                done.set_result(None)
        self._started += 1
        return InFlight(future, result)

    def exchange_text(self, text: str, timeout: float | None = None) -> list[str]:
        return [text] * self.world

    def rows(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        raise ThinwireError("a simulation has no checkpoints; save the model")

    def lost(self) -> Lost:
        return Lost()

    def here(self) -> None:
        pass

    def leave(self, word: str) -> None:
        pass


def _sum_in_order(messages: list[Tensor], out: Tensor) -> None:
    out.copy_(messages[0])
    for message in messages[1:]:
        out.add_(message)


def _stack(messages: list[Tensor], out: Tensor) -> None:
    torch.stack(messages, out=out)
