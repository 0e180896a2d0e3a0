"""A plan in the simulator, and whether its bits are to be those of the real run."""

import torch
from torch import Tensor

from tests.plans import methods
from tests.plans.ambient import ambient
from tests.plans.model import Model, loss, optimizer_of
from tests.plans.plan import Plan, Spec
from tests.plans.records import Step, parts_of
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.exchange.units import DENSE

ASSUMED = "1gbit,0.1ms"
"""The simulator's link, by which it chooses routes."""


def expressible(plan: Plan, refused_switch: bool) -> bool:
    """Whether the simulator can run such a plan, and promises it the same steps."""
    specs = [plan.method] + ([plan.then] if plan.then is not None and not refused_switch else [])
    routes = {spec["options"].get("route", _default(spec["recipe"])) for spec in specs}
    if refused_switch and plan.change == "reattach":  # the first method began anew
        return False
    if plan.nodes or plan.shards > 1 or any(layer.sparse for layer in plan.layers):
        return False
    if plan.options and ({"reduce_scatter", "all_gather"} & plan.options.keys()):
        return False
    if (
        plan.scaler
        or plan.left_out is not None
        or (plan.zeros and any(layer.used != "always" for layer in plan.layers))
    ):
        return False
    if "auto" in routes and plan.link != ASSUMED:  # chosen by a link that is measured
        return False
    one_bucket = plan.engine == "bare" or (
        plan.engine == "ddp"
        and len({layer.dtype for layer in plan.layers}) == 1
        and "bucket_cap_mb" not in (plan.wrap or {})
    )
    return routes == {"all_gather"} or one_bucket  # two phases cut a bucket, and the simulator has one


def _default(recipe: str) -> str:
    return "two_phase" if recipe in TWO_PHASES else "all_gather"


TWO_PHASES = ("qsgd", "maxmin", "terngrad", "natural", "signsgd", "ef_sign", *methods.LINKED)


def simulated(plan: Plan, refused_switch: bool) -> list[dict[str, Tensor | None]]:
    """The parameters after each step."""
    model = Model(plan, plan.seed)
    optimizer = optimizer_of(plan, model)
    sim = _workers(plan, plan.method, model, optimizer)
    found: list[dict[str, Tensor | None]] = []

    def of(rank: int, step: int) -> Tensor:
        for part in range(plan.accumulate - 1):
            loss(plan, model, rank, step, part).backward()
        return loss(plan, model, rank, step, plan.accumulate - 1)

    for step in range(plan.steps):
        if step == plan.switch and plan.then is not None and not refused_switch:
            if plan.change == "set_method":
                sim.session.set_method(methods.build(plan.then))
            else:
                sim.session.detach()
                sim = _workers(plan, plan.then, model, optimizer)
        with ambient(plan.ambient if plan.ambient == "autocast" else ""):  # gradients differ under it, nothing else may
            sim.step(lambda rank, step=step: of(rank, step))
        found.append(parts_of(model))
    sim.session.detach()
    return found


def _workers(plan: Plan, method: Spec, model: Model, optimizer: torch.optim.Optimizer) -> SimulatedWorkers:
    return SimulatedWorkers(model, methods.build(method), optimizer, plan.workers, plan.seed, "reference")


def summed(steps: list[Step]) -> bool:
    """Whether anything went by an all-reduce, whose order of more than two is its own."""
    return any(
        stage.traits.leader_selected or (stage.traits.summable and not gathered)
        for step in steps
        for _, _, stage, gathered in step.units.values()
    )


def compressed(step: Step) -> bool:
    return any(method != DENSE and stage != DENSE for _, method, stage, _ in step.units.values())


def apart(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> float:
    """The mean difference of two sets of parameters; what is no number in both is alike."""
    off = [torch.zeros(1, dtype=torch.float64)]
    for name, x in a.items():
        y = b[name]
        if x is not None and y is not None:
            alike = (x == y) | (x.isnan() & y.isnan())
            off.append(torch.where(alike, 0.0, (x.double() - y.double()).abs()).flatten())
    return float(torch.cat(off).nan_to_num(torch.inf).mean())
