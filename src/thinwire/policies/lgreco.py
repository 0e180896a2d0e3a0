"""L-GreCo: a policy that chooses how strongly each parameter is compressed.

It averages the compressors' inputs, computes the error of each candidate on them, and changes the method.
"""

import contextlib
import glob
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from thinwire.comm.link import Link
from thinwire.comm.link_speed import measure
from thinwire.comm.texts import heard
from thinwire.core import Compressor, Context, ThinwireError, flat
from thinwire.core.ambient import undisturbed
from thinwire.core.capabilities import ErrorTable, declines, led
from thinwire.core.checks import one_of
from thinwire.exchange.units import DENSE, Unit, bytes_alone, payload_nbytes
from thinwire.exchange.workers import Worker
from thinwire.methods.method import Method, Rule
from thinwire.policies.allocate import improve, total
from thinwire.session.session import Session

Objective: TypeAlias = Literal["bytes", "seconds"]
Error: TypeAlias = Literal["l2", "l2sq"]
Rows: TypeAlias = "dict[str, list[float]]"

FAMILIES: dict[str, Callable[[Any], Sequence[float]]] = {
    "rank": lambda rank: range(max(1, rank // 2), 2 * rank + 1),
    "density": lambda density: [min(1.0, density * 10 ** (j / 10)) for j in range(-10, 11)],
    "bits": lambda bits: range(2, 9),
}
"""Candidate values for each hyper-parameter, around its present value."""


def family(compressor: Compressor) -> list[Compressor]:
    """Return more and less lossy versions of a compressor: ranks from half to twice its own, densities from a tenth to
    ten times, 2 to 8 bits; for a chain, versions of its first part.

    Example:
        >>> [one.rank for one in family(PowerSGD(4))]
        [2, 3, 4, 5, 6, 7, 8]
    """
    for one in fields(cast(Any, compressor)):
        value = getattr(compressor, one.name)
        if one.name in FAMILIES and value is not None:
            return [replace(cast(Any, compressor), **{one.name: v}) for v in FAMILIES[one.name](value)]
        if isinstance(value, Compressor):
            return [replace(cast(Any, compressor), **{one.name: v}) for v in family(value)]
    return [compressor]


@dataclass
class Snapshot:
    """The mean input of one worker's compressor for each unit; takes one value per element while it collects."""

    likes: dict[str, Tensor]
    """Meta tensors of the units to collect."""
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    elements: dict[str, int] = field(default_factory=dict[str, int])
    """Number of elements added so far, over all steps."""
    seconds: float = 0.0

    def look(self, name: str, x: Tensor, run: tuple[int, int] | None) -> None:
        if name in self.likes and x.numel():
            started = time.perf_counter()
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(self.likes[name], dtype=x.dtype, device=x.device)
            where = self.sums[name] if run is None else flat(self.sums[name])[slice(*run)]
            where += x
            self.elements[name] = self.elements.get(name, 0) + x.numel()
            self.seconds += time.perf_counter() - started

    def mean(self, name: str) -> Tensor:
        return self.sums[name] * (self.sums[name].numel() / self.elements[name])


@dataclass
class LGreCo:
    """A policy that every ``every`` steps plans the fewest bytes for at most the error of the attached method.

    ``minimise sum cost_l(q_l)  with  sum E_l(q_l) <= slack * sum E_l(default)``, ``E = ||A - C(A)||``, where A is the
    mean input of a worker's compressor in the last ``looks`` steps. Each worker makes its own table; all ranks average
    the tables, so they find the same plan. Residuals are kept. A checkpoint does not hold the plan: after a resume the
    uniform method runs until the next plan. With PowerSGD, attach the ranks of the checkpoint:
    ``Method.from_json(state["method"])``.

    Args:
        candidates: compressors to choose from, of one or several kinds; None for ``family`` of each unit's own.
            Dense is always a candidate; a compressor that does not fit the unit's memory is not.
        every: steps between plans, more than ``looks``; the first plan is made after the warm-up.
        looks: number of steps to average.
        objective: ``"bytes"`` that a worker sends, or ``"seconds"`` on the link with one message per unit.
        error: ``"l2"`` sums norms over parameters, as the paper's code does; ``"l2sq"`` sums squared norms.
        slack: allowed error, as a multiple of the uniform plan's error, above 0.
        resolution: see ``thinwire.policies.allocate``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: the tables as text, about 30 bytes per parameter and candidate for each plan; the ledger notes the bytes.

    Example:
        >>> LGreCo(candidates=[TopK(0.001), TopK(0.01), PowerSGD(2)], every=500).objective
        'bytes'

    Source: M. Alimohammadi, I. Markov, E. Frantar, D. Alistarh, "L-GreCo: Layerwise-Adaptive Gradient Compression for
    Efficient and Accurate Deep Learning", MLSys 2024, arXiv:2210.17357.

    Departures: errors are averaged over all ranks; the paper plans from rank 0's gradients. If no plan beats the
    uniform one, that is kept. A new PowerSGD rank keeps the directions found so far.
    """

    candidates: Sequence[Compressor] | None = None
    every: int = 1000
    looks: int = 10
    objective: Objective = "bytes"
    error: Error = "l2"
    slack: float = 1.0
    resolution: int = 10_000
    seconds: float = field(default=0.0, init=False)
    """Seconds spent so far on averaging, by all workers of this process, and on plans."""
    plan: dict[str, Compressor] = field(default_factory=dict[str, Compressor], init=False)
    """The last plan."""

    def __post_init__(self) -> None:
        one_of(*get_args(Objective))("objective", self.objective)
        one_of(*get_args(Error))("error", self.error)
        if not 0 < self.looks < self.every:
            raise ThinwireError(f"looks is {self.looks} and every {self.every}; they must be 0 < looks < every")
        if (
            not 0.0 < self.slack < math.inf
            or self.resolution < 1
            or (self.candidates is not None and not self.candidates)
        ):
            raise ThinwireError(
                f"slack is {self.slack}, resolution {self.resolution}, candidates {self.candidates}; slack must be "
                "above 0, resolution at least 1, and candidates not empty"
            )
        self._base: Method | None = None
        self._installed: Method | None = None
        self._link: Link | None = None

    def after_step(self, session: Session) -> None:
        """Make a plan if it is due; see ``thinwire.session.transaction.Policy``. Collective every ``every`` steps."""
        if self._base is None or session.method is not self._installed:  # the user has set another method
            self._base, self.plan = session.method, {}
        warm = self._base.warmup.length if self._base.warmup else 0
        phase = session.step % self.every
        if phase == 0 and all(worker.watch is not None for worker in session.workers) and session.step > warm:
            self._replan(session, self._base)
        for worker in session.workers:
            if phase < self.every - self.looks or session.step < warm:
                worker.watch = None
            elif worker.watch is None:
                worker.watch = Snapshot({unit.name: unit.like for unit in self._units(session)})

    def _units(self, session: Session) -> list[Unit]:
        """Return the units that the method compressed before the first plan."""
        return [unit for unit in session.units if self._rule(unit).compressor != DENSE]

    def _rule(self, unit: Unit) -> Rule:
        return cast(Method, self._base).rule(unit.name, unit.param.shape, unit.param.numel())

    def _replan(self, session: Session, base: Method) -> None:
        started = time.perf_counter()
        seen = [cast(Snapshot, worker.watch) for worker in session.workers]
        units = [unit for unit in self._units(session) if all(unit.name in one.sums for one in seen)]
        options = {unit.name: self._options(unit) for unit in units}
        own = [self._table(worker, units, options, session) for worker in session.workers]
        paid = {unit.name: [self._cost(session, unit, option) for option in options[unit.name]] for unit in units}
        texts = session.collective.everyone.exchange_text(json.dumps([own, paid]))
        said = heard(texts, lambda text: _read(text, own, paid), "table of errors")
        tables = own if len(own) > 1 else [table for theirs, _ in said for table in theirs]
        known = [unit for unit in units if all(unit.name in table for table in tables)]
        errors = [mean_row(table[unit.name] for table in tables) for unit in known]
        costs = [mean_row(theirs[unit.name] for _, theirs in said) for unit in known]  # shards may differ in size
        uniform = [options[unit.name].index(self._rule(unit).compressor) for unit in known]
        finite = all(math.isfinite(e) for row in errors for e in row)
        if not (known and finite):
            why = "what was looked at is not finite" if known else "no unit was looked at on all ranks"
            session.ledger.note(f"step {session.step}: no new plan, since {why}")
            return
        chosen = improve(costs, errors, uniform, self.slack, self.resolution)
        self.plan = {unit.name: options[unit.name][q] for unit, q in zip(known, chosen, strict=True)}
        rules = (Rule(self.plan[unit.name], self._rule(unit).memory, glob.escape(unit.name)) for unit in known)
        method = replace(base, rules=(*rules, *base.rules), warmup=None)
        spent = time.perf_counter() - started + sum(one.seconds for one in seen)
        self.seconds += spent
        session.ledger.note(
            f"step {session.step}: L-GreCo plans {total(costs, chosen):,.6g} {self.objective} a step where uniform "
            f"takes {total(costs, uniform):,.6g}, losing {total(errors, chosen):.4g}, not {total(errors, uniform):.4g} "
            f"({digest(method)}; {spent:.2f} s, {len(texts[0]):,} bytes to each rank): "
            + ", ".join(f"{name} {choice!r}" for name, choice in self.plan.items())
        )
        if method.rules != session.method.rules:
            session.set_method(method)
            self._installed = session.method

    def _options(self, unit: Unit) -> list[Compressor]:
        """Return the candidates of one unit without repeats, including its own compressor and dense."""
        rule, base = self._rule(unit), cast(Method, self._base)
        options = [rule.compressor]
        for one in family(rule.compressor) if self.candidates is None else self.candidates:
            if declines(one, unit.param.shape) is None:
                with contextlib.suppress(ThinwireError):  # one that does not fit the memory or the route
                    tried = replace(base, rules=(replace(rule, compressor=one),))
                    options.append(tried.rules[0].compressor)
        return list(dict.fromkeys([*options, DENSE]))

    def _table(
        self, worker: Worker, units: Sequence[Unit], options: dict[str, list[Compressor]], session: Session
    ) -> Rows:
        found: Rows = {}
        for unit in units:
            ctx = Context(session.seed, session.step, unit.name, worker.rank, worker.kernels)
            squares = losses(cast(Snapshot, worker.watch).mean(unit.name), options[unit.name], ctx)
            found[unit.name] = [float(f"{e if self.error == 'l2sq' else math.sqrt(e):.6g}") for e in squares]
        return found

    def _cost(self, session: Session, unit: Unit, option: Compressor) -> float:
        base, world = cast(Method, self._base), session.collective.world
        if self.objective == "bytes" and world == 1:
            return payload_nbytes(option, unit.like)
        sent = bytes_alone(option, unit.like, world, base.route, base.second_stage_density_ratio)
        if self.objective == "bytes":
            return sent
        traits = option.traits
        owned = base.route != "all_gather" and traits.splittable
        messages = (world - 1) * (2 if traits.summable or led(option, base.route) or owned else 1)
        if self._link is None:
            link = session.collective.link
            self._link = link or measure(session.collective, session.timeout, unit.param.device)
        return messages * self._link.latency + sent * 8 / self._link.bandwidth


def _read(text: str, own: list[Rows], paid: Rows) -> tuple[list[Rows], Rows]:
    """Parse another rank's tables and costs, and check that they have the form of this rank's."""
    tables, costs = json.loads(text)
    if len(tables) != len(own):
        raise ValueError(f"{len(tables)} tables")
    for rows in (*tables, costs):
        for name, row in rows.items():
            if (name in paid and len(row) != len(paid[name])) or not all(type(x) in (int, float) for x in row):
                raise ValueError(f"{name}: {row!s:.40}")
    return [{name: [*map(float, row)] for name, row in rows.items()} for rows in tables], costs


def mean_row(rows: Iterable[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(column) for column in zip(*rows, strict=True)]


@undisturbed
def losses(x: Tensor, options: Sequence[Compressor], ctx: Context) -> list[float]:
    """Compute ``||x - C(x)||^2`` of each option, by the compressor's ``losses`` if it has one, else by compressing."""
    found: dict[Compressor, float] = {}
    for kind in dict.fromkeys(map(type, options)):
        alike = [one for one in options if type(one) is kind]
        one = alike[0]
        known = one.losses(x, alike) if isinstance(one, ErrorTable) else None
        found |= zip(alike, known if known is not None else [tried(other, x, ctx) for other in alike], strict=True)
    return [found[one] for one in options]


def tried(compressor: Compressor, x: Tensor, ctx: Context) -> float:
    """Compute ``||x - C(x)||^2`` by compressing."""
    state, rest = compressor.init(x, ctx), x.clone()
    compressor.decompress(compressor.compress(x, state, ctx), x, state, ctx).add_to(rest, alpha=-1.0)
    return float(rest.double().square().sum())


def digest(method: Method) -> str:
    """Return a short hash of a method, the same on all ranks that have it."""
    return hashlib.sha256(method.to_json().encode()).hexdigest()[:12]
