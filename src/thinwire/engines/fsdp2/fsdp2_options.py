"""The options of ``attach`` for a model that went through ``fully_shard``."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

from thinwire.core.checks import check_fields, of_type, optional
from thinwire.core.interfaces import Compressor
from thinwire.methods.method import Rule


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
