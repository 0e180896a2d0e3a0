"""Collectives of ``torch.distributed``, on any backend."""

import atexit
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from thinwire.comm import texts
from thinwire.comm.collectives import TIMEOUT, Collective, InFlight, network
from thinwire.comm.gloo_p2p import Direct, at_once, pays
from thinwire.comm.liveness import Liveness, Lost

# torch 2.13 renames all_gather_into_tensor to all_gather_single and warns at the old name.
_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_all_gather: Callable[..., Any] = getattr(dist, _name)


@atexit.register
def _let_go() -> None:
    """Give gloo's threads time to release the last tensors they hold.

    To release a tensor they take the GIL, and the main thread does not wait for them. During interpreter shutdown,
    taking the GIL ends the process in ``std::terminate``. This happens with any Python hook on gloo.
    """
    if ProcessGroup.used:
        time.sleep(0.05)


_twins: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def twin_of(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return another process group of the same ranks, made once. A collective call of these ranks.

    What is in flight there does not hold up the user's own collectives. It is never destroyed here: a group of the same
    name would find stale addresses in the store.
    """
    for one in [one for one, made in _twins.items() if not (_lives(one) and _lives(made))]:
        del _twins[one]
    if group not in _twins:
        ranks, name = dist.get_process_group_ranks(group), dist.get_backend(group)
        backend = name if dist.is_backend_available(name) else dist.get_backend_config(group)  # several by device
        made = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
        _twins[group] = cast(dist.ProcessGroup, made)
    return _twins[group]


def _lives(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_backend(group)
    except ValueError:
        return False
    return True


class ProcessGroup(Collective):
    """Collectives of ``torch.distributed``, on any backend."""

    used: ClassVar[bool] = False
    _mesh: DeviceMesh | None = None

    def __init__(self, group: dist.ProcessGroup, timeout: float = TIMEOUT) -> None:
        ProcessGroup.used = True
        self.group, self.timeout = group, timeout
        self.label = dist.get_backend(group)
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self._direct = Direct(group)
        self._liveness = Liveness(group, self.rank, self.world)

    def all_reduce(self, message: Tensor) -> InFlight:
        work = cast(Any, dist.all_reduce(message, group=self.group, async_op=True))
        self._count("all_reduce", message)
        return InFlight(work.get_future(), message, work)

    def all_gather(self, message: Tensor) -> InFlight:
        self._count("all_gather", message)
        if pays(self.group, message):
            return self._straight([message] * self.world, message.new_empty(self.world, message.numel()))
        return self._all_gather(message)

    def _all_gather(self, message: Tensor) -> InFlight:
        gathered = message.new_empty(self.world, message.numel())
        if at_once(self.group, message):
            return self._all_to_all(torch.cat([message] * self.world), gathered)
        work = _all_gather(gathered.view(-1), message, group=self.group, async_op=True)
        return InFlight(work.get_future(), gathered, work)

    def all_to_all(self, message: Tensor) -> InFlight:
        self._count("all_to_all", message)
        received = torch.empty_like(message)
        if pays(self.group, message[0]):
            return self._straight(message.unbind(), received)
        return self._all_to_all(message.view(-1), received)

    def _all_to_all(self, rows: Tensor, received: Tensor) -> InFlight:
        work = cast(Any, dist.all_to_all_single(received.view(-1), rows, group=self.group, async_op=True))
        return InFlight(work.get_future(), received, work)

    def _straight(self, rows: Sequence[Tensor], received: Tensor) -> InFlight:
        sent = self._direct.start(rows, received)
        return InFlight(sent.future, received, sent)

    def broadcast(self, message: Tensor, source: int) -> InFlight:
        root = dist.get_global_rank(self.group, source)
        work = cast(Any, dist.broadcast(message, root, group=self.group, async_op=True))
        self._count("broadcast", message)
        return InFlight(work.get_future(), message, work)

    def exchange_text(self, text: str, timeout: float | None = None) -> list[str]:
        wait = self.timeout if timeout is None else timeout
        said = texts.exchange(text, partial(self._gather_bytes, timeout=wait))
        self._liveness.forget()
        return said

    def _gather_bytes(self, mine: bytes, timeout: float) -> list[bytes]:
        config = dist.get_backend_config(self.group)  # e.g. "cpu:gloo,cuda:nccl"
        device = "cpu" if "cpu:" in config else config.partition(":")[0]
        message = torch.from_numpy(np.frombuffer(mine, np.uint8).copy()).to(device)
        with network(timeout):
            started = self._all_gather(message)
        return [row.tobytes() for row in started.wait(timeout, on_host=True).cpu().numpy()]

    def rows(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.group, tensor.device.type)
        return DTensor.from_local(tensor.unsqueeze(0).contiguous(), self._mesh, [Shard(0)], run_check=False)

    def here(self) -> None:
        self._liveness.here(self.status)

    def lost(self) -> Lost:
        found = self._liveness.lost(self.status)
        self.hang_up()
        return found

    def hang_up(self) -> None:
        self._direct.hang_up()

    def leave(self, word: str) -> None:
        self._liveness.leave_word(word)
        self.hang_up()

    def close(self) -> None:
        self._direct.close()
