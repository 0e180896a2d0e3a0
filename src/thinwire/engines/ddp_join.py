"""DDP's ``join()``: a rank that has run out of data shadows the exchanges of the other ranks.

Behaviour of DDP that this code depends on:

* DDP calls the hook on such a rank with buckets of zeros, outside of any backward pass, and ignores the result.
* In the end, it gives all ranks the parameters of the last one, but not the state of its optimizer.

So a joined rank takes each step that the others take, with the same gradients. The step clock, the parameters and the
optimizer state stay equal on all ranks, if nothing but the optimizer takes part in a step. A joined rank does not see
what the other ranks' loop does in addition, such as a scheduler or ``clip_grad_norm_``. Its parameters then differ, and
are not compared, until DDP replaces them; its optimizer state stays different.
"""

from collections.abc import Sequence
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
    """The steps of one model that this rank takes without data.

    It takes the place of ``ddp.join``, to check the arguments on entry, on all ranks. An error later, at the start of a
    step, would leave a rank without data waiting for the others.
    """

    def __init__(self, ddp: DistributedDataParallel, session: Session) -> None:
        self._ddp, self._session = ref(ddp), ref(session)
        self.exchanged: list[tuple[Sequence[tuple[Tensor, Tensor]], Future]] = []
        """The parameters of each bucket with the tensors that will hold their gradients."""
        self._warned = False
        vars(ddp)["join"] = self
        session.cleanup.callback(self._remove)

    def _remove(self) -> None:
        if (ddp := self._ddp()) is not None:
            vars(ddp).pop("join", None)

    def __call__(
        self, divide_by_initial_world_size: bool = True, enable: bool = True, throw_on_early_termination: bool = False
    ) -> Any:
        """Check the arguments, then call DDP's own ``join``."""
        if enable and (session := self._session()) is not None:
            self.allow(session, divide_by_initial_world_size)
        ddp: Any = self._ddp()
        return cast(Any, type(ddp)).join(ddp, divide_by_initial_world_size, enable, throw_on_early_termination)

    def __reduce__(self) -> tuple[Any, ...]:
        """Replace this object in a copied or pickled model by DDP's own ``join``."""
        return getattr, (self._ddp(), "join")

    @property
    def active(self) -> bool:
        """True inside ``with ddp.join():``."""
        config: Any = getattr(self._ddp(), "_join_config", None)
        return bool(getattr(config, "enable", False))

    @property
    def shadows(self) -> bool:
        """True if the current bucket holds zeros, because this rank has joined."""
        return self.active and not in_backward()

    def check(self, session: Session) -> None:
        """Check the options of an active ``join()`` before a step, as ``allow`` does."""
        if self.active:
            self.allow(session, getattr(self._ddp(), "_divide_by_initial_world_size", True))

    def allow(self, session: Session, divide_by_initial_world_size: bool) -> None:
        """Raise an error if the session does not support this ``join()``."""
        if not divide_by_initial_world_size:
            raise ThinwireError(
                "ddp.join(divide_by_initial_world_size=False) divides by the ranks that still have data; thinwire "
                "divides by all of them: leave it at True"
            )
        if session.rounds.scaled:
            raise ThinwireError(
                "ddp.join() with attach(scaler=): the scale of a rank that has joined would stand still; give all "
                "ranks as many batches (DistributedSampler(drop_last=True)), or train in bfloat16 without a scaler"
            )

    def follow(self, session: Session) -> None:
        """After the last bucket, step the optimizer as the ranks with data do."""
        exchanged, self.exchanged = self.exchanged, []
        if session.optimizer is None:  # then the session commits by itself
            return
        names = unused(session.transaction.statuses)
        idle = {id(unit.param) for unit in session.units if unit.name in names}
        for pairs, done in exchanged:
            done.wait()
            for param, grad in pairs:
                param.grad = None if id(param) in idle else grad
        session.optimizer.step()
        for pairs, _ in exchanged:
            for param, _ in pairs:
                param.grad = None

    def warn_of_strays(self, session: Session) -> None:
        """Warn once if the check of replicas has found that joined ranks step differently from the others."""
        strays = session.replicas.strays if session.replicas is not None else ()
        if not strays or self._warned:
            return
        self._warned = True
        text = (
            f"step {session.step}: ddp.join(): {', '.join(f'rank {rank}' for rank in strays)} has joined and steps "
            "otherwise than the others, whose loop schedules, clips or changes what the optimizer does. DDP gives it "
            "their parameters at the end of join(), not the state of their optimizer or scheduler: to train on after "
            "that, load those of one rank on all"
        )
        session.ledger.note(text)
        warn_once(text)
