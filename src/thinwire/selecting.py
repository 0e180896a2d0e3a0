"""Compensate and select in one pass over memory, for the units whose elements a threshold chooses."""

from collections.abc import Sequence

from torch import Tensor

from thinwire.core import Context, Pass, flat
from thinwire.units import Unit, Worker


def select(
    units: Sequence[Unit], grads: Sequence[Tensor], worker: Worker, contexts: Sequence[Context], scale: float
) -> dict[int, Tensor]:
    """Do what the memories and the selection of these units do, as far as a kernel can, for all of them together.

    Returns:
        For each unit that was done: the ascending indices that are sent. Its next state is written, what is asked
        is the new residual, and its gradient has been cleared.
    """
    works: dict[int, Pass] = {}
    thresholds: dict[int, Tensor] = {}
    selections = {
        i: selection
        for i, (unit, ctx) in enumerate(zip(units, contexts, strict=True))
        if unit.memory.accumulation is not None
        and (selection := unit.compressor.sampling(unit.param.shape, ctx)) is not None
    }
    for i, selection in selections.items():
        work = _pass(units[i], grads[i], worker, scale)
        if work is not None and worker.kernels.runs(work):
            works[i] = work
            thresholds[i] = selection.threshold(worker.kernels.sample(work, selection.start, selection.stride))
    found = worker.kernels.accumulate(list(works.values()), list(thresholds.values()))
    return {
        i: selections[i].settle(works[i].new_residual, chosen, thresholds[i])
        for i, chosen in zip(works, found, strict=True)
    }


def _pass(unit: Unit, grad: Tensor, worker: Worker, scale: float) -> Pass | None:
    """None where the memory has to do more, or tensors lie differently in memory."""
    rule, local = unit.memory.accumulation, worker.local[unit.name]
    if rule is None or "carried" in local.now or grad.stride() != local.now["residual"].stride():
        return None
    now, new = local.now, local.next
    u, new_u = (flat(state["momentum"]) if rule.momentum is not None else None for state in (now, new))
    return Pass(rule, flat(grad), flat(now["residual"]), flat(new["residual"]), u, new_u, scale)
