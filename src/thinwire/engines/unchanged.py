"""A check before each forward pass that the parameters of a model are those of attach.

The quick check compares only identities and layouts; if something has changed, all modules are visited.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thinwire.core.errors import ThinwireError
from thinwire.engines.layouts import Layouts
from thinwire.engines.names import clean
from thinwire.session.session import Session


class Parameters:
    """The exchanged parameters of a model, and its others.

    Args:
        exchanged: the parameters whose gradients are exchanged, by name.
        apart: the names of trained parameters that are not exchanged.
        since: the event after which they must not change, for messages.
        again: advice for the error if they have changed.

    Raises:
        ThinwireError: by ``check``; nothing has been sent then.
    """

    def __init__(
        self,
        model: nn.Module,
        exchanged: Mapping[str, Tensor],
        apart: Collection[str] = (),
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
        modules: list[tuple[str, nn.Module]] = [*self.model.named_modules()]  # pyright: ignore[reportUnknownArgumentType]
        for path, module in modules:
            for leaf, param in _parameters(module).items():
                param = self.sharded.get((id(module), leaf), param) if not isinstance(param, DTensor) else param
                if param is not None and id(param) not in seen:
                    seen.add(id(param))
                    yield clean(f"{path}.{leaf}" if path else leaf), param

    def _take(self) -> None:
        """Record what the quick check compares."""
        modules: list[nn.Module] = [*self.model.modules()]  # pyright: ignore[reportUnknownArgumentType]
        self.places: list[tuple[Mapping[str, object], str, object]] = []
        self.sizes: list[tuple[Mapping[str, object], int]] = []
        for module in modules:
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
            if (now := where.get(key)) is not what and not (isinstance(what, DTensor) and _gathered(now)):
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


def _gathered(now: object) -> bool:
    """Return True for a parameter that FSDP2 may have gathered in place of a sharded one."""
    return isinstance(now, Tensor) and not isinstance(now, DTensor)
