"""Settings of local updates: the period, the outer step, the overlap, and the bound of what is stable.

A worker makes ``every`` steps with its own optimizer. Then ``anchor - parameters`` is exchanged like a gradient, and
the outer step moves the anchor, which is equal on all workers, by the mean.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from thinwire.core.checks import check_fields, flag, one_of, optional, real, share, shown, whole
from thinwire.core.errors import ThinwireError

Penalty: TypeAlias = Callable[[float, float, int], float]
"""Function of the distance that the anchor moved in its last outer step, the mean distance of a worker's first inner
step, and ``every``; it returns the divisor of a late update, at least 1."""
ROUND = "round"


def staleness_gap(moved: float, first: float, every: int) -> float:
    """Return CO2's divisor: one plus the last outer move over the longest possible inner move."""
    return 1.0 + moved / (every * first) if first > 0.0 else 1.0


PENALTIES: dict[str, Penalty] = {"gap": staleness_gap}


def _delay(name: str, value: Any) -> int | str:
    return ROUND if value == ROUND else whole(0, hint=f', or "{ROUND}" for one round late')(name, value)


def _penalty(name: str, value: Any) -> Any:
    if value is None or callable(value):
        return value
    return one_of(*PENALTIES)(name, value)


@dataclass(frozen=True)
class Local:
    """The settings of local updates, a part of a ``Method``.

    ``delta = anchor - parameters`` after ``every`` steps; ``p = mean(delta) / penalty``; ``m = momentum m + p``,
    limited to ``[-clip, clip]``; ``anchor -= lr (p + momentum m)`` with ``nesterov``, else ``lr m``;
    ``parameters = (1 - mix) anchor + mix parameters``.

    Args:
        every: inner optimizer steps in a round, at least 1.
        lr, momentum, nesterov: of the outer step. With ``lr=1, momentum=0`` the anchor becomes the workers' mean.
        clip: the largest magnitude of an element of the outer momentum; None for no limit.
        delay: inner steps from the start of an exchange to the end of the round, where its outer step is made, below
            ``every / fragments``; or ``"round"`` (CO2): the update of a round is applied at the end of the next one,
            and a round begins from the anchor.
        fragments: parts of the model, by layers in turn, each with its own time of exchange within ``every`` steps.
        mix: share of a worker's own parameters that the outer step leaves, in [0, 1).
        penalty: divisor of late updates, ``"gap"`` (see ``staleness_gap``) or a function, which then has a name in
            ``PENALTIES`` on every rank; needs ``delay="round"``.
        per_lr: divide ``delta`` by the inner learning rate before the momentum, and multiply the step by it (SlowMo).
        start: exchange after each of the first ``start`` inner steps (post-local SGD).
        contraction: the largest share of an error on a quadratic that a round of inner steps removes, in (0, 1]. The
            outer step must be stable up to it.
        buffers: ``"average"`` the floating-point buffers (BatchNorm's statistics) with each round, or ``"leave"`` them.
        sync_moments: average the inner optimizer's moments after so many rounds; None never does.

    Raises:
        ThinwireError: a value is outside its range, or the outer step diverges on a quadratic.
    """

    every: int
    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False
    clip: float | None = None
    delay: int | Literal["round"] = 0
    fragments: int = 1
    mix: float = 0.0
    penalty: str | Penalty | None = None
    per_lr: bool = False
    start: int = 0
    contraction: float = 1.0
    buffers: Literal["average", "leave"] = "leave"
    sync_moments: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            every=whole(1, hint=": inner steps in a round"),
            lr=real(0.0, above=True, hint=": it multiplies the mean update, e.g. 0.7"),
            momentum=real(0.0, 1.0, below=True),
            nesterov=flag,
            clip=optional(real(0.0, above=True, hint=", or None for no limit")),
            delay=_delay,
            fragments=whole(1),
            mix=real(0.0, 1.0, below=True),
            penalty=_penalty,
            per_lr=flag,
            start=whole(0),
            contraction=share("0.8", "the share of an error that a round removes"),
            buffers=one_of("average", "leave"),
            sync_moments=optional(whole(1, hint=" rounds, or None")),
        )
        if callable(self.penalty):  # by name, since methods are compared between ranks, and kept, as JSON
            name = f"{self.penalty.__module__}.{getattr(self.penalty, '__qualname__', type(self.penalty).__qualname__)}"
            if PENALTIES.setdefault(name, self.penalty) is not self.penalty:
                raise ThinwireError(
                    f"penalty is a function called {name}, and so is another one that was given before; give it a name "
                    "of its own: thinwire.methods.PENALTIES[name] = function, penalty=name"
                )
            object.__setattr__(self, "penalty", name)
        if self.fragments > self.every:
            raise ThinwireError(
                f"fragments is {self.fragments} and every is {self.every}; each fragment needs an inner step of its "
                "own in a round: use at most as many fragments as steps"
            )
        if self.late:
            for name in ("fragments", "mix", "start"):
                default = next(f.default for f in fields(self) if f.name == name)
                if (value := getattr(self, name)) != default:
                    raise ThinwireError(
                        f'{name} is {value}, and delay="round" begins each round of the whole model from the anchor; '
                        f"leave {name} out"
                    )
        elif self.steps_late >= self.every // self.fragments:
            each = self.every // self.fragments
            parts = f" of every / fragments = {each}" if self.fragments > 1 else ""
            raise ThinwireError(
                f"delay is {self.delay} inner steps, and the next exchange starts after {each}{parts}; one exchange is "
                f'in flight at a time: use at most {each - 1}, or "{ROUND}" for the end of the next round'
            )
        if self.penalty is not None and not self.late:
            raise ThinwireError(
                f'penalty is {shown(self.penalty)}, for updates that come a round late; it needs delay="{ROUND}"'
            )
        self._check_stable()

    @property
    def late(self) -> bool:
        """True if the update of a round is applied at the end of the next."""
        return self.delay == ROUND

    @property
    def steps_late(self) -> int:
        """The inner steps that an exchange within a round may take."""
        return 0 if self.late else cast(int, self.delay)

    def divisor(self, moved: float, first: float) -> float:
        """Return what a late update is divided by; the same on all ranks."""
        if self.penalty is None:
            return 1.0
        value = float(PENALTIES[cast(str, self.penalty)](moved, first, self.every))
        if not value >= 1.0:
            raise ThinwireError(f"the penalty of a late update is {value}; a divisor must be at least 1")
        return value

    def _check_stable(self) -> None:
        """Raise an error if the outer step diverges on a quadratic of which a round removes at most ``contraction``."""
        shares = np.linspace(0.0, self.contraction, 65)[1:]
        growth = max(growth_of(self, float(removed)) for removed in shares)
        if growth <= 1.0 + 1e-6:
            return
        low, high = 0.0, self.lr
        for _ in range(40):
            middle = (low + high) / 2
            stable = middle > 0.0 and all(growth_of(self, float(r), middle) <= 1.0 + 1e-6 for r in shares)
            low, high = (middle, high) if stable else (low, middle)
        raise ThinwireError(
            f"lr is {self.lr:g} with momentum {self.momentum:g} and delay {self.delay!r}, and an error on a quadratic "
            f"grows {growth:.3g} times a round; the largest stable lr is {low:.3g}. Use that or less, less momentum, "
            f"or, if a round removes less than {self.contraction:.0%} of an error, say so: contraction=0.5"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def growth_of(local: Local, removed: float, lr: float | None = None) -> float:
    """Return the growth of an error in one round, on a quadratic of which inner steps remove the share ``removed``."""
    lr, beta, mix, every = local.lr if lr is None else lr, local.momentum, local.mix, local.every
    anchor, x, m, p = np.eye(4)  # rows: how each now depends on the state at the start of the round
    rest = (1.0 - removed) ** (1.0 / every)
    if local.late:
        x = anchor * (1.0 - removed)
        arrived, p = p, anchor - x
    else:
        p = arrived = anchor - x
        x = x * rest**local.steps_late
    m = beta * m + arrived
    anchor = anchor - lr * (arrived + beta * m if local.nesterov else m)
    if not local.late:
        x = ((1.0 - mix) * anchor + mix * x) * rest ** (every - local.steps_late)
    return float(np.abs(np.linalg.eigvals(np.stack([anchor, x, m, p]))).max())
