"""``attach``, the entry point: it finds the wrapper of the model and installs the engine for it (``engines``).

``engines/source.py`` says what all engines offer. Whatever is wrong is an error before anything has been changed.
"""

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.collectives import TIMEOUT, ControlChannel
from thinwire.comm.control import ATTACH, Together
from thinwire.comm.link import Link
from thinwire.comm.process_group import ProcessGroup
from thinwire.comm.simulated import Local
from thinwire.comm.texts import is_known
from thinwire.core import Compressor, ThinwireError
from thinwire.core.ambient import undisturbed
from thinwire.core.checks import of_type, optional, seconds
from thinwire.engines.bare import Plain
from thinwire.engines.ddp import Ddp
from thinwire.engines.fsdp2.engine import Fsdp2, Fsdp2Options, is_fsdp2, sharded_channel
from thinwire.engines.outer.outer_engine import check_for_gradients, over
from thinwire.exchange.workers import Worker
from thinwire.kernels.select import Choice, choose
from thinwire.methods.given import method_of
from thinwire.methods.method import Method, Rule
from thinwire.session.arguments import check_held, inside, model_of, optimizer_of, options, unwrapped
from thinwire.session.migrate import agree
from thinwire.session.optimizers import Optimizers, joined
from thinwire.session.replicas import EVERY
from thinwire.session.rounds import OnLost, OnNonfinite, Scaler
from thinwire.session.session import Session
from thinwire.session.transaction import Policy

OPTIONS = of_type(Fsdp2Options, 'pass thinwire.Fsdp2Options(replicate=mesh["replicate"])')
OUTSIDE: object = dist.GroupMember.NON_GROUP_MEMBER
"""The group that torch returns to a rank outside it."""


@undisturbed
def attach(
    model: nn.Module,
    method: Method | Compressor | Rule,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    process_group: dist.ProcessGroup | None = None,
    scaler: Scaler | None = None,
    ranks_per_node: int | DeviceMesh | None = None,
    emulate_link: Link | str | None = None,
    fsdp2: Fsdp2Options | None = None,
    sparse_gradients: bool = False,
    policy: Policy | None = None,
    on_nonfinite: OnNonfinite = "skip",
    on_lost: OnLost = "error",
    timeout: float | timedelta = TIMEOUT,
    check_every: int = EVERY,
    kernels: Choice = "auto",
    seed: int = 0,
) -> Session:
    """Exchange the gradients of a model by ``method``. A collective call: all ranks call it with the same arguments.

    Args:
        model: a ``DistributedDataParallel``; a model sharded by ``fully_shard`` on a mesh of one dimension; or, with
            ``process_group=``, a model without a wrapper. On gloo or NCCL. Call it before the first step or between
            any two steps.
        method: ``thinwire.dgc()``, ``thinwire.topk()``, ``thinwire.cast()``, ``thinwire.dense()`` or one of your own. A
            compressor, e.g. ``TopK(0.01) >> Quantize(4)``, gets error feedback if it needs it; vectors are sent dense.
        optimizer: required by methods with a memory (dgc, topk), whose state is committed when the optimizer steps.
            dgc takes over ``momentum``, ``nesterov``, ``weight_decay`` and the momentum buffers until ``detach()``, and
            follows later changes in the optimizer's groups. A wrapped optimizer (a framework's, SAM, Lookahead) works
            too. Pass a list if several optimizers each step a part of the parameters: the state is committed when all
            have stepped.
        process_group: (no wrapper) the ranks that train the model, e.g. ``dist.group.WORLD``. They start from the
            parameters and buffers of its first rank, and average gradients from then on, as with DDP, but without
            DDP's copies into buckets. Buffers are not broadcast again. Accumulate under ``wire.no_sync()``.
        scaler: the ``GradScaler`` of a mixed-precision run, so that residuals are stored without the loss scale.
        ranks_per_node: (not FSDP2) compress between nodes only. The number of consecutive ranks of a node, or a
            ``DeviceMesh`` of two dimensions (between nodes, within the node). The ranks of a node average their
            gradients and act as one worker. The ledger's wire bytes are those between nodes, and ``emulate_link``
            is the link between nodes.
        emulate_link: emulate a link of this speed, e.g. ``"100mbit"``, for experiments on one machine.
        fsdp2: (FSDP2) the replicas, and how shards exchange gradients and parameters, see ``Fsdp2Options``.
        sparse_gradients: (no wrapper) give the optimizer sparse tensors if at most 1/32 of the elements arrive, so
            that it updates only the elements received. For contiguous parameters of float32 or float64,
            ``torch.optim.SGD`` and ``Adagrad``, and a method that leaves them neither momentum nor weight decay, as dgc
            does. ``clip_grad_norm_`` does not accept sparse gradients.
        policy: changes the method during training, e.g. ``thinwire.policies.LGreCo``.
        on_nonfinite: if a gradient is nonfinite on any rank, all ranks skip the step ("skip"), or raise when the
            optimizer is about to step ("raise"). With a scaler, the scaler skips. It applies to methods with a memory;
            ``dense()`` and ``cast()`` pass nonfinite values on, as DDP does. With local updates, all workers begin
            again from the anchor ("skip"), or the worker alone does, and sends zeros ("zero").
        on_lost: (local updates, no wrapper, gloo) if a worker is gone, the others raise ("error"), or they make a group
            of their own, repeat the exchange and go on ("continue"). The store must outlive the worker, as torchrun's.
        timeout: seconds, or a ``timedelta``, after which an exchange that a rank does not join is an error. Make it
            longer than any evaluation or save that only some ranks do. On NCCL the process group's own timeout
            applies.
        check_every: at attach and after so many exchanges, the ranks compare hashes of their parameters. If they
            differ, an error names the first parameter and the ranks. 0 compares at attach only.
        kernels: the loops that compress: "reference" is plain PyTorch, "cpu" needs ``thinwire[cpu]``, "auto" takes the
            fastest available; the ledger names it. All give the same bits.
        seed: seed of all randomness; equal on all ranks.

    Returns:
        The session, with ``report()``, ``set_method()``, ``detach()``, and ``ledger``.

    Raises:
        ThinwireError: the model is none of these, its comm hook is taken, its optimizer does not fit the method, ranks
            pass different arguments, or a compressed parameter has sparse gradients. Nothing has been changed then.

    Example::

        ddp = DistributedDataParallel(model)
        wire = thinwire.attach(ddp, thinwire.dgc(density=0.001), optimizer=optimizer)

        fully_shard(model, mesh=mesh["shard"])
        wire = thinwire.attach(model, thinwire.topk(0.01), optimizer=optimizer,
            fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"]))

        wire = thinwire.attach(model, thinwire.dgc(0.001), optimizer=optimizer, process_group=dist.group.WORLD)
    """
    model = unwrapped(model)
    channel = _channel(model, process_group, fsdp2, timeout)
    with Together(channel, *ATTACH) as together:
        with together.alone():
            model = model_of(model, dist.is_initialized())
            steps = optimizer_of("optimizer", joined(optimizer))
            method = method_of(method)
            asked = options(
                seed=seed, emulate_link=emulate_link, scaler=scaler, on_nonfinite=on_nonfinite, timeout=timeout,
                kernels=kernels, ranks_per_node=ranks_per_node, process_group=process_group,
                sparse_gradients=sparse_gradients, policy=policy, on_lost=on_lost,
            )  # fmt: skip
            nodes, sharded = asked["ranks_per_node"], optional(OPTIONS)("fsdp2", fsdp2) or Fsdp2Options()
            patience: float = asked["timeout"]
            engine = _engine(model, steps, nodes, process_group, sparse_gradients, sharded, patience)
            if method.local is not None:
                given = {"scaler": scaler, "ranks_per_node": nodes, "sparse_gradients": sparse_gradients}
                engine = over(model, engine, steps, on_lost, given | {"policy": policy})
            else:
                check_for_gradients(on_nonfinite, on_lost)
            named = engine.exchanged()
            check_held(engine.stepped(named), steps)
            engine.fits(method)
            replicas = engine.compared(check_every)
            chosen, note = choose(asked["kernels"], named[0][1].device)
            said = {
                "engine": type(engine).__name__,
                "ranks_per_node": nodes,
                "sparse_gradients": sparse_gradients,
                "replicate": sharded.replicate is not None,
                "reduce_scatter": sharded.reduce_scatter,
                "all_gather": sharded.all_gather,
                "check_every": check_every,
                "on_nonfinite": on_nonfinite,
                "on_lost": on_lost,
            }
            lines = [*((key, str(value)) for key, value in said.items()), *replicas.described]
        agree(engine.channel, lines)
        collective = engine.collective(asked["emulate_link"], together)
        try:
            if not engine.shares:
                replicas.begin()
            worker = Worker(collective.rank, asked["seed"], kernels=chosen)
            rounds = engine.rounds(steps, scaler, on_nonfinite)
            session = Session(named, method, collective, rounds, worker.seed, [worker], patience, policy)
        except BaseException:
            collective.close()
            raise
        session.fits = engine.fits
        session.use_kernels(chosen, note)
        session.no_sync = engine.no_sync
        session.replicas = replicas
        try:
            if engine.shares:
                engine.share(session)
            with together.alone():
                engine.install(session)
        except BaseException as error:  # the memory may have taken over the momentum already
            with contextlib.suppress(ThinwireError):  # the first error is the one to report
                if is_known(error):
                    session.detach()
                else:
                    session.abandon()
            raise
        return session


def _engine(
    model: nn.Module,
    optimizer: Optimizers | None,
    nodes: int | DeviceMesh | None,
    process_group: dist.ProcessGroup | None,
    sparse_gradients: bool,
    fsdp2: Fsdp2Options,
    timeout: float,
) -> Ddp | Plain | Fsdp2:
    """Make the engine for the model's wrapper, or raise an error if none fits."""
    wrapped = isinstance(model, DistributedDataParallel) or is_fsdp2(model)
    if wrapped and (process_group is not None or sparse_gradients):
        raise ThinwireError(
            "process_group= and sparse_gradients= are for a model without a wrapper; this one averages its gradients "
            "over a group that it was given before: leave them out"
        )
    if is_fsdp2(model):
        if nodes is not None:
            raise ThinwireError(
                "ranks_per_node= is for DDP; with FSDP2, shard inside a node and pass the mesh between nodes: "
                "fsdp2=Fsdp2Options(replicate=mesh)"
            )
        return Fsdp2(model, fsdp2, optimizer is not None, timeout)
    if fsdp2 != Fsdp2Options():
        raise ThinwireError(
            "fsdp2= is for a model that went through fully_shard; this model has no shards: leave it out"
        )
    if isinstance(model, DistributedDataParallel):
        return Ddp(model, nodes, timeout)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ThinwireError(
            "FullyShardedDataParallel (FSDP1) is not supported; replace it by torch.distributed.fsdp.fully_shard(model)"
        )
    if process_group is not None:
        return Plain(model, process_group, nodes, sparse_gradients, optimizer, timeout)
    raise ThinwireError(
        f"attach() takes a DistributedDataParallel or a model that went through fully_shard, not "
        f"{type(model).__name__}; wrap the model first, or pass process_group=dist.group.WORLD, after "
        f"init_process_group(), to exchange the gradients of the model as it is{inside(model)}"
    )


def _channel(
    model: nn.Module, process_group: dist.ProcessGroup | None, fsdp2: Fsdp2Options | None, timeout: float | timedelta
) -> ControlChannel:
    """Return a control channel to the ranks to tell if this rank can't attach: those of the model if they are known."""
    if not (dist.is_available() and dist.is_initialized()) or cast(object, process_group) is OUTSIDE:
        return Local.of(1)[0]
    patience = TIMEOUT
    try:
        patience = seconds("timeout", timeout)
        if isinstance(model, DistributedDataParallel):
            return ProcessGroup(cast(dist.ProcessGroup, model.process_group), patience)
        if is_fsdp2(model):
            return sharded_channel(model, fsdp2.replicate if fsdp2 is not None else None, patience)
        if process_group is not None:
            return ProcessGroup(process_group, patience)
    except Exception:  # the checks report the error later
        pass
    return ProcessGroup(cast(dist.ProcessGroup, dist.group.WORLD), patience)
