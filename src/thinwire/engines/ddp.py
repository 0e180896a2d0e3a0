"""DistributedDataParallel: what ``attach`` checks and sets up; the hook itself is in ``hook.py``.

What was observed of DDP and shaped it:

* A hook can be registered once and never taken back, so one dispatcher is ours and sessions change inside it.
* The first backward has one bucket with all parameters; then they are rebuilt. State is keyed by name.
* It does not follow parameters that are replaced after wrapping: their gradients silently stop being averaged.
"""

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from thinwire.engines.hook import Dispatcher
from thinwire.exchange.collectives import TIMEOUT, Collective, ProcessGroup
from thinwire.exchange.nodes import Nodes, groups_of
from thinwire.exchange.paced import Paced
from thinwire.kernels.choose import Choice, choose
from thinwire.link import Link
from thinwire.policy.plan import Method
from thinwire.session import Policy, Session
from thinwire.succession import agree
from thinwire.tensors import ThinwireError
from thinwire.transaction import OnNonfinite, Scaler
from thinwire.units import Worker


def attach(
    ddp: DistributedDataParallel,
    method: Method,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    link: Link | str | None = None,
    scaler: Scaler | None = None,
    on_nonfinite: OnNonfinite = "skip",
    timeout: float = TIMEOUT,
    kernels: Choice = "auto",
    nodes: int | DeviceMesh | None = None,
    policy: Policy | None = None,
) -> Session:
    """Exchange the gradients of a DDP model by ``method``. A collective call: all ranks make it alike.

    Args:
        ddp: the wrapped model, on gloo or NCCL; before the first step or between any two.
        method: ``thinwire.dgc()``, ``thinwire.topk()``, ``thinwire.cast()``, ``thinwire.dense()`` or one of your own.
        optimizer: required by all methods that remember anything (dgc, topk): what a step changes there is final only
            when the optimizer steps. With dgc, ``momentum``, ``nesterov`` and ``weight_decay`` move from it into the
            memory, with its momentum buffers, until ``detach()``.
        seed: of all randomness; equal on all ranks.
        link: emulate a link of this speed, e.g. ``"100mbit"``; for experiments on one machine.
        scaler: the ``GradScaler`` of a mixed-precision run, so that residuals are kept without its scale.
        on_nonfinite: a gradient that is not finite on any rank makes all ranks skip the step ("skip"), or raise when
            the optimizer is about to step ("raise"). With a scaler, the scaler skips. It concerns methods that remember
            something; ``dense()`` and ``cast()`` pass on what they get, as DDP does.
        timeout: seconds after which an exchange that a rank does not join is an error. A rank that only evaluates or
            saves for longer than this needs more. On NCCL it is the process group's own timeout that counts.
        kernels: the loops that compress: "reference" is plain PyTorch, "cpu" needs ``thinwire[cpu]``, "auto" takes the
            fastest there is; the ledger names it. All give the same bits.
        nodes: compress between nodes only. The ranks of a node, which follow each other, as a number; or a
            ``DeviceMesh`` of two dimensions, between nodes and inside. Ranks of a node average their gradients and are
            one worker together; the ledger's wire bytes are those between nodes. ``link`` is then that between nodes.
        policy: changes the method while it trains, e.g. ``thinwire.LGreCo``.

    Returns:
        The session: ``report()``, ``set_method()``, ``detach()``, and ``ledger``.

    Raises:
        ThinwireError: the model is no DDP, its hook slot is taken, its optimizer does not fit the method, ranks ask for
            different things, or a compressed parameter has sparse gradients. Nothing has been changed then.

    Example::

        ddp = DistributedDataParallel(model)
        wire = thinwire.attach(ddp, thinwire.dgc(density=0.001), optimizer=optimizer)
    """
    if not isinstance(ddp, DistributedDataParallel):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ThinwireError(f"attach() takes a DistributedDataParallel, not {type(ddp).__name__}; wrap the model first")
    group = ProcessGroup(cast(dist.ProcessGroup, ddp.process_group))
    try:
        named = _exchanged(ddp, method)
        wire = Link.parse(link) if isinstance(link, str) else link
        chosen, note = choose(kernels, named[0][1].device)
    except ThinwireError as error:  # the other ranks must hear of it, or they would wait for ever
        agree(group, [("error", str(error))])
        raise
    agree(group, [("error", "none"), ("nodes", str(nodes))])
    levels = groups_of(group, nodes) if nodes is not None else None
    own = group if levels is None else levels[1]
    collective: Collective = Paced(own, wire) if wire else own
    if levels is not None:
        collective = Nodes(group, levels[0], collective, levels[2])
    try:
        worker = Worker(collective.rank, seed, kernels=chosen)
        session = Session(named, method, collective, optimizer, seed, [worker], scaler, on_nonfinite, timeout, policy)
    except ThinwireError:
        collective.close()
        raise
    session.use_kernels(chosen, note)
    dispatcher = _dispatchers.get(ddp)
    if dispatcher is None:
        dispatcher = _dispatchers[ddp] = Dispatcher(group.group)
        ddp.register_comm_hook(None, dispatcher.hook)
    dispatcher.install(session, ddp)
    return session


_dispatchers: WeakKeyDictionary[DistributedDataParallel, Dispatcher] = WeakKeyDictionary()


def _exchanged(ddp: DistributedDataParallel, method: Method) -> list[tuple[str, Tensor]]:
    """The parameters whose gradients this DDP exchanges, if nothing is in the way.

    Raises:
        ThinwireError: something is.
    """
    module = cast(nn.Module, ddp.module)  # pyright: ignore[reportUnknownMemberType]
    everything: list[tuple[str, Tensor]] = list(module.named_parameters())
    named = [
        (name, param) for name, param in everything if param.requires_grad and name not in ddp.parameters_to_ignore
    ]
    if not named:
        raise ThinwireError("the model has no parameter that requires a gradient; there is nothing to exchange")
    dispatcher = _dispatchers.get(ddp)
    if dispatcher is not None and dispatcher.session is not None:
        name = dispatcher.session.method.name
        raise ThinwireError(f"{name} is attached to this model; call wire.set_method(), or wire.detach() first")
    in_backward = any(hasattr(param, "_in_backward_optimizers") for _, param in named)
    if in_backward or (dispatcher is None and getattr(ddp, "_comm_hooks", None)):
        raise ThinwireError(
            "the communication hook of this DDP model is taken, by register_comm_hook(), by mixed_precision= or by an "
            "optimizer in backward; DDP has room for one: leave that out, or wrap the model afresh"
        )
    _check_tracked(ddp, named)
    _check_sparse(module, method)
    return named


def _check_tracked(ddp: DistributedDataParallel, named: Sequence[tuple[str, Tensor]]) -> None:
    """Parameters replaced between wrapping and attach: DDP does not follow, so their hook would never be called."""
    tracked: Any = getattr(ddp, "_module_parameters", None)  # no public list; where there is none, forward checks later
    known = {id(p) for p in tracked or [param for _, param in named]}
    if missing := [name for name, param in named if id(param) not in known]:
        raise ThinwireError(
            f"parameter {missing[0]!r} was replaced after the model was wrapped; DDP does not average its gradient: "
            "wrap again, then attach"
        )


def _check_sparse(model: nn.Module, method: Method) -> None:
    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]  # pyright: ignore[reportUnknownArgumentType]
    for name, module in modules:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            rule = method.rule(f"{name}.weight", module.weight.shape, module.weight.numel())
            if rule.memory.stateful or not rule.compressor.summable or method.clip is not None:
                raise ThinwireError(
                    f"{name}.weight has sparse gradients, which {method.name} can't compress, remember or clip; build "
                    f"it with sparse=False, or use thinwire.topk(..., keep_dense=[{name + '.weight'!r}])"
                )
