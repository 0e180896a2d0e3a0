"""The compressed reduce-scatter of one ``fully_shard`` module; ``exchange/reduce_scatter.py`` has what it does."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.coding import header
from thinwire.comm.process_group import ProcessGroup
from thinwire.core.ambient import undisturbed
from thinwire.core.context import Context
from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import own
from thinwire.exchange.routes.reduce_scatter import reduce_scatter
from thinwire.exchange.units import TwoCopies
from thinwire.methods.method import Rule
from thinwire.session.session import Session

# torch 2.13 renames reduce_scatter_tensor and warns at the old name.
_name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
_native: Callable[..., Any] = getattr(dist, _name)


class Passes(Protocol):
    """What a reduce-scatter needs of the hooks of its model."""

    session: Session | None
    shards: ProcessGroup

    def begin(self, session: Session) -> None: ...
    def count(self, session: Session, elements: int, sent: float) -> None: ...


class Scatter:
    """The reduce-scatter of one module, in the form that ``set_custom_reduce_scatter`` wants."""

    def __init__(self, shards: Passes, name: str, rule: Rule) -> None:
        self.shards, self.name, self.rule = shards, name, rule
        self.states: list[TwoCopies] = []
        self.written: int | None = None  # the step for which the next states are
        self.found: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @undisturbed
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        session = self.shards.session
        if session is None:
            return _native(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        if op != dist.ReduceOp.SUM:
            raise ThinwireError(f"the reduce-scatter is asked for {op}; leave set_force_sum_reduction_for_comms(True)")
        self.shards.begin(session)
        along = self.shards.shards
        rows = own(input_tensor).view(along.world, -1)
        pairs = [(state.now, state.next) for state in self._states(session, rows)]
        before = along.sent
        reduce_scatter(
            rows, own(output_tensor), self.rule.compressor, self.rule.memory, pairs, along,
            lambda sender, receiver: self._context(session, sender, receiver),
            1.0 / session.loss_scale if self.rule.memory.stateful else 1.0, session.timeout,
        )  # fmt: skip
        self.shards.count(session, rows.numel(), along.sent - before)
        return None

    def _context(self, session: Session, sender: int, receiver: int) -> Context:
        rank = session.collective.rank * self.shards.shards.world + sender
        return Context(
            session.seed, session.step, f"reduce-scatter of {self.name}[{receiver}]", rank,
            saturates=1.0 if self.rule.memory.feeds_back else 0.0,
        )  # fmt: skip

    def _states(self, session: Session, rows: Tensor) -> list[TwoCopies]:
        memory = self.rule.memory
        if not memory.stateful:
            return [TwoCopies()] * len(rows)
        if self.written == session.step:
            raise ThinwireError(
                f"{self.name or 'the model'} was reduced twice in a step, of which a residual can follow one only; use "
                "reduce_scatter= a compressor without a memory"
            )
        if not self.states:
            blank = torch.empty_like(rows[0], dtype=memory.dtype(rows.dtype))
            mine = self.shards.shards.rank
            self.states = [TwoCopies() if r == mine else TwoCopies.of(memory.init(blank)) for r in range(len(rows))]
        self.written = session.step
        self.found = header.is_bad(rows)
        return self.states

    def settle(self, step: int) -> None:
        """A new step: what the last one wrote is final if the session has gone on."""
        if self.written is not None and self.written < step:
            for state in self.states:
                state.commit()
        self.written = None

    def bad(self) -> bool | None:
        """Whether something that is remembered was not finite; None where nothing is."""
        found, self.found = self.found, None
        return None if found is None else bool(found)
