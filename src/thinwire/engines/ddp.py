"""Checks and setup for DistributedDataParallel; the hook itself is in ``ddp_hook.py``.

Behaviour of DDP that this code depends on:

* A hook can be registered once and never removed, so thinwire registers one dispatcher and changes its session.
* The first backward has one bucket with all parameters; then buckets are rebuilt. So state is keyed by name.
* DDP does not follow parameters that are replaced after wrapping: it silently stops averaging their gradients.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Never, cast
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.collectives import TIMEOUT, Collective
from thinwire.comm.control import Together
from thinwire.comm.hierarchical import check_nodes, levels
from thinwire.comm.link import Link
from thinwire.comm.process_group import ProcessGroup
from thinwire.core.errors import ThinwireError
from thinwire.engines.ddp_hook import Dispatcher
from thinwire.engines.names import check_some, clean, sparse_weights
from thinwire.engines.source import Source
from thinwire.engines.stepped import inside
from thinwire.engines.unchanged import warn_of_apart
from thinwire.exchange.units import DENSE
from thinwire.methods.method import Method
from thinwire.session.replicas import Replicas
from thinwire.session.session import Session


class Ddp(Source[ProcessGroup]):
    """A DDP model, before it is attached."""

    def __init__(self, ddp: DistributedDataParallel, nodes: int | DeviceMesh | None, timeout: float = TIMEOUT) -> None:
        self.ddp, self.nodes = ddp, nodes
        self.channel = ProcessGroup(cast(dist.ProcessGroup, ddp.process_group), timeout)
        # the session holds this function, so it must not hold the DDP model
        self.fits = partial(_check_sparse, inside(ddp))

    def exchanged(self) -> list[tuple[str, Tensor]]:
        check_nodes(self.channel, self.nodes)
        ddp, every = self.ddp, cast("list[tuple[str, Tensor]]", list(inside(self.ddp).named_parameters()))
        named = [(name, x) for name, x in every if x.requires_grad and name not in ddp.parameters_to_ignore]
        check_some(named)
        dispatcher = _dispatchers.get(ddp)
        if dispatcher is not None:
            dispatcher.check_free()
        in_backward = any(hasattr(param, "_in_backward_optimizers") for _, param in named)
        logged = _logged(ddp)  # the reducer of a copied DDP model has no hook, even if the model lists hooks
        taken = logged.get("comm_hook") if logged else getattr(ddp, "_comm_hooks", None)
        if in_backward or (dispatcher is None and taken):
            raise ThinwireError(
                "the communication hook of this DDP model is taken, by register_comm_hook(), by mixed_precision= or by "
                "an optimizer in backward; DDP has room for one: leave that out, or wrap the model afresh"
            )
        _check_tracked(ddp, named)
        return [(clean(name), param) for name, param in named]

    @staticmethod
    def no_sync() -> Never:  # static, because the session holds it and must not hold the DDP model
        raise ThinwireError("wire.no_sync() is for a model without a wrapper; use ddp.no_sync()")

    def compared(self, every: int) -> Replicas:
        ignored: set[str] = cast(Any, self.ddp).parameters_to_ignore  # DDP does not keep those equal
        named = [(clean(name), param) for name, param in inside(self.ddp).named_parameters() if name not in ignored]
        return Replicas(named, self.channel, every=every)

    def collective(self, link: Link | None, together: Together) -> Collective:
        return levels(self.channel, self.nodes, link)

    def install(self, session: Session) -> None:
        dispatcher = _dispatchers.get(self.ddp)
        if dispatcher is None:
            dispatcher = _dispatchers[self.ddp] = Dispatcher(self.channel.group)
            self.ddp.register_comm_hook(None, dispatcher.hook)
        dispatcher.install(session, self.ddp)
        if dispatcher.apart:
            warn_of_apart(dispatcher.apart, "DDP's parameters_to_ignore names it")


_dispatchers: WeakKeyDictionary[DistributedDataParallel, Dispatcher] = WeakKeyDictionary()


def _logged(ddp: DistributedDataParallel) -> Mapping[str, Any]:
    """Return the logging data of the reducer, which has no public API."""
    return cast(Any, getattr(ddp, "_get_ddp_logging_data", dict))()


def _check_tracked(ddp: DistributedDataParallel, named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise an error if parameters changed between wrapping and attach: DDP would never call a hook for them."""
    tracked: Any = getattr(ddp, "_module_parameters", None)  # not public; without it, the forward hook checks later
    if tracked is None:
        return
    known, here = {id(param) for param in tracked}, {id(param): name for name, param in inside(ddp).named_parameters()}
    lost = {tuple(param.shape) for param in tracked if id(param) not in here}
    if missing := [(name, param) for name, param in named if id(param) not in known]:
        name, param = missing[0]
        what = "was replaced" if tuple(param.shape) in lost else "was added or unfrozen"
        raise ThinwireError(
            f"parameter {name!r} {what} after the model was wrapped; DDP does not average its gradient: wrap again, "
            "then attach"
        )
    averaged, trains = _logged(ddp).get("num_parameter_tensors"), sum(param.requires_grad for param in tracked)
    if averaged not in (None, trains):
        raise ThinwireError(
            f"{trains} parameters require a gradient and DDP averages {averaged}: some were frozen or unfrozen after "
            "the model was wrapped; wrap again, then attach"
        )


def _check_sparse(model: nn.Module, method: Method) -> None:
    for name, weight in sparse_weights(model):
        rule = method.rule(name, weight.shape, weight.numel())
        if rule.memory.stateful or rule.compressor != DENSE or method.clip is not None:
            raise ThinwireError(
                f"{name} has sparse gradients, which {method.name} can't compress, remember or clip; build "
                f"it with sparse=False, or use thinwire.topk(..., keep_dense=[{name!r}])"
            )
