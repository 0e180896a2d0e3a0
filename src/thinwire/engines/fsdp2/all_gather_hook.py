"""The compressed parameter all-gather of one ``fully_shard`` module.

Every rank, including the sender, uses the decoded values, so all ranks have the same weights. The forward and backward
pass of a step gather the same values, because random rounding depends on the step. The optimizer has exact shards.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.comm.link import wire_bytes
from thinwire.comm.process_group import ProcessGroup
from thinwire.core.ambient import undisturbed
from thinwire.core.interfaces import Compressor
from thinwire.exchange.pipeline import exchange
from thinwire.exchange.routes.rows import gathered
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.workers import Worker
from thinwire.session.session import Session

# torch 2.13 renames all_gather_into_tensor and warns at the old name.
_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_native: Callable[..., Any] = getattr(dist, _name)


class Passes(Protocol):
    """The part of a model's hooks that an all-gather uses."""

    session: Session | None
    shards: ProcessGroup

    def gathered(self, elements: int, sent: float, world: int) -> None: ...


class Gather:
    """The all-gather of one module, with the interface of ``set_custom_all_gather``."""

    def __init__(self, shards: Passes, name: str, compressor: Compressor) -> None:
        self.shards, self.name, self.compressor = shards, name, compressor

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @undisturbed
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        session = self.shards.session
        if session is None or not input_tensor.is_floating_point():  # bytes, if a module mixes dtypes
            return _native(output_tensor, input_tensor, group=group, async_op=async_op)
        along = self.shards.shards
        if (world := group.size()) != along.world:  # reshard_after_forward=<int>: these values are already rounded
            sent = wire_bytes("all_gather", input_tensor.nbytes, world)
            self.shards.gathered(input_tensor.numel(), sent, world)
            return _native(output_tensor, input_tensor, group=group, async_op=async_op)
        first, before = session.collective.rank * along.world, along.sent
        name = f"all-gather of {self.name}"
        bucket = gathered(name, self.compressor, input_tensor, along.rank, first)
        worker = Worker(first + along.rank, session.seed, {name: TwoCopies()})
        exchange(bucket, [input_tensor], [output_tensor], worker, session.step, along, session.timeout)
        self.shards.gathered(input_tensor.numel(), along.sent - before, along.world)
        return None
