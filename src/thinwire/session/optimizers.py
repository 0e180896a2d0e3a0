"""The optimizers that step a model: taken out of their wrappers, and several handled as one."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from thinwire.core.errors import ThinwireError

WRAPPERS = ("optimizer", "base_optimizer")
"""Attributes in which frameworks, SAM and Lookahead keep the optimizer that steps."""


class Several:
    """Several optimizers of one model, without wrappers, whose steps together count as one."""

    def __init__(self, each: Sequence[torch.optim.Optimizer]) -> None:
        self.each = tuple(each)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    def step(self) -> None:
        """Step all of them."""
        for optimizer in self.each:
            optimizer.step()

    def register_step_post_hook(self, hook: Callable[..., Any]) -> "Handles":
        """Call ``hook`` each time all optimizers have stepped since its last call."""
        stepped: set[int] = set()

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            stepped.add(id(optimizer))
            if len(stepped) == len(self.each):
                stepped.clear()
                hook(optimizer, args, kwargs)

        handles = Handles()
        for optimizer in self.each:
            handles.callback(optimizer.register_step_post_hook(after).remove)
        return handles


class Handles(ExitStack):
    """Hooks that are removed together."""

    remove = ExitStack.close


Optimizers: TypeAlias = torch.optim.Optimizer | Several
"""One optimizer, or several, that step a model."""


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside all wrappers, the one on which step hooks work."""
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        for name in WRAPPERS:
            inner = getattr(optimizer, name, None)
            steps = isinstance(inner, torch.optim.Optimizer) or any(hasattr(inner, other) for other in WRAPPERS)
            if steps and id(inner) not in seen:
                optimizer = inner
                break
    return optimizer


def joined(optimizer: Any) -> Any:
    """Return the optimizer in a wrapper, or those of a list as one; anything else is returned unchanged."""
    if isinstance(optimizer, Several):
        return optimizer
    if not isinstance(optimizer, (list, tuple)):
        return unwrapped(optimizer)
    given: Sequence[Any] = cast("Sequence[Any]", optimizer)
    each = list({id(one): one for one in map(unwrapped, given)}.values())
    if not each or not all(isinstance(one, torch.optim.Optimizer) for one in each):
        return given
    return each[0] if len(each) == 1 else Several(each)


def each_of(optimizer: Optimizers | None) -> tuple[torch.optim.Optimizer, ...]:
    """Return all optimizers as a tuple; empty for None."""
    if isinstance(optimizer, Several):
        return optimizer.each
    return () if optimizer is None else (optimizer,)


def kind_of(optimizer: Optimizers | None) -> str:
    """Return the class names of the optimizers, for messages."""
    return " and ".join(type(one).__name__ for one in each_of(optimizer)) or "no optimizer"


def holders(optimizer: Optimizers | None, named: Iterable[tuple[str, Tensor]]) -> Mapping[str, torch.optim.Optimizer]:
    """Return the optimizer that steps each parameter, by name; two that hold the same one are an error."""
    names = {id(param): name for name, param in named}
    found: dict[str, torch.optim.Optimizer] = {}
    for one in each_of(optimizer):
        for param in (param for group in one.param_groups for param in group["params"]):
            name = names.get(id(param))
            if name is not None and (other := found.setdefault(name, one)) is not one:
                raise ThinwireError(
                    f"parameter {name!r} is in two optimizers, a {type(other).__name__} and a {type(one).__name__}, "
                    "which would both step it; give each parameter to one of them"
                )
    return found


_owners: WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[Any]] = WeakKeyDictionary()


def check_optimizer(
    optimizer: Optimizers | None, named: Sequence[tuple[str, Tensor]], owner: object, method: str
) -> None:
    """Check that optimizers step all exchanged parameters; from now on they belong to this ``owner`` only."""
    if optimizer is None:
        raise ThinwireError(
            f"{method} must see optimizer.step(), which makes its residuals final: call "
            "attach(..., optimizer=optimizer)"
        )
    held = holders(optimizer, named)
    if missing := [name for name, _ in named if name not in held]:
        raise ThinwireError(
            f"parameter {missing[0]!r} is not in the optimizer ({len(missing)} are missing); what {method} remembers "
            "of a parameter is final when its optimizer steps, so one optimizer must hold all of them, or several "
            "together: optimizer=[first, second]"
        )
    for i, one in enumerate(each_of(optimizer)):
        if not any(one is holder for holder in held.values()):
            raise ThinwireError(
                f"optimizer[{i}], a {type(one).__name__}, holds no parameter that is exchanged; leave it out: a step "
                "is final when all have stepped"
            )
        other = known() if (known := _owners.get(one)) is not None else None
        if other is not None and other is not owner:
            raise ThinwireError("this optimizer is attached to another model; give each model an optimizer of its own")
    for one in each_of(optimizer):
        _owners[one] = weakref.ref(owner)


def release_optimizer(optimizer: Optimizers | None, owner: object) -> None:
    """Free the optimizer for another session, if this one owns it."""
    for one in each_of(optimizer):
        if (known := _owners.get(one)) is not None and known() is owner:
            del _owners[one]
