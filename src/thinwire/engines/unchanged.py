"""A check before each forward pass that the parameters of a model are those of attach.

The quick check compares only identities and layouts; if something has changed, all modules are visited. Changed strides
are followed; changed dtypes, shapes and devices can't be.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import own, real_strides
from thinwire.core.tensors import is_dense
from thinwire.engines.names import clean, modules_of
from thinwire.session.session import Session

Layout: TypeAlias = tuple[tuple[int, ...], torch.dtype, torch.device, tuple[int, ...]]
SHOWN = ("of shape {}", "{}", "on {}", "of strides {}")
SHAPE, STRIDES = 0, 3


class Layouts:
    """The known layouts of some parameters; ``again`` is advice for the error if one can't be followed."""

    def __init__(self, named: Mapping[str, Tensor], again: str) -> None:
        self.again = again
        self.known = [(param, name, _layout(param)) for name, param in named.items()]

    def check(self, session: Session) -> bool:
        """Follow changed strides; returns True if any have changed, and then it is a collective call."""
        for param, _, (shape, dtype, device, stride) in self.known:
            if param.stride() != stride or param.dtype != dtype or param.shape != shape or param.device != device:
                self._follow(session)
                return True
        return False

    def _follow(self, session: Session) -> None:
        now = [(param, name, _layout(param)) for param, name, _ in self.known]
        moved: dict[str, tuple[int, ...]] = {}
        for (param, name, was), (_, _, layout) in zip(self.known, now, strict=True):
            if layout != was:
                self._check(param, name, was, layout)
                moved[name] = real_strides(param, was[-1])
        session.follow(moved)
        self.known = now

    def _check(self, param: Tensor, name: str, was: Layout, now: Layout) -> None:
        part = next(part for part in range(4) if now[part] != was[part])
        if part == STRIDES and is_dense(own(param)) and not isinstance(param, DTensor):
            return
        kept = ", with what is pending: state = wire.state_dict() before, and wire.load_state_dict(state) after"
        raise ThinwireError(
            f"parameter {name!r} was {SHOWN[part].format(was[part])} at attach and is {SHOWN[part].format(now[part])} "
            f"now, which what is remembered of it can't follow; {self.again}{kept if part != SHAPE else ''}"
        )


class Parameters:
    """The exchanged parameters of a model, by name, and its others; ``apart`` names those that train unexchanged.

    Messages say ``since`` when they must not change, and advise to do it ``again``.
    """

    def __init__(
        self,
        model: nn.Module,
        exchanged: Mapping[str, Tensor],
        apart: Collection[str],
        since: str = "attach",
        again: str = "detach() and attach again",
    ) -> None:
        self.model, self.apart, self.since, self.again = model, set(apart), since, again
        self.sharded: dict[tuple[int, str], Tensor] = {}  # by module and leaf
        self.names = {id(param): name for name, param in exchanged.items()}
        self.exchanged = dict(exchanged)
        self.layouts = Layouts(exchanged, again)
        self.gone: set[str] = set()
        """Names of exchanged parameters that are no longer in the model."""
        self._take()
        self.known = {id(param) for _, param in self._walk()}

    def check(self, session: Session) -> bool:
        """Check all parameters; returns True if changed strides were followed, and then it is a collective call."""
        if not self._as_before():
            self._look()
            self._take()
        return self.layouts.check(session)

    def _walk(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter once; for one that FSDP2 has gathered, its sharded parameter."""
        seen: set[int] = set()
        for path, module in modules_of(self.model):
            for leaf, param in _parameters(module).items():
                param = self.sharded.get((id(module), leaf), param) if not isinstance(param, DTensor) else param
                if param is not None and id(param) not in seen:
                    seen.add(id(param))
                    yield clean(f"{path}.{leaf}" if path else leaf), param

    def _take(self) -> None:
        """Record what the quick check compares."""
        self.places: list[tuple[Mapping[str, object], str, object]] = []
        self.sizes: list[tuple[Mapping[str, object], int]] = []
        for _, module in modules_of(self.model):
            params = _parameters(module)
            self.sharded |= {(id(module), leaf): x for leaf, x in params.items() if isinstance(x, DTensor)}
            before = {leaf: self.sharded.get((id(module), leaf), param) for leaf, param in params.items()}
            children = cast("Mapping[str, object]", module._modules)  # pyright: ignore[reportPrivateUsage]
            self.places += [(children, key, child) for key, child in children.items()]
            self.places += [(params, leaf, param) for leaf, param in before.items()]
            self.sizes += [(where, len(where)) for where in (params, children)]
        self.idle = [param for _, param in self._walk() if not param.requires_grad]

    def _as_before(self) -> bool:
        for where, key, what in self.places:
            if (now := where.get(key)) is not what:
                gathered = isinstance(now, Tensor) and not isinstance(now, DTensor)  # by FSDP2, from a sharded one
                if not (gathered and isinstance(what, DTensor)):
                    return False
        return all(len(where) == size for where, size in self.sizes) and not any(p.requires_grad for p in self.idle)

    def _look(self) -> None:
        now = list(self._walk())
        here, by_name = {id(param) for _, param in now}, dict(now)
        lost = [name for ident, name in self.names.items() if ident not in here]
        for name in lost:
            if name in by_name and by_name[name].requires_grad:
                raise ThinwireError(
                    f"parameter {name!r} was replaced after {self.since} (load_state_dict(assign=True) does it, and "
                    f"model.to() from some devices to others), so its gradient would not be exchanged; {self.again}"
                )
        for name, param in now:
            if param.requires_grad and id(param) not in self.names and name not in self.apart:
                what = (
                    "required no gradient at attach and does now" if id(param) in self.known else "is new since attach"
                )
                raise ThinwireError(f"parameter {name!r} {what}, so its gradient would not be exchanged; {self.again}")
        self.gone = set(lost)


def warn_of_apart(names: Sequence[str], why: str) -> None:
    """Warn of trained parameters that are not exchanged."""
    warnings.warn(
        f"parameter {names[0]!r} trains and its gradient is not averaged over the ranks, since {why} ({len(names)} "
        "such parameters): replicas part where gradients differ, unless you average them yourself",
        stacklevel=4,
    )


def _parameters(module: nn.Module) -> "dict[str, Tensor | None]":
    return cast(Any, module._parameters)  # pyright: ignore[reportPrivateUsage]


def _layout(param: Tensor) -> Layout:
    return tuple(param.shape), param.dtype, param.device, param.stride()
