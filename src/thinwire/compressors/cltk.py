"""CLT-k: in each step one worker, the leader, selects by Top-k for all workers."""

from dataclasses import dataclass
from functools import cached_property

from thinwire.compressors.sparse import Largest
from thinwire.core.checks import check_fields, share
from thinwire.core.interfaces import Traits
from thinwire.core.registry import register


@register("cltk")
@dataclass(frozen=True)
class CLTK(Largest):
    """Cyclic local Top-k: all workers send the elements that are largest at the leader, worker ``step mod N``.

    With ``I`` the k largest ``|x_leader|``, ``C(x_i)_j = x_i_j`` for j in ``I``, 0 elsewhere. So the sum has k
    elements; a sum of N Top-k payloads has up to N k. Elements that are large only at a follower wait until it leads.
    A step may lose all of a follower's ``x``, so no contraction is declared.

    Args:
        density: kept / total, in (0, 1]; the leader selects as ``TopK`` does.

    Raises:
        ThinwireError: ``density`` is outside its range.

    **Wire**: k indices in Elias-Fano code by a broadcast, and k values by an all-reduce:
    ``(N-1)/N (k 12 + 2 k 32)`` bits per worker at 0.1 %, for any N.

    Example:
        >>> [t.nbytes for t in CLTK(0.01).compress(torch.empty(10_000, device="meta"), {}, NOWHERE)]
        [400, 107]

    Source: C. Chen et al., "ScaleCom: Scalable Sparsified Gradient Compression for Communication-Efficient Distributed
    Training", 2020, arXiv:2104.11125, section 3.

    Departures: selects the largest of the whole tensor; the paper's implementation selects the largest of each chunk.
    """

    density: float

    def __post_init__(self) -> None:
        check_fields(self, density=share("0.01"))

    @cached_property
    def traits(self) -> Traits:
        return Traits(leader_selected=True, needs_feedback=self.density < 1.0, keeps_values=True, selects=True)
