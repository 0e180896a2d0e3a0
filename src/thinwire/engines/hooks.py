"""The base of a model's hooks: the checks around its exchanges, and the begin and the end of one.

``ddp_hook.py`` gets whole buckets from DDP; ``grad_hooks.py`` gets single gradients from autograd.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn

from thinwire.core.errors import ThinwireError
from thinwire.engines.names import clean
from thinwire.engines.scheduler import Scheduler
from thinwire.engines.stepped import Steps
from thinwire.engines.unchanged import Parameters
from thinwire.session.session import Session


class Hook:
    """A hook on a module that calls ``call``; in a copy or a pickle of the module it does nothing.

    Ours hold what can't be copied, such as a process group, and a copy has no session. The function that replaces it is
    of the standard library, so a pickled model can be read where thinwire is not installed.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class ModelHooks(ABC):
    """The hooks of one model; messages name the way of ``accumulating`` without an exchange, and the ``way_out``."""

    def __init__(self, scheduler: Scheduler, accumulating: str, way_out: str) -> None:
        self.scheduler, self.accumulating, self.way_out = scheduler, accumulating, way_out
        self.session: Session | None = None
        self.params: list[Tensor] = []
        self.exchanged_since_step = self.warned = False

    def follow(self, session: Session, called: nn.Module, model: nn.Module, *advice: str) -> None:
        """Exchange the gradients of ``model`` from now on, with checks before the forward pass of ``called``."""
        exchanged = {unit.name: unit.param for unit in session.units}
        mine = {id(param) for param in exchanged.values()}
        others = [(clean(name), param) for name, param in model.named_parameters() if id(param) not in mine]
        self.params = list(exchanged.values())
        self.apart = [name for name, param in others if param.requires_grad]  # trained, but not exchanged
        self.parameters = Parameters(model, exchanged, self.apart, *advice)
        self.steps = Steps(exchanged, [param for _, param in others], self.way_out, self.unfinished, self.late)
        self.steps.install(session)
        session.cleanup.callback(self.uninstall)
        session.cleanup.callback(called.register_forward_pre_hook(Hook(self.before_forward)).remove)
        if session.optimizer is not None:
            session.cleanup.callback(session.optimizer.register_step_post_hook(self.after_optimizer).remove)
        self.exchanged_since_step = False
        self.session = session

    def check_free(self, where: str = "") -> None:
        """Raise a ``ThinwireError`` if a session is attached; ``where``: the parameter at which it was found."""
        if self.session is not None:
            raise ThinwireError(
                f"{self.session.method.name} is attached to this model{where}; call wire.set_method(), or "
                "wire.detach() first"
            )

    def uninstall(self) -> None:
        self.session = None

    def hook_gradients(self, hook: Callable[[Tensor], None], cleanup: contextlib.ExitStack) -> None:
        """Call the hook with each parameter whose gradient autograd has added to, until the cleanup."""
        for param in self.params:
            cleanup.callback(cast(Any, param).register_post_accumulate_grad_hook(hook).remove)

    @abstractmethod
    def before_forward(self, called: Any, *_: object) -> None:
        """Check the model and the session before the forward pass, where an error does no harm."""

    @abstractmethod
    def unfinished(self) -> list[str]:
        """Return the names of the parameters that the current exchange waits for."""

    @abstractmethod
    def late(self) -> Iterable[Tensor]:
        """Return the parameters whose gradients were added to after their exchange."""

    def notice_cleared(self) -> None:
        """Notice that the step was left out and its gradients cleared."""
        if self.exchanged_since_step and all(param.grad is None for param in self.params):
            self.exchanged_since_step = False

    def warn_of_old(self, session: Session, new: int = 0) -> None:
        """Warn if gradients would be added to exchanged ones; ``new``: number of gradients that are allowed."""
        if not self.exchanged_since_step or self.warned or session.transaction.failed:
            return
        if sum(param.grad is not None for param in self.params) > new:
            self.warned = True
            warnings.warn(
                "a backward pass is about to add to gradients that were already averaged over the ranks, with no "
                "optimizer step since: they would be exchanged twice. Accumulate under "
                f"{self.accumulating}, and leave it for the last micro-batch only.",
                stacklevel=4,
            )

    def begin_step(self, session: Session) -> None:
        self.scheduler.begin()
        self.exchanged_since_step = session.optimizer is not None
        session.begin_step()

    def end_step(self, session: Session, nonfinite: bool | None = None) -> None:
        self.steps.ended()
        session.end_step(nonfinite)

    def after_optimizer(self, *_: object) -> None:
        self.exchanged_since_step = False
