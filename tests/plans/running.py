"""What one rank does of a plan: it trains, writes down what the laws need, and goes on from a checkpoint once more."""

import contextlib
import logging
import traceback
import warnings

import torch
from torch.distributed.tensor import DTensor

from tests.plans import methods
from tests.plans.ambient import ambient
from tests.plans.checkpoints import fold, load, restore, save
from tests.plans.engines import Run, replicas, start
from tests.plans.model import Model, loss
from tests.plans.packing import pack
from tests.plans.plan import Plan
from tests.plans.ranks import group_of, mesh_of
from tests.plans.records import Report, Step, digests, local_states, named, part_of, parts_of, same, shared_states
from tests.plans.traffic import counted
from thinwire import ThinwireError


def ready(rank: int) -> None:
    """What a rank answers once it has been started."""


def run(rank: int, text: str, folder: str) -> bytes | None:
    """Called on every rank of a world of at least the plan's size; those beyond it only take part in making groups."""
    plan = Plan.from_json(text)
    logging.getLogger("thinwire").setLevel(logging.ERROR)
    if plan.engine == "fsdp2":
        mesh_of(plan.world // plan.shards, plan.shards)
    for size in sorted({plan.world, plan.fold or plan.world}):
        group_of(size)
    if rank >= plan.world:
        return None
    report = Report()
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            _run(plan, rank, folder, report)
        report.warned = [str(one.message) for one in seen if "thinwire" in one.filename]
    except BaseException:
        report.raised = traceback.format_exc()
    return pack(report)


def _run(plan: Plan, rank: int, folder: str, report: Report) -> None:
    try:
        with ambient(plan.ambient):
            run = start(plan, plan.method, seed=plan.seed)
    except ThinwireError as error:
        report.refused = str(error)
        return
    saved: list[bytes] = []
    _whole(plan, run, rank, report, saved, folder)
    report.notes = run.wire.ledger.notes
    if saved and plan.order == "rollback":
        restore(plan, run, saved[0], folder)
        _rest(plan, run, rank, report)
    run.wire.detach()
    kept = ("momentum", "nesterov", "weight_decay")
    report.left = [{key: group[key] for key in kept if key in group} for group in run.optimizer.param_groups]
    report.left_digests = digests(run)
    if not saved:
        return
    switched = plan.switch is not None and plan.switch < (plan.checkpoint or 0) and not report.refused_switch
    method = plan.then if switched and plan.then is not None else plan.method
    if plan.order != "rollback":
        again = load(plan, method, saved[0], folder)
        _rest(plan, again, rank, report)
        again.wire.detach()
    if plan.fold is not None:
        fold(plan, method, rank, saved[0], folder, report)


def _rest(plan: Plan, run: Run, rank: int, report: Report) -> None:
    """From the checkpoint to the end, once more."""
    again = Report()
    for step in range(plan.checkpoint or 0, plan.steps):
        _switch(plan, run, step, again)
        with ambient(plan.ambient):
            _exchange(plan, run, rank, step)
            if step != plan.left_out:
                run.step()
    kept = plan.zeros and any(
        layer.used != "always" for layer in plan.layers
    )  # gradients of 0, which no checkpoint holds
    late = plan.switch is not None and plan.switch >= (plan.checkpoint or 0)
    if not kept and not (late and again.refused_switch != report.refused_switch):  # a change waits for a step left out
        report.resumed = parts_of(run.inner)


def _whole(plan: Plan, run: Run, rank: int, report: Report, saved: list[bytes], folder: str) -> None:
    """The uninterrupted run."""
    twin = Model(plan, plan.seed)
    for step in range(plan.steps):
        _switch(plan, run, step, report)
        with ambient(plan.ambient):
            one = _before(plan, run, rank, step, twin)
            with counted(replicas(plan)) as sent:
                _exchange(plan, run, rank, step)
            one.counted = sent[0]
            _received(run, one)
            if step != plan.left_out:
                run.step()
        _after(run, one)
        one.left_out = step == plan.left_out
        report.steps.append(one)
        if step + 1 == plan.checkpoint:
            saved.append(save(plan, run, folder))
            report.saved = local_states(run)


def _exchange(plan: Plan, run: Run, rank: int, step: int) -> None:
    run.optimizer.zero_grad(set_to_none=not plan.zeros)
    if plan.looks:
        with torch.no_grad():
            loss(plan, run.model, rank, step, 0)
    for part in range(plan.accumulate):
        with contextlib.nullcontext() if part == plan.accumulate - 1 else run.quiet():
            value = loss(plan, run.model, rank, step, part)
            (value if run.scaler is None else run.scaler.scale(value)).backward()


def _switch(plan: Plan, run: Run, step: int, report: Report) -> None:
    if step != plan.switch or plan.then is None:
        return
    before = local_states(run)
    try:
        if plan.change == "set_method":
            run.wire.set_method(methods.build(plan.then))
            return
        run.wire.detach()
        try:
            run.attach(plan.then)
        except ThinwireError:
            run.attach(plan.method)
            raise
    except ThinwireError as error:
        report.refused_switch = str(error)
        report.changed_by_refusal = plan.change == "set_method" and not same(before, local_states(run))


def _before(plan: Plan, run: Run, rank: int, step: int, twin: Model) -> Step:
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), run.inner.parameters(), strict=True):
            mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
    twin.zero_grad()
    for part in range(plan.accumulate):
        loss(plan, twin, rank, step, part).backward()
    gradients = {name: part_of(param.grad) for name, param in named(twin).items()}
    return Step(gradients, local_states(run), shared_states(run), parts_of(run.inner))


def _received(run: Run, one: Step) -> None:
    wire = run.wire
    one.received = {name: part_of(param.grad) for name, param in named(run.inner).items()}
    one.row, one.clip, one.skipped = wire.row, wire.method.clip, wire.transaction.failed
    one.units = {u.name: (u.memory, u.method_compressor, u.compressor, u.gathered) for u in wire.units}
    one.scale = run.scaler.get_scale() if run.scaler is not None else 1.0


def _after(run: Run, one: Step) -> None:
    one.after, one.shared_after = local_states(run), shared_states(run)
    one.params_after = parts_of(run.inner)
    one.digests = digests(run)
