"""From what ranks wrote down to what workers did: shards put together, and the ranks of a node averaged."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.plans.plan import Plan
from tests.plans.records import States, Step


@dataclass
class Worker:
    """One worker's part in a step, whole, in float64."""

    gradients: dict[str, Tensor | None]
    before: States
    after: States
    shared_before: States
    shared_after: States
    received: dict[str, Tensor | None]
    params: dict[str, Tensor | None]
    dtypes: dict[str, torch.dtype]
    """Of the parameters."""


def workers_of(plan: Plan, ranks: list[Step]) -> list[Worker]:
    each = plan.world // plan.workers
    return [_worker(plan, ranks[i : i + each]) for i in range(0, plan.world, each)]


def _worker(plan: Plan, ranks: list[Step]) -> Worker:
    shape = {name: ranks[0].params[name] for name in ranks[0].gradients}
    parts = ranks if plan.shards > 1 else ranks[:1]

    def whole(found: list[Tensor | None]) -> Tensor | None:
        there = [x.double() for x in found if x is not None]
        return None if not there else torch.cat(there) if plan.shards > 1 else there[0]

    def states(found: list[States]) -> States:
        """Those that are shaped as the parameter is."""
        names = found[0].keys()
        kept = {name: [key for key, x in found[0][name].items() if x.shape == shape[name].shape] for name in names}
        return {name: {key: whole([one[name][key] for one in found]) for key in kept[name]} for name in names}

    return Worker(
        {name: _mean([one.gradients[name] for one in ranks]) for name in ranks[0].gradients},
        states([one.before for one in parts]),
        states([one.after for one in parts]),
        states([one.shared_before for one in parts]),
        states([one.shared_after for one in parts]),
        {name: _over(whole([one.received[name] for one in parts]), ranks[0].scale) for name in ranks[0].received},
        {name: whole([one.params[name] for one in parts]) for name in ranks[0].params},
        {name: x.dtype for name, x in ranks[0].params.items() if x is not None},
    )


def _over(x: Tensor | None, scale: float) -> Tensor | None:
    return None if x is None else x / scale


def _mean(found: list[Tensor | None]) -> Tensor | None:
    there = [x.double() for x in found if x is not None]
    return sum(there[1:], there[0]) / len(found) if there else None


def clip(workers: list[Worker], threshold: float | None, scale: float) -> None:
    """What ``thinwire.session.clipping`` does to each worker's gradients, in float64."""
    for worker in workers:
        there = [g for g in worker.gradients.values() if g is not None]
        if threshold is None or not there:
            continue
        norm = torch.stack([g.square().sum() for g in there]).sum().sqrt()
        factor = min(1.0, threshold * len(workers) ** 0.5 / (float(norm) + 1e-6 / scale))
        worker.gradients = {name: None if g is None else g * factor for name, g in worker.gradients.items()}
