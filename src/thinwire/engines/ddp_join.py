"""DDP's ``join()``: a rank that has run out of data shadows the exchanges of those that have not.

What was observed of it and shaped this:

* DDP calls the hook on such a rank with buckets of zeros, outside of any backward pass, and drops what comes back.
* It gives all ranks the last one's parameters in the end, but not the state of its optimizer.

So such a rank takes the step that the others take, with what they got: the session's step clock is the same on all
ranks, and so are the parameters and the optimizer's state, as long as nothing but the optimizer has a part in a step.
What the loop of the others does beside it, a scheduler or ``clip_grad_norm_`` every step, this rank can't know of: its
parameters part until DDP replaces them, so nobody compares them until then, and its optimizer's state stays its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import ref

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.collectives import Future
from thinwire.core.errors import ThinwireError
from thinwire.exchange.status import unused
from thinwire.session.backward import in_backward
from thinwire.session.momentum_transfer import warn_once
from thinwire.session.session import Session


class Joined:
    """The steps of one model that this rank takes without data."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = ref(ddp)
        self._exchanged: list[tuple[Sequence[tuple[Tensor, Tensor]], Future]] = []
        self._told = False

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
            ThinwireError: as ``allow``.
        """
        if self.active:
            self.allow(session, getattr(self._ddp(), "_divide_by_initial_world_size", True))

    def allow(self, session: Session, divide_by_initial_world_size: bool) -> None:
        """Say before ``join()`` begins what it can't do.

        Raises:
            ThinwireError: the scaler, or what ``join()`` was given, can't go on without a rank.
        """
        if not divide_by_initial_world_size:
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
        idle = {id(unit.param) for unit in session.units if unit.name in unused(session.transaction.statuses)}
        for pairs, done in exchanged:
            done.wait()
            for param, grad in pairs:
                param.grad = None if id(param) in idle else grad
        session.optimizer.step()
        for param, _ in (pair for pairs, _ in exchanged for pair in pairs):
            param.grad = None

    def tell(self, session: Session) -> None:
        """Say once that ranks which have joined step otherwise than the others, where a look at them has shown it."""
        strays = session.replicas.strays if session.replicas is not None else ()
        if not strays or self._told:
            return
        self._told = True
        text = (
            f"step {session.step}: ddp.join(): {', '.join(f'rank {rank}' for rank in strays)} has joined and steps "
            "otherwise than the others, whose loop schedules, clips or changes what the optimizer does. DDP gives it "
            "their parameters at the end of join(), not the state of their optimizer or scheduler: to train on after "
            "that, load those of one rank on all"
        )
        session.ledger.note(text)
        warn_once(text)


class Entry:
    """Stands in for ``ddp.join``: what it can't do is said on entry, by all ranks.

    Later a rank without a batch would wait in it for those that refuse to begin a step.
    """

    def __init__(self, ddp: DistributedDataParallel, joined: Joined, session: Session) -> None:
        self._ddp, self._joined, self._session = ref(ddp), joined, ref(session)

    @classmethod
    def install(cls, ddp: DistributedDataParallel, joined: Joined, session: Session) -> Callable[[], object]:
        """Put one in place; call what this returns to take it away."""
        mine = cls(ddp, joined, session)
        vars(ddp)["join"] = mine
        return mine.remove

    def remove(self) -> None:
        """Take it away."""
        if (ddp := self._ddp()) is not None:
            vars(ddp).pop("join", None)

    def __call__(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Any:
        """Do what DDP's own does."""
        if enable and (session := self._session()) is not None:
            self._joined.allow(session, divide_by_initial_world_size)
        ddp: Any = self._ddp()
        return cast(Any, type(ddp)).join(ddp, divide_by_initial_world_size, enable, throw_on_early_termination)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model has its own ``join`` in its place."""
        return getattr, (self._ddp(), "join")
