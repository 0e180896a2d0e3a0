"""The compressed reduce-scatter and parameter all-gather of a ``fully_shard`` module; ``rows.py`` has their routes.

Of gathered parameters every rank, including the sender, uses the decoded values, so all ranks have the same weights.
The forward and backward pass of a step gather the same values, because random rounding depends on the step. The
optimizer has exact shards.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.coding import header
from thinwire.comm.link import wire_bytes
from thinwire.core.ambient import undisturbed
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor, local_state
from thinwire.core.sharding import own
from thinwire.exchange.pipeline import exchange
from thinwire.exchange.routes.rows import gathered, reduced
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.workers import Worker
from thinwire.methods.method import Rule

if TYPE_CHECKING:
    from thinwire.engines.fsdp2.shards import Shards

_dist: Any = dist  # torch 2.13 renames both, and warns at the old name
_reduce_scatter: Any = getattr(_dist, "reduce_scatter_single", None) or _dist.reduce_scatter_tensor
_all_gather: Any = getattr(_dist, "all_gather_single", None) or _dist.all_gather_into_tensor


class Custom:
    """A collective of one module that FSDP2 calls in place of its own."""

    def __init__(self, shards: "Shards", module: str) -> None:
        self.shards, self.module = shards, module

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(Custom):
    """The all-gather, with the interface of ``set_custom_all_gather``."""

    def __init__(self, shards: "Shards", module: str, compressor: Compressor) -> None:
        super().__init__(shards, module)
        self.compressor = compressor

    @undisturbed
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        session = self.shards.session
        if session is None or not input_tensor.is_floating_point():  # bytes, if a module mixes dtypes
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        along = self.shards.shards
        if (world := group.size()) != along.world:  # reshard_after_forward=<int>: these values are already rounded
            sent = wire_bytes("all_gather", input_tensor.nbytes, world)
            self.shards.gathered(input_tensor.numel(), sent, world)
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        first, before = session.collective.rank * along.world, along.sent
        name = f"all-gather of {self.module}"
        bucket = gathered(name, self.compressor, input_tensor, along.rank, first)
        worker = Worker(first + along.rank, session.seed, {name: TwoCopies()})
        exchange(bucket, [input_tensor], [output_tensor], worker, session.step, along, session.timeout)
        self.shards.gathered(input_tensor.numel(), along.sent - before, along.world)
        return None


class Scatter(Custom):
    """The reduce-scatter, with the interface of ``set_custom_reduce_scatter``."""

    def __init__(self, shards: "Shards", module: str, rule: Rule) -> None:
        super().__init__(shards, module)
        self.rule, self.name = rule, f"reduce-scatter of {module}"
        self.worker: Worker | None = None
        self.written = False
        """True if the next states are those of the current step."""
        self.found: Tensor | None = None

    @undisturbed
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        session = self.shards.session
        if session is None:
            return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        if op != dist.ReduceOp.SUM:
            raise ThinwireError(f"the reduce-scatter is asked for {op}; leave set_force_sum_reduction_for_comms(True)")
        self.shards.begin(session)
        along, memory = self.shards.shards, self.rule.memory
        rows, before = own(input_tensor).view(along.world, -1), along.sent
        first = session.collective.rank * along.world
        if self.worker is None:
            blank = torch.empty_like(rows[1:].reshape(-1), dtype=memory.dtype(rows.dtype))  # none for its own row
            states = {self.name: TwoCopies.of(local_state(memory, blank))}
            self.worker = Worker(first + along.rank, session.seed, states, kernels=session.workers[0].kernels)
        if memory.stateful:
            if self.written:
                raise ThinwireError(
                    f"{self.module or 'the model'} was reduced twice in a step, of which a residual can follow one "
                    "only; use reduce_scatter= a compressor without a memory"
                )
            self.written, self.found = True, header.is_nonfinite(rows)
        scale = session.loss_scale if memory.stateful else 1.0
        bucket = reduced(self.name, self.rule.compressor, memory, rows, along.rank, first, scale)
        exchange(
            bucket, [rows.view(-1)], [own(output_tensor)], self.worker, session.step, along, session.timeout,
            session.loss_scale,
        )  # fmt: skip
        self.shards.count(session, rows.numel(), along.sent - before)
        return None

    def commit(self) -> None:
        """Commit the states of the step after the optimizer has stepped."""
        if self.written and self.worker is not None:
            self.worker.local[self.name].commit()
        self.written = False

    def nonfinite(self) -> bool | None:
        """Return True if a gradient was nonfinite before it was reduced; None without a memory."""
        found, self.found = self.found, None
        return None if found is None else bool(found)
