"""A model without a wrapper: what is checked and set up; ``arrivals.py`` has what passes through.

The gradients are compressed where autograd has left them, so that nothing is copied into buckets first, as DDP must;
and since nobody else holds views of them, the optimizer can be given sparse ones.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from thinwire.engines.arrivals import Arrivals, Owned
from thinwire.engines.names import clean
from thinwire.exchange.collectives import Collective, ProcessGroup
from thinwire.exchange.nodes import levels
from thinwire.link import Link
from thinwire.policy.plan import Method
from thinwire.session import Session
from thinwire.succession import agree
from thinwire.tensors import ThinwireError

BUCKET = 25 * 2**20
"""Bytes of gradients that leave together, as in DDP. With a third of it a step of 25 million parameters took 10 % more
time on CPUs: the code that compresses is no longer in the cache when backward comes with the next bucket."""
TAKES_SPARSE = (torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad)


class Plain:
    """One model that nothing has been wrapped around, about to be attached to.

    Args:
        group: the ranks that train it.
        nodes, sparse: see ``thinwire.attach``.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        nodes: int | DeviceMesh | None,
        sparse: bool,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.model, self.nodes, self.sparse, self.optimizer = model, nodes, sparse, optimizer
        if cast(object, group) is dist.GroupMember.NON_GROUP_MEMBER:  # torch's answer to a rank outside
            raise ThinwireError(f"process_group is {group!r}; this rank must be in the group that trains the model")
        self.group = group
        self.talk = ProcessGroup(group)

    @property
    def fits(self) -> Callable[[Method], None]:
        return self._fits

    def _fits(self, method: Method) -> None:
        if not self.sparse:
            return
        if not isinstance(self.optimizer, TAKES_SPARSE):
            names = ", ".join(kind.__name__ for kind in TAKES_SPARSE)
            raise ThinwireError(
                f"sparse_gradients=True needs an optimizer that takes sparse gradients: {names}, not "
                f"{type(self.optimizer).__name__}; pass one, or leave the option out"
            )
        for group in () if method.absorbs else self.optimizer.param_groups:
            for key in ("momentum", "weight_decay"):
                if group.get(key):
                    raise ThinwireError(
                        f"sparse_gradients=True, and the optimizer has {key}={group[key]}, which touches all elements: "
                        "use thinwire.dgc(), whose memory takes it over, or leave the option out"
                    )

    def exchanged(self) -> list[tuple[str, Tensor]]:
        arrivals = found() if (found := _attached.get(self.model)) is not None else None
        if arrivals is not None and arrivals.session is not None:
            name = arrivals.session.method.name
            raise ThinwireError(f"{name} is attached to this model; call wire.set_method(), or wire.detach() first")
        modules: list[tuple[str, nn.Module]] = [*self.model.named_modules()]  # pyright: ignore[reportUnknownArgumentType]
        for name, module in modules:
            if isinstance(module, (DistributedDataParallel, nn.DataParallel)):
                kind = type(cast(nn.Module, module)).__name__
                raise ThinwireError(
                    f"{name or 'the model'} is a {kind}, which averages gradients itself; attach to "
                    "it without process_group=, or to a model that it is not part of"
                )
        every: list[tuple[str, Tensor]] = list(self.model.named_parameters())
        named = [(clean(name), param) for name, param in every if param.requires_grad]
        if not named:
            raise ThinwireError("the model has no parameter that requires a gradient; there is nothing to exchange")
        for name, param in named:
            if isinstance(param, DTensor) or param.is_meta:
                what = "is a DTensor" if isinstance(param, DTensor) else "is on the meta device"
                raise ThinwireError(
                    f"parameter {name!r} {what}; process_group= is for a model that every rank holds whole"
                )
        for name, module in modules:
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
                raise ThinwireError(f"{name}.weight has sparse gradients, which need DDP; build it with sparse=False")
        return named

    @contextlib.contextmanager
    def no_sync(self) -> Generator[None]:
        self.arrivals.paused = True
        try:
            yield
        finally:
            self.arrivals.paused = False

    def collective(self, link: Link | None) -> Collective:
        return levels(self.talk, self.nodes, link)

    def install(self, session: Session) -> None:
        buffers = [(clean(name), x) for name, x in self.model.named_buffers()]
        agree(self.talk, [("buffers", str([(name, tuple(x.shape), str(x.dtype)) for name, x in buffers]))])
        source = dist.get_global_rank(self.group, 0)
        for tensor in (*self.model.parameters(), *(x for _, x in buffers)):
            dist.broadcast(tensor.detach(), source, group=self.group)
        self.arrivals = Unwrapped(self.model, self._owned(), self.sparse)
        _attached[self.model] = ref(self.arrivals)
        self.arrivals.install(session)

    def _owned(self) -> list[Owned]:
        """The last parameters leave first, since backward brings them first."""
        owned: list[Owned] = []
        number, room, device = 0, BUCKET, None
        for name, param in reversed(list(self.model.named_parameters())):
            if not param.requires_grad:
                continue
            if room <= 0 or (device is not None and param.device != device):
                number, room = number - 1, BUCKET
            room, device = room - param.nbytes, param.device
            path, _, leaf = name.rpartition(".")
            owned.append(Owned(clean(name), param, self.model.get_submodule(path), leaf, number))
        return owned


class Unwrapped(Arrivals):
    """The hooks of one model without a wrapper."""

    def __init__(self, model: nn.Module, owned: Sequence[Owned], sparse: bool) -> None:
        super().__init__(model, owned, "wire.no_sync()", sparse=sparse)

    def check_same(self) -> None:
        for one in self.owned:
            if getattr(one.owner, one.leaf) is not one.param:
                raise ThinwireError(
                    f"parameter {one.name!r} was replaced after attach (load_state_dict(assign=True) does it), so its "
                    "gradient would not be exchanged; detach() and attach again"
                )
        if len(self.owned) != sum(param.requires_grad for param in self.model.parameters()):
            raise ThinwireError(
                "other parameters require a gradient than at attach, and theirs would not be exchanged; detach() and "
                "attach again"
            )

    def closing(self, session: Session) -> bool | None:
        if self.sparse:
            sparse = sum(grad.is_sparse for _, grads, _ in self.left for grad in grads)
            session.ledger.note(f"{sparse} of {len(self.owned)} gradients reach the optimizer as sparse tensors")
        return None


_attached: WeakKeyDictionary[nn.Module, ref[Unwrapped]] = WeakKeyDictionary()  # a value must not hold its key
