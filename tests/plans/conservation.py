"""Law: what was sent and what is still pending is what was compensated. A function for each memory, in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import thinwire
from tests.plans.workers import Worker
from thinwire.core import Compressor, Memory
from thinwire.exchange.units import DENSE, payload_like

ROUNDINGS = 64.0
"""How many roundings of the shortest dtype that takes part may add up."""


@dataclass
class Case:
    """One unit in one step: of each worker its gradient and its states, and what all received."""

    memory: Memory
    exact: bool
    g: list[Tensor]
    old: list[dict[str, Tensor]]
    new: list[dict[str, Tensor]]
    shared_old: dict[str, Tensor]
    shared_new: dict[str, Tensor]
    received: Tensor
    param: Tensor

    def before(self, key: str) -> Tensor:
        """The mean over workers; 0 where there is no such state."""
        return _mean([state.get(key, torch.zeros_like(self.param)) for state in self.old])

    def after(self, key: str) -> Tensor:
        return _mean([state.get(key, torch.zeros_like(self.param)) for state in self.new])

    @property
    def gradient(self) -> Tensor:
        return _mean(self.g)


def _mean(each: list[Tensor]) -> Tensor:
    return sum(each[1:], each[0]) / len(each)


Sides = Iterator[tuple[str, Tensor, Tensor]]
"""What is said of a unit, and the two sides of the equation."""


def _feedback(case: Case) -> Sides:
    decay, beta = getattr(case.memory, "decay", 1.0), getattr(case.memory, "beta", 1.0)
    compensated = decay * case.before("residual") + beta * case.gradient
    yield "sent + residual = compensated", beta * case.received + case.after("residual"), compensated


def _corrected(case: Case) -> Sides:
    memory, sent, p = case.memory, case.received, case.param
    m, wd, u = memory.momentum, memory.weight_decay, case.before("momentum")
    g = case.gradient + (wd * p if memory.decay == "local" else 0.0)
    if wd and memory.decay == "decoupled":
        sent = sent - wd * p
    elif wd and memory.decay == "separate":
        w = m * case.shared_old["decay"] + wd * p
        if m:  # as SGD without momentum has no buffer
            yield "the velocity of the decay", case.shared_new["decay"], w
        sent = sent - (wd * p + m * w if memory.nesterov else w)
    entered = m * (u + g) + g if memory.nesterov else m * u + g
    yield "sent + residual = compensated", sent + case.after("residual"), case.before("residual") + entered


def _momentum(case: Case) -> Sides:
    memory, p = case.memory, case.param
    decoupled = memory.decay == "decoupled"
    g = case.gradient + case.before("pending_residual") + (0.0 if decoupled else memory.weight_decay * p)
    b = memory.momentum * case.shared_old.get("momentum", torch.zeros_like(p)) + g
    if memory.momentum:
        yield "momentum after averaging", case.shared_new["momentum"], b
        g = g + memory.momentum * b if memory.nesterov else b
    if case.exact:
        yield "the gradient of SGD", case.received, g + (memory.weight_decay * p if decoupled else 0.0)


def _none(case: Case) -> Sides:
    if case.exact:
        yield "sent = compensated", case.received, case.gradient + case.before("pending_residual")


def _vote(case: Case) -> Sides:
    beta = case.memory.momentum
    compensated = case.g
    if beta:
        for old, new, g in zip(case.old, case.new, case.g, strict=True):
            yield "the momentum of a voter", new["momentum"], beta * old["momentum"] + (1.0 - beta) * g
        compensated = [state["momentum"] for state in case.new]
    yield "nothing but sides", case.received, case.received.sign()
    if any("pending_residual" in state for state in case.old):
        return
    votes = _mean([x if case.exact else x.sign() for x in compensated])
    clear = votes.abs() > 1e-3 * votes.abs().amax() if votes.numel() else votes.bool()
    for x in compensated:
        clear &= (x != 0) | case.exact
    yield "the side that won", torch.where(clear, case.received, 0.0), torch.where(clear, votes.sign(), 0.0)


def _decoupled(case: Case) -> Sides:
    sent = case.memory.decay * case.before("residual") + case.gradient - case.after("residual")
    if not case.memory.sign:
        yield "sent + momentum = compensated", case.received, sent
        return
    clear = sent.abs() > 0.02 * sent.abs().amax() if sent.numel() else sent.bool()
    yield (
        "the side of what left the momentum",
        torch.where(clear, case.received, 0.0),
        torch.where(clear, sent.sign(), 0.0),
    )


def _shifted(case: Case) -> Sides:
    memory = case.memory
    believed = case.shared_new["estimate"]
    yield "the estimate is the mean of the ranks'", believed, case.after("estimate")
    yield "the optimizer gets the estimate", case.received, case.shared_new.get("server", believed)
    for old, new, g in zip(case.old, case.new, case.g, strict=True):
        if isinstance(memory, thinwire.memories.EControl):
            yield "sent + residual = compensated", new["residual"] + new["estimate"], old["residual"] + g
        elif all(torch.equal(new[key], old[key]) for key in old):  # absent
            continue
        elif memory.eta < 1.0:
            yield "the average", new["average"], (1.0 - memory.eta) * old["average"] + memory.eta * g


def _adam(case: Case) -> Sides:
    beta, live = case.memory.beta1, case.shared_new.get("live", 1.0)
    compensated = beta * case.shared_old["momentum"] + (1.0 - beta) * case.gradient + case.before("residual")
    yield "sent + residual = compensated", case.received + case.after("residual"), compensated * live
    yield "the momentum is what was received", case.shared_new["momentum"], case.received


LAWS: dict[type[Memory], Callable[[Case], Sides]] = {
    thinwire.memories.ErrorFeedback: _feedback,
    thinwire.memories.SteadyFeedback: _feedback,
    thinwire.memories.MomentumCorrection: _corrected,
    thinwire.memories.Momentum: _momentum,
    thinwire.memories.NoMemory: _none,
    thinwire.memories.MajorityVote: _vote,
    thinwire.memories.DecoupledMomentum: _decoupled,
    thinwire.memories.EF21: _shifted,
    thinwire.memories.EControl: _shifted,
    thinwire.memories.CompressedMomentum: _adam,
}


def check(
    name: str, unit: tuple[Memory, Compressor, Compressor, bool], workers: list[Worker], clipped: bool
) -> list[str]:
    """What of one unit's step does not hold."""
    memory, _, stage, _ = unit
    first = workers[0]
    param, given = first.params[name], [w.gradients[name] for w in workers]
    if param is None or all(g is None for g in given):
        moved = [key for w in workers for key, x in w.before[name].items() if not torch.equal(x, w.after[name][key])]
        return [f"{name}: nobody used it, and its {moved[0]} has changed"] if moved else []
    g = [torch.zeros_like(param) if x is None else x for x in given]
    received = torch.zeros_like(param) if (found := first.received[name]) is None else found
    if not all(bool(x.isfinite().all()) for x in (*g, received, param)):
        return []
    old, new, shared = [w.before[name] for w in workers], [w.after[name] for w in workers], first.shared_before[name]
    received = received - shared.get("pending_residual", torch.zeros_like(param))
    case = Case(memory, stage == DENSE, g, old, new, shared, first.shared_after[name], received, param)
    states = [x for state in (*old, *new, shared, case.shared_new) for x in state.values()]
    largest = max((float(x.abs().max()) for x in (*g, received, *states, param * 0.1) if x.numel()), default=0.0)
    rounded = set(first.dtypes.values()) if clipped else {first.dtypes[name]}  # a norm is over all of them
    limit = max(_rounding(memory, stage, dtype, param) for dtype in rounded) * largest
    wrong: list[str] = []
    for said, left, right in LAWS[type(memory)](case):
        off = float((left - right).abs().max()) if left.numel() else 0.0
        if not off <= limit:
            wrong.append(f"{name} ({type(memory).__name__}, {stage}): {said}: off by {off:.3g}, of {largest:.3g}")
    return wrong


def _rounding(memory: Memory, stage: Compressor, dtype: torch.dtype, param: Tensor) -> float:
    """Relative to the largest of what takes part; what is summed in a short dtype is rounded in that."""
    works = memory.dtype(dtype)
    taking_part = [dtype, works]
    if stage.traits.summable or stage.traits.leader_selected:
        taking_part.append(payload_like(stage, torch.empty_like(param, device="meta", dtype=works))[0].dtype)
    return ROUNDINGS * max(torch.finfo(one).eps for one in taking_part)
