"""Options, checks and setup for FSDP2 (``fully_shard``); ``shards.py`` has the hooks.

Behaviour of FSDP2 that this code depends on:

* Native HSDP does the all-reduce over replicas itself. So the model must be sharded over one dimension, and thinwire
  exchanges gradients between replicas, as soon as FSDP2 has reduce-scattered them.
* FSDP2 then calls the hooks of ``Tensor.register_post_accumulate_grad_hook`` of the sharded parameter, after the
  division and the cast. It calls the hook of ``set_all_reduce_hook`` shortly before, with a flat buffer that does not
  tell its parameters or their places. So the former is used: a unit is a parameter's shard, with the parameter's name.
* A custom reduce-scatter can't be removed (there is no getter). So it stays; without a session it does FSDP2's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Never, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from thinwire.comm.collectives import TIMEOUT, Collective, ControlChannel
from thinwire.comm.control import Together
from thinwire.comm.emulated import Paced
from thinwire.comm.link import Link
from thinwire.comm.mesh import BothAxes, Mesh, columns_of
from thinwire.comm.process_group import ProcessGroup
from thinwire.comm.simulated import Local
from thinwire.core import Compressor, ThinwireError
from thinwire.core.checks import check_fields, of_type, optional
from thinwire.core.memory_capabilities import OwnsMomentum, traits_of
from thinwire.core.sharding import own, shard_dim
from thinwire.engines.fsdp2.custom_collectives import Gather, Scatter
from thinwire.engines.fsdp2.shards import OwnedShard, Shards
from thinwire.engines.names import check_some, clean, modules_of
from thinwire.engines.source import Source
from thinwire.engines.unchanged import warn_of_apart
from thinwire.exchange.routes.rows import check_flat
from thinwire.exchange.units import DENSE
from thinwire.memories.error_feedback import NoMemory
from thinwire.methods.method import Method, Rule
from thinwire.session.replicas import Replicas
from thinwire.session.session import Session

ONE_LINE = (
    'shard over one dimension, fully_shard(module, mesh=mesh["shard"]) instead of fully_shard(module, mesh=mesh), and '
    'pass fsdp2=Fsdp2Options(replicate=mesh["replicate"]) to attach()'
)


@dataclass(frozen=True)
class Fsdp2Options:
    """Options of ``attach`` for FSDP2: the mesh of replicas, and compression of gradients and parameters across shards.

    Args:
        replicate: the mesh, of one dimension, over the replicas of each shard. The method exchanges reduce-scattered
            gradients over it, and residuals have the size of a shard. None for no replicas.
        reduce_scatter: the compressor of gradients between the ranks that a parameter is sharded over, e.g.
            ``Quantize(8, rounding="stochastic")``; None for PyTorch's reduce-scatter. ``Rule(compressor,
            ErrorFeedback())`` adds a residual. It needs memory for two unsharded gradients a rank.
        all_gather: the compressor of parameters between those ranks, e.g. ``Quantize(8)``; None for PyTorch's
            all-gather. Forward and backward then use rounded weights, and the optimizer exact ones. A compressor with
            random rounding (``rounding="stochastic"``) needs ``optimizer=``.

    Raises:
        ThinwireError: an option has a wrong type.

    **Wire**: along the shard axis ``(N-1)/N`` of the payloads of all gradients, and the same of all parameters in each
    of the two passes; between replicas that of the method.

    Example:
        >>> Fsdp2Options(all_gather=thinwire.compressors.Quantize(8)).replicate is None
        True
    """

    replicate: DeviceMesh | None = None
    reduce_scatter: Compressor | Rule | None = None
    all_gather: Compressor | None = None

    def __post_init__(self) -> None:
        mesh = 'pass a mesh of one dimension, e.g. mesh["replicate"] of init_device_mesh(...)'
        coder = "pass a compressor, e.g. thinwire.compressors.Quantize(8"
        check_fields(
            self,
            replicate=optional(of_type(DeviceMesh, mesh)),
            reduce_scatter=optional(of_type((Compressor, Rule), f"{coder}, rounding='stochastic'), or a Rule")),
            all_gather=optional(of_type(Compressor, f"{coder})")),
        )


def is_fsdp2(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def sharded_channel(model: nn.Module, replicate: DeviceMesh | None, timeout: float) -> BothAxes:
    """Return the control channel of all ranks of a model that is sharded on a mesh of one dimension."""
    mesh = next(param.device_mesh for param in model.parameters() if isinstance(param, DTensor))
    replicas = Local.of(1)[0] if replicate is None else ProcessGroup(replicate.get_group(), timeout)
    return BothAxes(replicas, ProcessGroup(mesh.get_group(), timeout))


class Fsdp2(Source[ControlChannel]):
    """An FSDP2 model, before it is attached; ``steps`` is True if ``attach`` was given an optimizer."""

    def __init__(self, model: nn.Module, options: Fsdp2Options, steps: bool, timeout: float = TIMEOUT) -> None:
        self.model, self.steps, self.timeout, replicate = model, steps, timeout, options.replicate
        self.modules = [(name, module) for name, module in modules_of(model) if isinstance(module, FSDPModule)]
        self._reshard()
        self.owned = _owned(model, self.modules)
        self.shards = _shards([owned.param for owned in self.owned], timeout)
        if replicate is not None and replicate.ndim != 1:
            raise ThinwireError(f"replicate is a mesh of {replicate.ndim} dimensions; it must have one: {ONE_LINE}")
        self.group = replicate.get_group() if replicate is not None else None
        self.replicas: Collective = ProcessGroup(self.group, timeout) if self.group is not None else Local.of(1)[0]
        self.channel: ControlChannel = BothAxes(self.replicas, self.shards)
        scatter, self.gather = options.reduce_scatter, options.all_gather
        self.scatter = Rule(scatter, NoMemory()) if isinstance(scatter, Compressor) else scatter

    def _reshard(self) -> None:
        """Free gathered parameters: after an evaluation the root's are still whole, and rounded by ``all_gather=``."""
        for _, module in self.modules:
            module.reshard()

    def fits(self, method: Method) -> None:
        if self.group is None and any(r.compressor != DENSE or r.memory.stateful for r in method.rules):
            raise ThinwireError(
                f"{method.name} has nothing to compress: a model without replicas only has a reduce-scatter; pass "
                "the mesh over its replicas as replicate=, or thinwire.dense() and reduce_scatter= a compressor"
            )

    def exchanged(self) -> list[tuple[str, Tensor]]:
        for _, module in self.modules:
            found = _attached.get(cast(nn.Module, module))
            if found is not None and (shards := found()) is not None:
                shards.check_free()
        if meta := [owned.name for owned in self.owned if own(owned.param).is_meta]:
            raise ThinwireError(f"parameter {meta[0]!r} is on the meta device; initialise the model, then attach")
        if self.scatter is not None or self.gather is not None:
            if numbers := [owned.name for owned in self.owned if owned.param.is_complex()]:
                raise ThinwireError(
                    f"parameter {numbers[0]!r} is complex, and reduce_scatter= and all_gather= are for real ones: "
                    "leave them out"
                )
            for name, module in self.modules:
                _check_one_group(name, module)
        if self.scatter is not None:
            self._check_scatter(self.scatter)
        if self.gather is not None:
            self._check_gather(self.gather)
        return [(owned.name, owned.param) for owned in self.owned]

    def _check_scatter(self, rule: Rule) -> None:
        check_flat("reduce_scatter", "reduce-scatter carries flat gradients", rule.compressor)
        if isinstance(rule.memory, OwnsMomentum):
            raise ThinwireError(
                f"reduce_scatter with {type(rule.memory).__name__}: an optimizer's momentum can't move into what every "
                "rank remembers of the whole gradient; use NoMemory(), or ErrorFeedback()"
            )
        if not traits_of(rule.memory).passes_on:
            raise ThinwireError(
                f"reduce_scatter with {type(rule.memory).__name__}, which does something with the mean; here each rank "
                "gets a sum of its own: use NoMemory(), or ErrorFeedback()"
            )
        if rule.memory.stateful and not self.steps:
            raise ThinwireError(
                "reduce_scatter remembers what it lost, which is final when the optimizer steps; pass optimizer="
            )
        needed = {"set_custom_reduce_scatter": "2.9", "set_force_sum_reduction_for_comms": "2.9"}
        if rule.memory.stateful:  # the residual has the buffer's size, which must stay the same
            needed["set_reduce_scatter_unused_params"] = "2.13"
        for method, since in needed.items():
            check_method(self.modules[0][1], method, since)

    def _check_gather(self, compressor: Compressor) -> None:
        check_flat("all_gather", "all-gather carries flat weights", compressor)
        Rule(compressor, NoMemory())  # raises an error for sparsifiers
        if (omega := compressor.traits.variance(2**20)) is not None and omega > 1.0:
            raise ThinwireError(
                f"all_gather={type(compressor).__name__} adds noise of {omega:.2g} times the energy of the weights; "
                "the limit is 1: use thinwire.compressors.Quantize(8), or more bits"
            )
        if omega and not self.steps:  # a lossy unbiased compressor is random
            raise ThinwireError(
                f"all_gather={type(compressor).__name__} draws anew in each step, so that both passes of one see the "
                "same weights, and only the optimizer tells steps apart; pass optimizer=, or round to nearest, as "
                "thinwire.compressors.Quantize(8) does"
            )
        check_method(self.modules[0][1], "set_custom_all_gather", "2.9")

    @staticmethod
    def no_sync() -> Never:
        raise ThinwireError(
            "wire.no_sync() is for a model without a wrapper; use model.set_requires_gradient_sync(False)"
        )

    def compared(self, every: int) -> Replicas:
        named = [(clean(name), p) for name, p in self.model.named_parameters() if isinstance(p, DTensor)]
        return Replicas(named, self.channel, self.shards.world, every)

    def collective(self, link: Link | None, together: Together) -> Collective:
        columns = columns_of(self.shards, self.group)
        with together.alone():
            replicas = Paced(self.replicas, link) if link else self.replicas
            return Mesh(replicas, self.shards, self.group, own(self.owned[0].param).device, columns)

    def travel_over(self, group: dist.ProcessGroup) -> None:
        """Exchange over another process group of the replicas from now on; the control channel stays."""
        self.group, self.replicas = group, ProcessGroup(group, self.timeout)

    def install(self, session: Session) -> None:
        modules = [cast(nn.Module, module) for _, module in self.modules]
        shards = Shards(self.model, modules, self.owned, self.group is not None, self.shards)
        for name, module in self.modules:
            _attached[cast(nn.Module, module)] = ref(shards)
            session.cleanup.callback(_attached.pop, cast(nn.Module, module), None)
            try:
                if self.gather is not None:
                    module.set_custom_all_gather(cast(Any, Gather(shards, name, self.gather)))
                if self.scatter is not None:
                    scatter = Scatter(shards, name, self.scatter)
                    shards.scatters.append(scatter)
                    module.set_custom_reduce_scatter(cast(Any, scatter))
                    module.set_force_sum_reduction_for_comms(True)
                    if hasattr(module, "set_reduce_scatter_unused_params"):
                        module.set_reduce_scatter_unused_params(True, recurse=False)
            except ValueError as error:
                raise ThinwireError(f"{name or 'the model'}: {error}") from error
        shards.install(session)
        if shards.apart:
            warn_of_apart(shards.apart, "fully_shard was told to ignore it, or stands below it")
        if self.gather is not None:
            session.cleanup.callback(self._reshard)
        if self.scatter is not None and self.scatter.memory.stateful:
            session.ledger.note(
                f"the reduce-scatter remembers what it lost: {shards.memory_bytes(self.scatter):,} bytes on this rank, "
                "as two unsharded gradients; a checkpoint does not hold them"
            )


_attached: WeakKeyDictionary[nn.Module, ref[Shards]] = WeakKeyDictionary()  # a value must not hold its key


def check_method(module: object, name: str, since: str) -> None:
    """Raise a ``ThinwireError`` that names the versions if this FSDP2 does not have the method yet."""
    if not hasattr(module, name):
        raise ThinwireError(
            f"this needs FSDPModule.{name}(), which came with torch {since}; here is {torch.__version__}: upgrade "
            "it, or leave the reduce-scatter to PyTorch (and compress between replicas), or use a compressor without a "
            "memory"
        )


def _owned(model: nn.Module, modules: Sequence[tuple[str, Any]]) -> list[OwnedShard]:
    """Return the sharded parameters that require a gradient, with the number of their ``fully_shard`` module."""
    numbers = {name: number for number, (name, _) in enumerate(modules)}
    owned: list[OwnedShard] = []
    for name, param in model.named_parameters():
        if not param.requires_grad or not isinstance(param, DTensor):  # FSDP2 does not average ignored parameters
            continue
        above = name.rpartition(".")[0]
        while above not in numbers and above:
            above = above.rpartition(".")[0]
        number = numbers.get(above, 0)
        travels = _travels(modules[number][1], param.dtype)
        owned.append(OwnedShard(clean(name), param, number, travels))
    check_some([(one.name, one.param) for one in owned], "sharded parameter")
    return owned


def _state(module: FSDPModule) -> Any:
    """Return FSDP2's private state of a module; None if this version of torch keeps it elsewhere."""
    look: Any = getattr(module, "_get_fsdp_state", None)
    return look() if look is not None else None


def _travels(module: FSDPModule, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which PyTorch reduce-scatters the gradients of this module's ``dtype`` parameters."""
    policy: Any = getattr(_state(module), "_mp_policy", None)
    return getattr(policy, "reduce_dtype", None) or getattr(policy, "param_dtype", None) or dtype


def _check_one_group(name: str, module: FSDPModule) -> None:
    groups: Any = getattr(_state(module), "_fsdp_param_groups", ())  # if missing, PyTorch raises an error in install()
    if len(groups) > 1:
        raise ThinwireError(
            f"{name or 'the model'} has {len(groups)} groups of parameters, by the meshes that its shard_placement_fn "
            "names, and PyTorch lets reduce_scatter= and all_gather= replace the collectives of one: give each group "
            "a fully_shard of its own"
        )


def _shards(params: list[Tensor], timeout: float) -> ProcessGroup:
    """Return the process group of the ranks that the parameters are sharded over."""
    meshes: list[DeviceMesh] = [cast(DTensor, param).device_mesh for param in params]
    for param, mesh in zip(params, meshes, strict=True):
        placements = cast(DTensor, param).placements
        if mesh.ndim == 2 and placements[0].is_replicate():
            raise ThinwireError(
                "the model is sharded on a mesh of 2 dimensions (native HSDP), where PyTorch's own all-reduce averages "
                f"the replicas; {ONE_LINE}"
            )
        if mesh.ndim != 1 or shard_dim(param) is None:
            raise ThinwireError(
                f"the parameters are {placements} on a mesh of {mesh.ndim} dimensions; they must be sharded over one: "
                f"{ONE_LINE}"
            )
        if own(param).device.type != mesh.device_type and not own(param).is_meta:
            raise ThinwireError(
                f"parameters are kept on {own(param).device.type} and gathered on {mesh.device_type}; offloading is "
                "not supported: leave out CPUOffloadPolicy"
            )
    if len({tuple(dist.get_process_group_ranks(mesh.get_group())) for mesh in meshes}) > 1:
        raise ThinwireError(
            "the parameters are sharded over several meshes; thinwire can follow one only: shard all of them "
            "over the same ranks"
        )
    return ProcessGroup(meshes[0].get_group(), timeout)
