"""torchft: a process group whose all-reduce is compressed, for a ``Manager``.

Facts about torchft that shaped this file:

* Its DDP uses the only comm hook. The hook calls the manager, which calls ``allreduce`` of its process group for each
  bucket. The process group sees neither parameters nor steps, the participating replicas change from step to step,
  and a failed step is discarded. So no state can be kept between steps, and the compressor must not need a memory.
* The manager divides the sum by the number of participating replicas; the others send zeros.
* Votes, checkpoints and the state of a joining replica use other channels. So only gradients are compressed, and with
  ``LocalSGD`` the parameters that it averages.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.functional import pad

from thinwire import Compressor, Rule, ThinwireError
from thinwire.comm.collectives import TIMEOUT, Future, InFlight, RowCarrier, in_future
from thinwire.comm.link import wire_bytes
from thinwire.core import flat, registry
from thinwire.core.ambient import undisturbed
from thinwire.exchange.pipeline import exchange
from thinwire.exchange.routes.rows import check_flat, payload_bytes, reduced
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.workers import Worker
from thinwire.integrations.frameworks import framework
from thinwire.memories.error_feedback import NoMemory

framework("torchft", "torchft", "0.2")
from torchft.process_group import ProcessGroupWrapper  # noqa: E402


class CompressedProcessGroup(ProcessGroupWrapper):
    """A process group that compresses the all-reduce of large floating-point tensors and passes all else on.

    Every replica owns an equal part of the tensor. It sums in float32 what the others sent of this part, and sends the
    sum compressed again. All replicas use the decompressed sums, so they stay bit-equal.

    Args:
        group: the process group of torchft that carries the bytes, e.g. ``ProcessGroupGloo()``.
        compressor: one that needs no memory, e.g. ``Quantize(8, rounding="stochastic")``. It must be the same on all
            replicas, which is checked whenever they change.
        least: bytes; smaller tensors are sent uncompressed.
        seed: seed of the random rounding.
        timeout: the most seconds for each of the two exchanges; the group's own timeout applies if it is shorter, and
            always on CUDA.

    Raises:
        ThinwireError: the compressor is biased, remembers, needs matrices, or is not registered.

    **Wire**: ``2 (N-1) / N`` payloads of a tensor; 8 bits take 0.26 of float32's bytes.

    Example::

        group = CompressedProcessGroup(ProcessGroupGloo(), thinwire.compressors.Quantize(8, rounding="stochastic"))
        manager = torchft.Manager(pg=group, ...)
    """

    def __init__(
        self, group: Any, compressor: Compressor, *, least: int = 4096, seed: int = 0, timeout: float = TIMEOUT
    ) -> None:
        check_flat("compressor", "buckets that a process group is given are flat", compressor)
        Rule(compressor, NoMemory())  # refuses a biased compressor
        super().__init__(pg=group)
        self.compressor, self.least, self.seed, self.patience = compressor, least, seed, timeout
        self._said = json.dumps([registry.to_json(compressor), least, seed], sort_keys=True)
        self.wire_bytes = 0.0
        """Bytes that this replica has sent for all-reduces."""
        self.dense_bytes = 0.0
        """Bytes that this replica would have sent without compression."""
        self.calls = 0

    @property
    def calls(self) -> int:
        """Number of compressed all-reduces; it seeds all randomness. If you set it, set it alike on all replicas."""
        return self._calls

    @calls.setter
    def calls(self, calls: int) -> None:
        self._calls, self._agreed = calls, False

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        adds = getattr(opts, "reduceOp", opts) == dist.ReduceOp.SUM
        if self.size() == 1 or not adds or not all(map(self._compresses, tensors)):
            return self._plain(super().allreduce, tensors, opts)
        carrier = _Carrier(cast(int, self._rank), self.size(), self.parent)
        self.dense_bytes += self._dense(tensors)
        try:
            if not self._agreed:
                self._agree(carrier, tensors[0].device)
            for x in tensors:
                self._calls += 1
                self._all_reduce(x, carrier)
        finally:  # also what was in vain
            self.wire_bytes += carrier.sent
        return _Done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any) -> Any:
        return self._plain(super().allreduce_coalesced, tensors, opts)

    def configure(self, *args: Any, **kwargs: Any) -> None:
        """Reconfigure; torchft 0.2 calls this when the replicas change."""
        self._agreed = False
        super().configure(*args, **kwargs)

    def reconfigure(self, *args: Any, **kwargs: Any) -> Any:
        """Reconfigure; later versions of torchft call this."""
        self._agreed = False
        return cast(Any, super()).reconfigure(*args, **kwargs)

    def getBackendName(self) -> str:
        return f"thinwire-{super().getBackendName()}"

    def errored(self) -> Exception | None:
        return cast(Any, self.parent).errored()  # NCCL reports here that a sum is invalid

    def abort(self, errored: bool = True) -> None:
        self.parent.abort()

    def shutdown(self) -> None:
        self.parent.shutdown()

    def _plain(self, start: Callable[..., Any], tensors: list[Tensor], opts: Any) -> Any:
        self.wire_bytes += (dense := self._dense(tensors))
        self.dense_bytes += dense
        return start(tensors, opts)

    def _dense(self, tensors: list[Tensor]) -> float:
        return sum(wire_bytes("all_reduce", x.nbytes, self.size()) for x in tensors)

    @undisturbed
    def _all_reduce(self, x: Tensor, carrier: "_Carrier") -> None:
        """Sum ``x`` over the ranks in place, the same bits on each; after an error it may be anything."""
        width = -(-x.numel() // carrier.world)
        short = width * carrier.world - x.numel()
        rows = (pad(flat(x), (0, short)) if short else flat(x)).view(carrier.world, width)
        bucket = reduced("all-reduce", self.compressor, NoMemory(), rows, carrier.rank, 0, to_all=True)
        worker = Worker(carrier.rank, self.seed, {"all-reduce": TwoCopies()})
        exchange(bucket, [rows], [rows], worker, self.calls, carrier, self.patience)
        if short:
            flat(x).copy_(rows.view(-1)[: x.numel()])

    def _compresses(self, x: Tensor) -> bool:
        if not (x.is_floating_point() and x.is_contiguous() and x.nbytes >= max(self.least, 1)):
            return False
        return payload_bytes(self.compressor, x, self.size()) < x.nbytes

    def _agree(self, carrier: "_Carrier", device: torch.device) -> None:
        """Check that all new replicas have the same arguments, and set ``calls`` to their largest."""
        mine = torch.tensor([crc32(self._said.encode()), self.calls], device=device)
        heard = carrier.all_gather(mine.view(torch.uint8))
        theirs = heard.wait(self.patience).view(torch.int64).cpu()
        if not (theirs[:, 0] == theirs[carrier.rank, 0]).all():
            others = [rank for rank, one in enumerate(theirs[:, 0]) if one != theirs[carrier.rank, 0]]
            raise ThinwireError(
                f"this replica has {self._said} (compressor, least, seed), and the replicas of rank {others} something "
                "else; give all CompressedProcessGroups the same arguments"
            )
        self._calls = int(theirs[:, 1].max())
        self._agreed = True


class _Carrier(RowCarrier):
    """The collectives of an exchange, over a process group that ``torch.distributed`` does not know."""

    def __init__(self, rank: int, world: int, group: Any) -> None:
        self.rank, self.world, self.group = rank, world, group
        self.sent = 0.0

    def all_to_all(self, message: Tensor) -> InFlight:
        received = torch.empty_like(message)
        work = self.group.alltoall_base(received, message, [], [], dist.AllToAllOptions())
        self.sent += wire_bytes("all_to_all", message.nbytes, self.world)
        return InFlight(work.get_future(), received, work)

    def all_gather(self, message: Tensor) -> InFlight:
        gathered = message.new_empty(self.world, message.numel())
        work = self.group.allgather([list(gathered)], [message], AllgatherOptions())
        self.sent += wire_bytes("all_gather", message.nbytes, self.world)
        return InFlight(work.get_future(), gathered, work)


class _Done(dist.Work):
    """A completed work."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.future: Future = in_future(tensors[0])
        self.future.set_result(tensors)

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def get_future(self) -> Future:
        return self.future

    def block_current_stream(self) -> None:
        pass
