"""DDP's ``join()``: a rank that has run out of data shadows the exchanges of those that have not.

What was observed of it and shaped this:

* DDP calls the hook on such a rank with buckets of zeros, outside of any backward pass, and drops what comes back.
* It gives all ranks the last one's parameters in the end, but not the state of its optimizer.

So such a rank takes the step that the others take, with what they got: the session's step clock, the optimizer's state
and the parameters stay the same on all ranks, as without ``join()``.
"""

from collections.abc import Sequence
from typing import Any
from weakref import ref

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from thinwire.backward import in_backward
from thinwire.exchange.collectives import Future
from thinwire.session import Session
from thinwire.tensors import ThinwireError


class Joined:
    """The steps of one model that this rank takes without data."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = ref(ddp)
        self._exchanged: list[tuple[Sequence[tuple[Tensor, Tensor]], Future]] = []

    @property
    def active(self) -> bool:
        """Whether the model is inside ``with ddp.join():``."""
        config: Any = getattr(self._ddp(), "_join_config", None)
        return bool(getattr(config, "enable", False))

    @property
    def shadows(self) -> bool:
        """Whether the bucket at hand is one of zeros, since this rank has joined."""
        return self.active and not in_backward()

    def check(self, session: Session) -> None:
        """Before a step.

        Raises:
            ThinwireError: the method, or what ``join()`` was given, can't go on without a rank.
        """
        if not self.active:
            return
        if not getattr(self._ddp(), "_divide_by_initial_world_size", True):
            raise ThinwireError(
                "ddp.join(divide_by_initial_world_size=False) divides by the ranks that still have data; thinwire "
                "divides by all of them: leave it at True"
            )
        if session.scaler is not None and session.scaler.is_enabled():
            raise ThinwireError(
                "ddp.join() with attach(scaler=): the scale of a rank that has joined would stand still; give all "
                "ranks as many batches (DistributedSampler(drop_last=True)), or train in bfloat16 without a scaler"
            )

    def take(self, pairs: Sequence[tuple[Tensor, Tensor]], done: Future) -> None:
        """Keep the parameters of a bucket and what will stand in their gradients."""
        self._exchanged.append((pairs, done))

    def follow(self, session: Session) -> None:
        """All buckets are there: step as the others do, who have data."""
        exchanged, self._exchanged = self._exchanged, []
        if session.optimizer is None:  # then the session has gone on by itself
            return
        verdicts = session.transaction.verdicts
        unused = {id(v.units[i].param) for v in verdicts for i in v.used.any(0).logical_not().nonzero().flatten()}
        for pairs, done in exchanged:
            done.wait()
            for param, grad in pairs:
                param.grad = None if id(param) in unused else grad
        session.optimizer.step()
        for param, _ in (pair for pairs, _ in exchanged for pair in pairs):
            param.grad = None
