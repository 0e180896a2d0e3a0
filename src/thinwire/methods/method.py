"""Methods: ordered rules that choose the compressor and the memory of every parameter.

A method is a value. It can be written to JSON and read back, and ranks compare it before they exchange anything.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, cast, get_args

from thinwire.core import Compressor, Memory, ThinwireError, registry
from thinwire.core.capabilities import LeaderSelected, WarmStarted, declines, led, title
from thinwire.core.checks import check_fields, of_type, one_of, optional, real, share, shown, whole
from thinwire.core.interfaces import feeds_back
from thinwire.core.memory_capabilities import OwnsMomentum, traits_of
from thinwire.methods.local_settings import Local

RESERVED = "pending_residual"
"""The key of a residual that an earlier method left, in every state."""
TYPICAL = 2**20
"""Number of elements for which a rule is checked."""
PAPER = (0.25, 0.0625, 0.015625, 0.004)
"""Densities of a warm-up: Y. Lin et al., "Deep Gradient Compression", 2018, arXiv:1712.01887, section 3.3."""
RouteName: TypeAlias = Literal["all_gather", "two_phase", "auto", "leader"]


def _densities(name: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ThinwireError(f"{name} is {shown(value)}; it must be a list of densities, e.g. (0.25, 0.0625)")
    stages: list[float] = []
    for density in cast("list[Any]", value):
        try:
            stages.append(share("0.25")("it", density))
        except ThinwireError as error:
            raise ThinwireError(f"warm-up stage {shown(density)} is not a density; {error}") from None
    return tuple(stages)


@dataclass(frozen=True)
class Warmup:
    """Densities of the first steps, each for an equal number of steps.

    Args:
        steps: length of the warm-up in optimizer steps, or in epochs if ``steps_per_epoch`` is given.
        stages: densities in (0, 1], by default the paper's 25 %, 6.25 %, 1.5625 %, 0.4 %. A stage that would
            send more bytes than a dense exchange is sent dense, and the ledger notes it.
        steps_per_epoch: makes ``steps`` count epochs, e.g. ``Warmup(4, steps_per_epoch=len(loader))``. The paper warms
            up for 4 of 90 or 164 epochs, or 1 of 40; a single epoch is split into equal parts.

    Raises:
        ThinwireError: there are fewer steps than stages, or a density is outside (0, 1].

    Example:
        >>> Warmup(steps=400).density(0), Warmup(steps=400).density(399), Warmup(steps=400).density(400)
        (0.25, 0.004, None)
    """

    steps: int
    stages: tuple[float, ...] = PAPER
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            steps=whole(0, hint=", of optimizer steps, or of epochs with steps_per_epoch="),
            stages=_densities,
            steps_per_epoch=optional(whole(1, hint=", e.g. len(loader)")),
        )
        if not self.stages or self.length < len(self.stages):
            raise ThinwireError(
                f"a warm-up of {self.length} steps can't hold {len(self.stages)} stages; "
                f"give more steps, no warm-up, or fewer stages: thinwire.Warmup({self.steps}, (0.25,))"
            )

    @staticmethod
    def read(name: str, given: Any, stages: tuple[float, ...] = PAPER) -> "Warmup | None":
        """Read a ``warmup`` argument: a ``Warmup``, a number of steps (with ``stages``), or 0 or None for none."""
        if given is None or isinstance(given, Warmup):
            return given
        example = "give a number of steps, e.g. 400, or thinwire.Warmup(400, stages)"
        steps = whole(0, says=example)(name, given)
        return Warmup(steps, stages) if steps else None

    @property
    def length(self) -> int:
        """Length of the warm-up in steps."""
        return self.steps * (self.steps_per_epoch or 1)

    def density(self, step: int) -> float | None:
        """Return the density of that step, None after the warm-up."""
        return self.stages[step * len(self.stages) // self.length] if step < self.length else None


@dataclass(frozen=True)
class Rule:
    """A compressor and a memory for parameters that match the glob ``match`` and are large enough."""

    compressor: Compressor
    memory: Memory
    match: str = "*"
    min_ndim: int = 0
    min_numel: int = 0

    def __post_init__(self) -> None:
        example = "a rule is Rule(compressor, memory), e.g. Rule(TopK(0.01), ErrorFeedback())"
        check_fields(
            self,
            compressor=of_type(Compressor, example),
            memory=of_type(Memory, example),
            match=of_type(str, "it is a glob of parameter names, e.g. '*.weight'"),
            min_ndim=whole(0),
            min_numel=whole(0),
        )
        kind, traits = title(self.compressor), self.compressor.traits
        kept = feeds_back(self.memory) or (traits.votes and traits_of(self.memory).takes_votes)
        if traits.needs_feedback and not kept:
            raise ThinwireError(
                f"{kind} is biased, and {type(self.memory).__name__} forgets what it does not send: training need not "
                "converge; use a memory like ErrorFeedback(), or an unbiased compressor such as RandK or QSGD"
            )
        led_by = traits.leader_selected or traits.selects
        for says, kind_of in ((traits.warm_started, WarmStarted), (led_by, LeaderSelected)):
            if says and not isinstance(self.compressor, kind_of):
                raise ThinwireError(f"the traits of {kind} need the capability {kind_of.__name__}; derive from it")
        if isinstance(self.compressor, WarmStarted) and traits.warm_started and not traits.summable:
            raise ThinwireError(f"{kind} is warm-started, which needs a mean of payloads; its traits must be summable")
        if RESERVED in self.memory.slots:
            raise ThinwireError(f"{type(self.memory).__name__} has a slot {RESERVED!r}, a reserved name; take another")
        alpha = traits.contraction(TYPICAL)
        if feeds_back(self.memory) and alpha is not None and alpha <= 0.0:
            scaled = "" if traits.variance(TYPICAL) is None else f"Scaled({kind}(...)), "
            raise ThinwireError(
                f"{kind} may lose more than it is given, so what {type(self.memory).__name__} remembers could grow "
                f"without bound; use {scaled}more bits, smaller blocks, or NoMemory()"
            )

    def means(self, name: str, shape: Sequence[int], numel: int) -> bool:
        """Return True if the rule matches such a parameter; its compressor may still decline it."""
        return len(shape) >= self.min_ndim and numel >= self.min_numel and fnmatchcase(name, self.match)


def _rules(name: str, value: Any) -> tuple[Rule, ...]:
    given: tuple[object, ...] = tuple(cast("list[object]", value)) if isinstance(value, (list, tuple)) else (value,)
    if not given or not all(isinstance(rule, Rule) for rule in given):
        raise ThinwireError(
            f"{name} is {shown(cast(object, value))}; a method has a tuple of rules, e.g. "
            "(Rule(TopK(0.01), ErrorFeedback()), Rule(Cast(), NoMemory()))"
        )
    return cast("tuple[Rule, ...]", given)


@dataclass(frozen=True)
class Method:
    """Ordered rules, of which the first that fits applies, and the settings for all parameters together.

    Args:
        name: the name in tables.
        rules: the rules; the last should fit every parameter.
        clip: the largest norm of the mean gradient; each rank clips its own gradient to ``clip * sqrt(N)`` before the
            memory gets it. None for no clipping.
        warmup: the densities of the first steps.
        route: the route of compressed units. ``"all_gather"``: each payload to every other rank. ``"two_phase"``:
            pieces to their owners, then the mean to all; the bytes per worker do not grow with the number of workers,
            but it compresses twice. ``"auto"``: the faster of the two for each bucket. ``"leader"``: one rank in turn
            selects the elements that all send, and their values are summed; for sparsifiers such as ``TopK``.
        second_stage_density_ratio: density of the second phase over that of the first, above 0.
        local: the settings of local updates: what is exchanged is then not the gradient, but what the optimizer of each
            worker has changed in several steps. None for gradients.
    """

    name: str
    rules: tuple[Rule, ...]
    clip: float | None = None
    warmup: Warmup | None = None
    route: RouteName = "all_gather"
    second_stage_density_ratio: float = 1.0
    local: Local | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            name=of_type(str, "it is the method's name in tables, e.g. 'mine'"),
            rules=_rules,
            clip=optional(real(0.0, above=True, hint=", or None for no clipping")),
            warmup=Warmup.read,
            route=one_of(*get_args(RouteName)),
            second_stage_density_ratio=real(0.0, above=True, hint=": it multiplies the density"),
            local=optional(of_type(Local, "use thinwire.local(method, every=...)")),
        )
        others = (rule.compressor for rule in self.rules if not rule.compressor.traits.linear)
        if self.route == "leader" and (wrong := [one for one in others if not led(one, self.route)]):
            raise ThinwireError(
                f"route 'leader' sums values at elements that a leader selects, which {title(wrong[0])} does not send; "
                "take a sparsifier without values=, such as TopK, SIDCo or BlockTopK, alone or >> Cast('float16')"
            )

    @property
    def absorbs(self) -> bool:
        """True if the method takes momentum and weight decay over from the optimizer."""
        return any(isinstance(rule.memory, OwnsMomentum) for rule in self.rules)

    def rule(self, name: str, shape: Sequence[int], numel: int) -> Rule:
        """Return the first rule that fits."""
        return self.choice(name, shape, numel)[0]

    def choice(self, name: str, shape: Sequence[int], numel: int) -> tuple[Rule, str | None]:
        """Return the first rule that fits, and the reason why an earlier rule's compressor declined, or None."""
        reason: str | None = None
        for rule in self.rules:
            if rule.means(name, shape, numel):
                why = declines(rule.compressor, shape)
                if why is None:
                    return rule, reason
                reason = f"{type(rule.compressor).__name__} left it: {why}"
        raise ThinwireError(
            f"no rule of {self.name} fits parameter {name!r} of shape {tuple(shape)}; "
            "end the rules with Rule(Cast(), NoMemory())"
        )

    def to_json(self) -> str:
        rules = [
            vars(rule) | {"compressor": registry.to_json(rule.compressor), "memory": registry.to_json(rule.memory)}
            for rule in self.rules
        ]
        warmup = asdict(self.warmup) if self.warmup else None
        local = {"local": None if self.local is None else self.local.to_json()}
        return json.dumps(vars(self) | {"rules": rules, "warmup": warmup} | local, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Method":
        """Read a method that ``to_json`` wrote."""
        try:
            data: dict[str, Any] = json.loads(text)
            kinds = {"compressor": registry.COMPRESSORS, "memory": registry.MEMORIES}
            rules = tuple(
                Rule(**rule | {key: registry.from_json(rule[key], rows) for key, rows in kinds.items()})
                for rule in data["rules"]
            )
            warmup = Warmup(**data["warmup"]) if data["warmup"] else None
            local = Local(**data["local"]) if data.get("local") else None
            data |= {"rules": rules, "warmup": warmup, "local": local}
            return Method(**{field.name: data[field.name] for field in fields(Method)})
        except (KeyError, TypeError, ValueError) as error:
            raise ThinwireError(f"this is not a method in JSON: {error!r}") from error
