"""The options of ``attach`` for a model that went through ``fully_shard``."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

from thinwire.core.checks import of_type, optional, settle
from thinwire.core.interfaces import Compressor
from thinwire.methods.method import Rule


@dataclass(frozen=True)
class Fsdp2Options:
    """Options of ``attach`` for FSDP2: who the replicas are, and how shards exchange gradients and parameters.

    Args:
        replicate: the mesh, of one dimension, over the replicas of each shard: the reduce-scattered gradients are
            exchanged over it by the method, and residuals have the size of a shard. None for no replicas.
        reduce_scatter: how gradients travel between the ranks that a parameter is sharded over, e.g.
            ``Quantize(8, rounding="stochastic")``; None for PyTorch's own. A ``Rule(compressor, ErrorFeedback())``
            remembers what it lost, at the cost of two unsharded gradients a rank, which is what FSDP2 saves.
        all_gather: how parameters travel between those ranks, e.g. ``Quantize(8)``; None for PyTorch's own. The passes
            then work with rounded weights, and the optimizer with exact ones. One that draws, with
            ``rounding="stochastic"``, needs ``optimizer=``.

    Raises:
        ThinwireError: one of them is not of its kind.

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
        settle(
            self,
            replicate=optional(of_type(DeviceMesh, mesh)),
            reduce_scatter=optional(of_type((Compressor, Rule), f"{coder}, rounding='stochastic'), or a Rule")),
            all_gather=optional(of_type(Compressor, f"{coder})")),
        )
