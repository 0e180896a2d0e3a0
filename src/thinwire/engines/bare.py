"""Checks and setup for a model without a wrapper; ``grad_hooks.py`` handles its gradients.

Gradients are compressed where autograd has left them: unlike in DDP, nothing is copied into buckets first. Since
nothing else holds views of the gradients, the optimizer can get sparse ones.
"""

import contextlib
import gc
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.collectives import TIMEOUT, Collective
from thinwire.comm.control import Together
from thinwire.comm.hierarchical import check_nodes, levels
from thinwire.comm.link import Link
from thinwire.comm.process_group import ProcessGroup
from thinwire.core.errors import ThinwireError
from thinwire.core.supported import check_parameter, parts
from thinwire.engines.grad_hooks import GradHooks, Owned
from thinwire.engines.hooks import Hook
from thinwire.engines.names import check_some, clean, modules_of, sparse_weights
from thinwire.engines.source import Source
from thinwire.engines.stepped import inside, wrappers
from thinwire.exchange.fused import warm_up_kernels
from thinwire.methods.method import Method
from thinwire.session.backward import is_shared
from thinwire.session.migrate import agree
from thinwire.session.optimizers import Optimizers, each_of, kind_of
from thinwire.session.replicas import Replicas
from thinwire.session.session import Session

BUCKET = 25 * 2**20
"""Bytes of gradients in one bucket, as in DDP. With a third of it, a step of 25 million parameters took up to 10 % more
time on CPUs, because the compression code had left the cache before the next bucket was ready."""
TAKES_SPARSE = (torch.optim.SGD, torch.optim.Adagrad)  # these take sparse and dense gradients together


class Plain(Source[ProcessGroup]):
    """A model without a wrapper, before it is attached; the ranks of ``group`` train it."""

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        nodes: int | DeviceMesh | None,
        sparse: bool,
        optimizer: Optimizers | None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.model, self.nodes, self.sparse, self.optimizer = model, nodes, sparse, optimizer
        if cast(object, group) is dist.GroupMember.NON_GROUP_MEMBER:  # what torch returns on a rank outside the group
            raise ThinwireError(f"process_group is {group!r}; this rank must be in the group that trains the model")
        self.group, self.channel = group, ProcessGroup(group, timeout)
        self.between = self.channel
        groups: Any = getattr(optimizer, "param_groups", ())
        # settings that stay in the optimizer, or return to it, unless the method owns the momentum
        self.kept = {(key, group[key]) for group in groups for key in ("momentum", "weight_decay") if group.get(key)}

    def fits(self, method: Method) -> None:
        if not self.sparse:
            return
        if self.optimizer is None or not all(isinstance(one, TAKES_SPARSE) for one in each_of(self.optimizer)):
            names = ", ".join(kind.__name__ for kind in TAKES_SPARSE)
            raise ThinwireError(
                f"sparse_gradients=True needs an optimizer that takes sparse gradients: {names}, not "
                f"{kind_of(self.optimizer)}; pass one, or leave the option out"
            )
        if any(group.get("fused") for group in self.optimizer.param_groups):
            raise ThinwireError(
                "sparse_gradients=True, and the optimizer is fused, which takes dense ones; use fused=False"
            )
        if self.kept and not method.absorbs:
            key, value = min(self.kept)
            raise ThinwireError(
                f"sparse_gradients=True, and with {method.name} the optimizer has {key}={value}, which touches all "
                "elements; use thinwire.dgc(), whose memory takes it over, or leave the option out"
            )

    shares = True

    def exchanged(self) -> list[tuple[str, Tensor]]:
        check_nodes(self.channel, self.nodes)
        for name, module in modules_of(self.model):
            if isinstance(module, (DistributedDataParallel, nn.DataParallel)):
                kind = type(cast(nn.Module, module)).__name__
                raise ThinwireError(
                    f"{name or 'the model'} is a {kind}, which averages gradients itself; attach to it without "
                    "process_group=, or to a model that it is not part of"
                )
        every: list[tuple[str, Tensor]] = list(self.model.named_parameters())
        named = [(clean(name), param) for name, param in every if param.requires_grad]
        check_some(named)
        self._check_attached(named)
        for name, param in named:
            check_parameter(name, param)
        self._check_wrapped(named)
        self._check_tensors()
        if weight := next(sparse_weights(self.model), None):
            raise ThinwireError(f"{weight[0]} has sparse gradients, which need DDP; build it with sparse=False")
        return named

    def _check_attached(self, named: Sequence[tuple[str, Tensor]]) -> None:
        others = [found for other in _attached.values() if (found := other()) is not None and found.session is not None]
        for name, param in named:
            if other := next((one for one in others if id(param) in one.by_param), None):
                other.check_free(f" ({name!r})")
            if hasattr(param, "_in_backward_optimizers"):
                raise ThinwireError(
                    f"parameter {name!r} has an optimizer in backward, which would not wait; leave it out"
                )

    def _check_wrapped(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Raise an error if a DDP model elsewhere averages some of these parameters."""
        mine = {id(param): name for name, param in named}

        def shared() -> list[str]:
            return [mine[id(p)] for ddp in wrappers() for p in inside(ddp).parameters() if id(p) in mine]

        if names := shared():
            gc.collect()  # an unused DDP model may not be freed yet
            names = shared()
        if names:
            raise ThinwireError(
                f"parameter {names[0]!r} is part of a DistributedDataParallel, whose hooks average its gradient too: "
                "attach to the DDP model, without process_group=, or let go of it first (del ddp)"
            )

    def _held(self) -> list[tuple[str, Tensor]]:
        """Return the tensors that must be equal on all ranks at the start."""
        held = (*self.model.named_parameters(), *self.model.named_buffers())
        return [(clean(inner), part) for name, x in held for inner, part in parts(name, x.detach())]

    def _check_tensors(self) -> None:
        device = next(self.model.parameters()).device
        for name, x in self._held():
            if isinstance(x, DTensor) or x.is_meta:
                what = "is a DTensor" if isinstance(x, DTensor) else "is on the meta device"
                raise ThinwireError(f"{name!r} {what}; process_group= is for a model that every rank holds whole")
            if x.is_quantized or x.is_inference():
                what = "is quantised" if x.is_quantized else "was made under torch.inference_mode()"
                raise ThinwireError(f"{name!r} {what}, so it can't be handed on; make it an ordinary tensor")
            if x.device != device:
                raise ThinwireError(
                    f"{name!r} is on {x.device}, others on {device}; a rank has one device: model.to() it"
                )
            if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
                raise ThinwireError(f"the elements of {name!r} share memory (strides {x.stride()}); use .contiguous()")

    @contextlib.contextmanager
    def no_sync(self) -> Generator[None]:
        before, self.hooks.paused = self.hooks.paused, True
        try:
            yield
        finally:
            self.hooks.paused = before

    def compared(self, every: int) -> Replicas:
        return Replicas(
            [(clean(name), param) for name, param in self.model.named_parameters()], self.channel, every=every
        )

    def collective(self, link: Link | None, together: Together) -> Collective:
        return levels(self.between, self.nodes, link)

    def travel_over(self, group: dist.ProcessGroup) -> None:
        """Exchange over another process group from now on; the control channel stays."""
        self.group, self.between = group, ProcessGroup(group, self.channel.timeout)

    def share(self, session: Session) -> None:
        held = self._held()
        agree(self.channel, [(f"tensor {name!r}", f"of shape {tuple(x.shape)}, {x.dtype}") for name, x in held])
        for _, x in held:
            whole = x.contiguous()  # the broadcast sends raw memory
            if whole.numel():
                self.channel.broadcast(whole.view(-1).view(torch.uint8), 0).wait(session.timeout, on_host=True)
            if whole is not x:
                x.copy_(whole)

    def install(self, session: Session) -> None:
        self.hooks = Unwrapped(self.model, self._owned(), self.sparse)
        _attached[self.model] = ref(self.hooks)
        self.hooks.install(session)
        if self.sparse:
            warm_up_kernels(session.units, session.workers[0].kernels, clear=False)

    def _owned(self) -> list[Owned]:
        """Return the parameters in reverse order with bucket numbers, since backward computes the last ones first."""
        owned: list[Owned] = []
        number, room = 0, BUCKET
        for name, param in reversed(list(self.model.named_parameters())):
            if not param.requires_grad:
                continue
            if room <= 0:
                number, room = number - 1, BUCKET
            room -= param.nbytes
            owned.append(Owned(clean(name), param, number))
        return owned


class Unwrapped(GradHooks):
    """The hooks of one model without a wrapper."""

    def __init__(self, model: nn.Module, owned: Sequence[Owned], sparse: bool) -> None:
        super().__init__(model, owned, "wire.no_sync()", sparse=sparse)

    def install(self, session: Session) -> None:
        super().install(session)
        hook = cast(Any, torch.compiler.disable(self.after_forward))  # torch.compile gains nothing here
        session.cleanup.callback(self.model.register_forward_hook(Hook(hook)).remove)

    def shares(self, grad: Tensor) -> bool:
        return is_shared(grad)

    def after_forward(self, _: nn.Module, inputs: object, output: object) -> None:
        """Hook the model's outputs: their gradients come first, and in the outer backward pass.

        A module with reentrant checkpointing computes its gradients in a nested pass, which ends before the outer one.
        """
        if self.session is not None and torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self.reaches)

    def reaches(self, _: Tensor) -> None:
        if self.session is not None:
            self.passes.enter()

    def check_same(self, session: Session) -> None:
        super().check_same(session)
        around: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)  # there is no public API
        if around is not None and any(param is self.owned[0].param for param in around.parameters()):
            raise ThinwireError(
                "the model was wrapped in a DistributedDataParallel after attach, which averages its gradients too; "
                "call the model itself, or detach() and attach to the DDP model without process_group="
            )

    def closing(self, session: Session) -> bool | None:
        if self.sparse:
            each = [pair for _, grads, made in self.left for pair in zip(grads, made, strict=True)]
            sparse = sum(grad.is_sparse and not made for grad, made in each)
            session.ledger.note(f"{sparse} of {len(self.owned)} gradients reach the optimizer as sparse tensors")
        return None


def _tensors(output: Any) -> list[Tensor]:
    """Return all tensors in a module's output."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(cast("Mapping[Any, Any]", output).values())
    return (
        [x for part in cast("list[Any]", output) for x in _tensors(part)] if isinstance(output, (list, tuple)) else []
    )


_attached: WeakKeyDictionary[nn.Module, ref[Unwrapped]] = WeakKeyDictionary()  # a value must not hold its key
