"""The laws that every plan must hold, looked at in what its ranks wrote down."""

from collections.abc import Iterator

import torch

from tests.plans import conservation, simulating
from tests.plans.outcome import Outcome
from tests.plans.plan import Plan
from tests.plans.records import Report, Step
from tests.plans.workers import clip, workers_of

FAR = 0.2
"""Of the whole way that a run has gone: what two runs may be apart whose sums have different orders."""


def judge(plan: Plan, reports: list[Report]) -> Outcome:
    """Whether a plan was refused, and every law that it broke."""
    if raised := [f"rank {rank} raised\n{one.raised}" for rank, one in enumerate(reports) if one.raised]:
        return Outcome(plan, [f"no other error: {raised[0]}"])
    if any(one.refused for one in reports):
        alike = all(one.refused for one in reports)
        return Outcome(
            plan, [] if alike else [f"refused by all ranks or none: {[o.refused for o in reports]}"], reports[0].refused
        )
    faults: list[str] = []
    held: list[str] = []
    for law in LAWS:
        found = law(plan, reports)
        looked = False
        for said in found:
            looked = True
            if said:
                faults.append(f"{law.__name__}: {said}")
        held += [law.__name__] if looked else []
    return Outcome(plan, faults, "", tuple(held), reports[0].refused_switch)


Found = Iterator[str]
"""What is wrong, "" for a look at which nothing was."""


def replicas(plan: Plan, reports: list[Report]) -> Found:
    """After every step parameters, optimizer states, shared states, and which gradients there are, are alike."""
    for number in range(plan.steps):
        yield from _alike(plan, [one.steps[number].digests for one in reports], f"step {number}")
        skipped = {one.steps[number].skipped for one in reports}
        yield "" if len(skipped) == 1 else f"step {number}: skipped by some ranks alone"
    yield from _alike(plan, [one.left_digests for one in reports], "after detach")


def _alike(plan: Plan, digests: list[dict[str, str]], when: str) -> Found:
    for rank, mine in enumerate(digests):
        theirs = digests[rank % plan.shards]
        apart = [key for key in theirs.keys() | mine.keys() if mine.get(key) != theirs.get(key)]
        yield f"{when}: ranks {rank % plan.shards} and {rank} differ in {sorted(apart)[:3]}" if apart else ""


def conserved(plan: Plan, reports: list[Report]) -> Found:
    """What was sent and what is pending is what was compensated."""
    if plan.options and ({"reduce_scatter", "all_gather"} & plan.options.keys()):
        return
    for number in range(plan.steps):
        steps = [one.steps[number] for one in reports]
        if steps[0].skipped or steps[0].left_out:
            continue
        workers = workers_of(plan, steps)
        clip(workers, steps[0].clip, steps[0].scale)
        for name, unit in steps[0].units.items():
            for wrong in conservation.check(name, unit, workers, steps[0].clip is not None):
                yield f"step {number}: {wrong}"
            yield ""


def void(plan: Plan, reports: list[Report]) -> Found:
    """A step that is skipped has changed nothing."""
    for rank, one in enumerate(reports):
        for number, step in enumerate(one.steps):
            if step.skipped or step.left_out:
                moved = [n for n, x in step.params.items() if not _equal(x, step.params_after[n])]
                moved += [n for n in step.before if not _same(step.before[n], step.after[n])]
                moved += [n for n in step.shared_before if not _same(step.shared_before[n], step.shared_after[n])]
                yield f"step {number} was skipped, and rank {rank} has changed {moved[0]}" if moved else ""
    for number in range(plan.steps):
        steps = [one.steps[number] for one in reports]
        finite = all(bool(g.isfinite().all()) for step in steps for g in step.gradients.values() if g is not None)
        yield f"step {number} was skipped, and all gradients are finite" if steps[0].skipped and finite else ""


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)


def simulated(plan: Plan, reports: list[Report]) -> Found:
    """The simulator ends with the same bits, or close to them where sums have an order of their own."""
    if not simulating.expressible(plan, bool(reports[0].refused_switch)):
        return
    there = [step.params_after for step in reports[0].steps]
    ours = simulating.simulated(plan, bool(reports[0].refused_switch))
    exact = plan.workers == 2 or not simulating.summed(reports[0].steps)
    if plan.engine == "fsdp2" and any(step.clip is not None for step in reports[0].steps):
        exact = False  # the norm goes over the shards, squared, and is rounded twice more
    for number, (a, b) in enumerate(zip(there, ours, strict=True)):
        off = simulating.apart(a, b)
        if off > (0.0 if exact else FAR * _way(reports[0].steps)):
            yield f"step {number}: the simulator is {off:.3g} off, of a way of {_way(reports[0].steps):.3g}"
            return
        yield ""


def _way(steps: list[Step]) -> float:
    return simulating.apart(steps[0].params, steps[-1].params_after)


def resumed(plan: Plan, reports: list[Report]) -> Found:
    """A run that goes on from a checkpoint ends where the uninterrupted one does."""
    for rank, one in enumerate(reports):
        if one.resumed is not None:
            off = simulating.apart(one.resumed, one.steps[-1].params_after)
            limit = 0.0 if _one_order(plan, one.steps) else FAR * _way(one.steps)
            yield f"rank {rank} ends {off:.3g} off, of a way of {_way(one.steps):.3g}" if off > limit else ""


def _one_order(plan: Plan, steps: list[Step]) -> bool:
    """DDP's first step has other buckets than the later ones, and so other sums and other cuts."""
    if plan.engine != "ddp" or (plan.wrap or {}).get("find_unused_parameters"):
        return True
    routes = {unit["options"].get("route") for unit in (plan.method, plan.then or plan.method)}
    one_bucket = "bucket_cap_mb" not in (plan.wrap or {})
    return (one_bucket or routes == {"all_gather"}) and (plan.workers == 2 or not simulating.summed(steps))


def folded(plan: Plan, reports: list[Report]) -> Found:
    """At another number of ranks each has the mean of what was pending, and replicas stay alike."""
    new = [one for one in reports if one.folded is not None]
    for name in reports[0].saved if new else ():
        for key in ("residual", "momentum", "estimate", "average", "pending_residual"):
            rows = [one.saved[name][key].double() for one in reports if key in one.saved[name]]
            for one in new:
                local, _ = one.folded or ({}, {})
                got = local[name].get(key)
                if rows and got is None:
                    yield f"{name}: {key} is gone"
                elif rows and got is not None and got.numel():
                    off = (got.double() - sum(rows) / len(rows)).abs().max()
                    scale = max(float(row.abs().max()) for row in rows)
                    yield f"{name}: {key} is not the mean, but off by {off:.3g}" if off > 0.01 * scale else ""
    if new:
        yield from _alike(plan, [one.folded_digests for one in new], "after the fold")


def bytes_count(plan: Plan, reports: list[Report]) -> Found:
    """The ledger has what was really handed to the collectives, and compressed is less than dense."""
    for rank, one in enumerate(reports):
        for number, step in enumerate(one.steps):
            row = step.row
            if row is None or plan.nodes:
                continue
            if abs(row.wire_bytes - step.counted) > 1e-6 * step.counted:
                yield f"step {number}: rank {rank} sent {step.counted} bytes, and its ledger has {row.wire_bytes}"
            dtypes = {x.dtype for x in step.params.values() if x is not None}
            if simulating.compressed(step) and torch.float64 not in dtypes:
                slack = 64.0 * plan.workers + 16.0 * plan.workers * len(step.units)
                # the faster route may be an all-gather of what two phases would carry in fewer bytes than dense
                more = plan.workers / 2 if _route(plan, number) == "auto" else 1.0
                if row.compressed_wire_bytes > more * row.compressed_dense_bytes + slack:
                    yield f"step {number}: {row.compressed_wire_bytes} bytes, dense {row.compressed_dense_bytes}"
            yield ""


def _route(plan: Plan, step: int) -> str | None:
    changed = plan.then is not None and plan.switch is not None and step >= plan.switch
    return ((plan.then if changed else plan.method) or {}).get("options", {}).get("route")


def quiet(plan: Plan, reports: list[Report]) -> Found:
    """Nothing is said of a run in which nothing is wrong; a method that is refused has changed nothing."""
    for one in reports:
        yield f"warned: {one.warned[0]}" if one.warned else ""
        yield "a refused method has changed a state" if one.changed_by_refusal else ""
        yield "some ranks refused a method alone" if bool(one.refused_switch) != bool(reports[0].refused_switch) else ""


def given_back(plan: Plan, reports: list[Report]) -> Found:
    """After detach the optimizer has the settings that it began with."""
    for one in reports:
        for group in one.left:
            changed = {key: value for key, value in group.items() if value != plan.optimizer["options"].get(key, value)}
            yield f"{changed} are left in the optimizer" if changed else ""


LAWS = (replicas, conserved, void, simulated, resumed, folded, bytes_count, quiet, given_back)
