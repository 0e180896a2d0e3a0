"""A check before each optimizer step that its gradients have been exchanged.

Without an exchange, every rank would step on its own gradient, and replicas would silently differ. Normally an exchange
has ended since the last step; only if none has, the gradients themselves are checked.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakMethod, WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import own
from thinwire.session.session import Session


class Steps:
    """The check of all optimizers that hold a parameter of one model, even those that ``attach`` was not given.

    Of the model, ``apart`` are parameters that are not exchanged; ``unfinished`` and ``late`` are of ``ModelHooks``.
    """

    def __init__(
        self, exchanged: Mapping[str, Tensor], apart: Iterable[Tensor], way_out: str,
        unfinished: Callable[[], Sequence[str]], late: Callable[[], Iterable[Tensor]],
    ) -> None:  # fmt: skip
        self.names = {id(param): name for name, param in exchanged.items()}
        self.apart = {id(param) for param in apart}
        self.way_out, self.unfinished, self.late = way_out, unfinished, late
        self.exchanged = False
        self.session: Session | None = None
        self.stepped: WeakKeyDictionary[torch.optim.Optimizer, dict[int, tuple[int, int]]] = WeakKeyDictionary()
        """Marks of the gradients used by each optimizer that has stepped since the last exchange."""
        self.held: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, list[Tensor]]] = WeakKeyDictionary()
        """For each optimizer, its number of parameters, and those of them that are exchanged."""
        self.closures: WeakSet[torch.optim.Optimizer] = WeakSet()

    def install(self, session: Session) -> None:
        if session.collective.everyone.world < 2:
            return
        self.session = session
        _following.add(self)
        session.cleanup.callback(_following.discard, self)
        for register, method in (
            (register_optimizer_step_pre_hook, self.before),
            (register_optimizer_step_post_hook, self.after),
        ):
            handle = register(weak(method))
            finalize(self, handle.remove)
            session.cleanup.callback(handle.remove)

    def ended(self) -> None:
        """Note that an exchange has ended, so gradients are the same on all ranks."""
        self.exchanged = True
        self.stepped.clear()

    def before(self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise an error if the optimizer is about to step on gradients that were not exchanged."""
        if not (mine := self._mine(optimizer)):
            return
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            self.closures.add(optimizer)  # checked after the step: the closure runs backward and the exchange
            return
        self._check(optimizer, mine)

    def after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not (mine := self._mine(optimizer)):
            return
        if optimizer in self.closures:
            self.closures.discard(optimizer)
            self._check(optimizer, mine)
        self.stepped[optimizer] = {id(p): _mark(grad) for p in mine if (grad := p.grad) is not None}

    def _check(self, optimizer: torch.optim.Optimizer, mine: list[Tensor]) -> None:
        if (session := self.session) is None or (session.transaction.failed and session.optimizer is not None):
            return  # the session clears the gradients
        if not self.exchanged or optimizer in self.stepped:
            marks = self.stepped.get(optimizer, {})
            new = [p for p in mine if (grad := p.grad) is not None and marks.get(id(p)) != _mark(grad)]
            if unsent := [self.names[id(p)] for p in new if _moves(p)]:
                waiting = self.unfinished() or [self.names[id(p)] for p in mine if p.grad is None]
                waits = f"; {waiting[0]!r} got no gradient" if waiting else ""
                raise ThinwireError(
                    f"optimizer.step(): the gradient of {unsent[0]!r} was not exchanged since the last step "
                    f"({len(unsent)} such parameters{waits}), so replicas would part. {self.way_out}. To step on "
                    "gradients of one rank, detach() first"
                )
            return
        if waiting := self.unfinished():
            raise ThinwireError(
                f"optimizer.step(): the last exchange was without {waiting[0]!r}, which got no gradient or is not in "
                f"DDP's buckets, so replicas would part. {self.way_out}"
            )
        added = {id(param) for param in self.late()}
        if late := [self.names[id(p)] for p in mine if id(p) in added and p.grad is not None and _moves(p)]:
            raise ThinwireError(
                f"optimizer.step(): a backward pass without an exchange has added to the gradient of {late[0]!r} after "
                f"it was averaged over the ranks, so replicas would part. {self.way_out}"
            )

    def _mine(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Return the optimizer's parameters that are exchanged here."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self.held.get(optimizer)
        if known is None or known[0] != count:
            params: list[Tensor] = [param for group in optimizer.param_groups for param in group["params"]]
            mine = [param for param in params if id(param) in self.names]
            known = self.held[optimizer] = count, mine
            if mine:
                self._warn_of_foreign(optimizer, params)
        return known[1]

    def _warn_of_foreign(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        """Warn if the optimizer steps a parameter whose gradient is not averaged."""
        known = self.apart.union(*(other.names for other in _following))
        foreign = [p for p in params if p.requires_grad and id(p) not in known and not isinstance(p, DTensor)]
        if not foreign:
            return
        elsewhere = {id(p) for ddp in wrappers() for p in inside(ddp).parameters()}
        if foreign := [p for p in foreign if id(p) not in elsewhere]:
            named: dict[int, str] = {}
            for group in optimizer.param_groups:
                named |= {id(p): f" {n!r}" for p, n in zip(group["params"], group.get("param_names", ()), strict=False)}
            warnings.warn(
                f"the optimizer also steps on a parameter{named.get(id(foreign[0]), '')} of shape "
                f"{tuple(foreign[0].shape)} that is not in the attached model ({len(foreign)} in all): nobody averages "
                "its gradient over the ranks; make it part of the model before attach",
                stacklevel=5,
            )


_following: WeakSet[Steps] = WeakSet()


def weak(method: Callable[..., None]) -> Callable[..., None]:
    """Return a hook with a weak reference, for hooks that outlive a session or that the garbage collector can't see."""
    call = WeakMethod(method)

    def hook(*args: Any) -> None:
        if (found := call()) is not None:
            found(*args)

    return hook


def inside(ddp: DistributedDataParallel) -> nn.Module:
    return cast(nn.Module, ddp.module)  # pyright: ignore[reportUnknownMemberType]


def wrappers() -> list[DistributedDataParallel]:
    """Return every DDP model in this process. Slow, because it visits all Python objects."""
    kinds = {DistributedDataParallel}  # isinstance() would be slow for this class, over a million objects
    while more := {each for kind in kinds for each in kind.__subclasses__()} - kinds:
        kinds |= more
    return [one for one in gc.get_objects() if type(one) in kinds]


def _mark(grad: Tensor) -> tuple[int, int]:
    return id(grad), cast(Any, grad)._version


def _moves(param: Tensor) -> bool:
    """Return True if the parameter's gradient has a nonzero element."""
    grad = cast(Tensor, param.grad)
    return bool((grad.coalesce().values() if grad.is_sparse else own(grad)).count_nonzero())
