"""Collectives: the interface, and a base for those that wrap another one.

A collective only carries bytes. ``all_reduce``, ``all_gather``, ``all_to_all`` and ``broadcast`` start it and return
an ``InFlight`` at once. No collective is ever started from the callback of another, since gloo runs callbacks in an
order that differs between ranks.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.gloo_p2p import Future
from thinwire.comm.link import Kind, Link, wire_bytes
from thinwire.comm.liveness import Lost
from thinwire.core.errors import ThinwireError


def in_future(tensor: Tensor) -> Future:
    """Make a future for a value on the device of ``tensor``; the caller completes it."""
    return torch.futures.Future[Any](devices=[tensor.device] if tensor.is_cuda else None)


TIMEOUT = 300.0
"""Seconds to wait for other ranks: longer than an evaluation on one rank usually takes, far below gloo's 30 minutes."""


class NoAnswer(RuntimeError):
    """Error: the network failed or a rank did not answer in time. No exchange is possible afterwards."""


@contextlib.contextmanager
def network(timeout: float) -> Generator[None]:
    """Turn every ``RuntimeError`` of the backend into a ``NoAnswer``."""
    try:
        yield
    except NoAnswer:
        raise
    except RuntimeError as error:
        text = str(error)
        waited = f"timed out after {timeout:g} s: " if "imed out" in text and "timed out after" not in text else ""
        raise NoAnswer(waited + text) from error


@dataclass(frozen=True)
class InFlight:
    """A collective in progress: ``result`` holds the answer once ``future`` has completed.

    All-reduce gives the sum, shaped like the message; all-gather uint8 ``[world, nbytes]``; all-to-all the same, with
    the row that each rank sent to this one; broadcast the source's message.
    """

    future: Future
    result: Tensor
    work: Any = None
    side_data: Tensor | None = None
    """A tensor that the stages before leave for the one after, or for whoever opens the answer."""
    columns: tuple[int, int] | None = None
    """The columns of this message, if several messages were sent as one."""
    then: "Callable[[], InFlight] | None" = None
    """Function that starts the next stage; never call it from a callback. Later calls return the same."""
    arrange: Callable[[Tensor], Tensor] | None = None
    """Function from the buffer of the last stage to the answer."""

    def answer(self) -> Tensor:
        """Return the result; call it after the last stage has ended."""
        result = self.result if self.arrange is None else self.arrange(self.result)
        return result if self.columns is None else result[:, slice(*self.columns)]

    def advance(self, timeout: float) -> "InFlight":
        """Wait for every stage but the last, and start the one that follows each."""
        if self.then is None:
            return self
        self._wait(timeout, False)
        return replace(self.then(), side_data=self.side_data, columns=self.columns).advance(timeout)

    def wait(self, timeout: float, *, on_host: bool = False) -> Tensor:
        """Wait for all stages, at most ``timeout`` seconds for each, and return the answer.

        A CUDA backend has a watchdog of its own instead, and the host does not wait for it unless ``on_host`` says so.
        A backend's error, or a rank that did not come in time, raises ``NoAnswer``.
        """
        last = self.advance(timeout)
        last._wait(timeout, on_host)
        return last.answer()

    def _wait(self, timeout: float, on_host: bool) -> None:
        with network(timeout):
            if self.work is not None and (on_host or not self.result.is_cuda):
                self.work.wait(timedelta(seconds=timeout))
            self.future.wait()


class RowCarrier(ABC):
    """Some ranks that exchange messages of bytes; routes of rows need no more of them."""

    rank: int
    world: int

    @abstractmethod
    def all_gather(self, message: Tensor) -> InFlight:
        """Collect the uint8 ``message`` of every rank; all have the same size."""

    @abstractmethod
    def all_to_all(self, message: Tensor) -> InFlight:
        """Row r of the uint8 ``message`` ``[world, nbytes]`` goes to rank r; all have the same size."""


class Carrier(RowCarrier):
    """Some ranks that exchange messages: all that a route may need of them."""

    @abstractmethod
    def all_reduce(self, message: Tensor) -> InFlight:
        """Sum ``message`` over the ranks; may happen in place."""

    @abstractmethod
    def broadcast(self, message: Tensor, source: int) -> InFlight:
        """The uint8 ``message`` ``[nbytes]`` of rank ``source`` to all; those of the others may be overwritten."""


class ControlChannel(ABC):
    """A control channel between ranks."""

    rank: int
    world: int
    status = ""
    """A few words for the other ranks, which read them after a failed exchange."""

    @property
    def everyone(self) -> "ControlChannel":
        """The control channel of all ranks of the model, one member per rank."""
        return self

    @abstractmethod
    def exchange_text(self, text: str, timeout: float | None = None) -> list[str]:
        """Return the texts of all ranks, for control. Blocks; its bytes are not counted in ``sent``.

        Without ``timeout``, in seconds, that of ``attach`` counts. A rank that is gone or late raises ``NoAnswer``, and
        one whose text is too long or is none a ``ThinwireError``.
        """

    @abstractmethod
    def lost(self) -> Lost:
        """Find out which ranks are lost after a failed exchange. No exchange is possible afterwards."""

    @abstractmethod
    def here(self) -> None:
        """Write to the store that this rank is alive."""

    @abstractmethod
    def leave(self, word: str) -> None:
        """Leave in the middle of an exchange: close the connections and leave ``word`` in the store for the others."""


class Collective(Carrier, ControlChannel):
    """A base that carries messages between workers. Here every rank is a worker and holds the whole model."""

    label: str
    link: Link | None = None
    """The speed of the link if it is emulated or assumed, else None."""
    local_ranks: int = 1
    """Number of local ranks: the ranks of one worker, each of which sends a part of its message."""
    _sent = 0.0

    @property
    def sent(self) -> float:
        """Bytes that this worker has sent."""
        return self._sent

    def _count(self, kind: Kind, message: Tensor) -> None:
        self._sent += wire_bytes(kind, message.nbytes, self.world)

    @property
    def sent_within_node(self) -> float:
        """Bytes that this rank has sent within the node."""
        return 0.0

    @property
    def checkpoint_group(self) -> "Collective":
        """The checkpoint group: the ranks that each have a row in a checkpoint."""
        return self

    @abstractmethod
    def rows(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        """Return a DTensor ``[world, *shape]``, this rank's ``tensor`` as a row; ``like`` tells how it is sharded."""

    def shared(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        """Return replicated state for a checkpoint, sharded like ``like``; without ``like``, one row for each shard."""
        return tensor

    def at(self, step: int) -> None:
        """Set this rank's step. Local ranks send it in every part, since only one part has the message header."""

    def apart(self) -> bool:
        """Return True if messages since ``at`` show that local ranks are at different steps; blocks."""
        return False

    def mean_within_node(self, gradients: Tensor, timeout: float) -> None:
        """Average over the local ranks in place; blocks."""

    def any_within_node(self, used: Sequence[bool], gradients: Tensor, timeout: float) -> list[bool]:
        """Return for each unit True if any local rank used it; blocks."""
        return list(used)

    def any_across_shards(self, flags: Sequence[bool], timeout: float) -> list[bool]:
        """Return, for each flag, True if it is set on any rank with another shard of the same model; blocks."""
        return list(flags)

    def norm_across_shards(self, norm: Tensor, timeout: float) -> Tensor:
        """Return the norm over all parts of the model, from that over this rank's; blocks."""
        return norm

    def hang_up(self) -> None:
        """Close all connections if the backend can, so that no exchange in progress keeps the process alive."""

    def close(self) -> None:
        """Stop threads; no collective may be started afterwards."""


class Wrapped(Collective):
    """A collective that forwards to another one, in which every rank is a worker; subclasses override what differs."""

    def __init__(self, inner: Collective, label: str) -> None:
        self.inner, self.label = inner, label
        self.rank, self.world, self.link = inner.rank, inner.world, inner.link

    @property
    def sent(self) -> float:
        return self.inner.sent

    @property
    def everyone(self) -> ControlChannel:
        return self.inner.everyone

    @property
    def checkpoint_group(self) -> Collective:
        return self.inner.checkpoint_group

    def all_reduce(self, message: Tensor) -> InFlight:
        return self.started("all_reduce", message, self.inner.all_reduce(message))

    def all_gather(self, message: Tensor) -> InFlight:
        return self.started("all_gather", message, self.inner.all_gather(message))

    def all_to_all(self, message: Tensor) -> InFlight:
        return self.started("all_to_all", message, self.inner.all_to_all(message))

    def broadcast(self, message: Tensor, source: int) -> InFlight:
        return self.started("broadcast", message, self.inner.broadcast(message, source))

    def started(self, kind: Kind, message: Tensor, inner: InFlight) -> InFlight:
        """Return the exchange of ``message`` that the wrapped collective has just started, perhaps changed."""
        return inner

    def exchange_text(self, text: str, timeout: float | None = None) -> list[str]:
        return self.inner.exchange_text(text, timeout)

    def rows(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        return self.inner.rows(tensor, like)

    def lost(self) -> Lost:
        return self.everyone.lost()

    def here(self) -> None:
        self.everyone.here()

    def leave(self, word: str) -> None:
        self.everyone.leave(word)

    def hang_up(self) -> None:
        self.inner.hang_up()

    def close(self) -> None:
        self.inner.close()


def exchange_failed(collective: Collective, step: int, names: Sequence[str], error: Exception) -> ThinwireError:
    """Make the error for a failed exchange of these units: it names the ranks that did not answer and the way out."""
    what = names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
    return failed(collective, f"step {step}: the exchange of {what}", error, "Restart from the last checkpoint")


def failed(channel: ControlChannel, what: str, error: Exception, way_out: str) -> ThinwireError:
    """Make the error for a failed collective call; its ``lost`` is what this rank knows of the others."""
    lost = channel.lost() if isinstance(error, NoAnswer) else Lost()
    made = ThinwireError(_text_of(channel, what, lost, error, way_out))
    made.lost = lost if isinstance(error, NoAnswer) else None
    return made


def _text_of(channel: ControlChannel, what: str, lost: Lost, error: Exception, way_out: str) -> str:
    if lost.raised:
        return f"{lost.raised}. {way_out}."
    reason = (str(error) or repr(error)).splitlines()[0].rstrip(".! ")
    return f"{what} failed on rank {channel.everyone.rank}{'; ' * bool(str(lost))}{lost}: {reason}. {way_out}."
