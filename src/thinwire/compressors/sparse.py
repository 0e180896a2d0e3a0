"""Top-k: each rank sends its elements of largest magnitude; CLT-k: all send those of one rank, the leader."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor

from thinwire.coding import values as codes
from thinwire.compressors.sampling import EXACT_BELOW, plan_sample, sample_size, select_by_sample
from thinwire.compressors.sparsifier import VALUES, Sparsifier
from thinwire.core import Compressor, Context, Decompressed, Payload, Sparse, State, Traits, flat, register
from thinwire.core.capabilities import ErrorTable, Thresholded
from thinwire.core.checks import check_fields, one_of, real, share, whole
from thinwire.core.loops import Found, Selection
from thinwire.kernels.reference import REFERENCE


class Largest(Sparsifier, Thresholded):
    """The selection of Top-k: the elements of largest magnitude, exactly or by a threshold from a sample."""

    selection: Literal["auto", "exact", "sampled"] = "auto"
    sample_ratio: float = 0.0025
    lower: float = 0.8
    attempts: int = 10

    def select(self, x: Tensor, k: int, ctx: Context) -> Tensor:
        return (ctx.kernels or REFERENCE).largest(x, k)

    def _found(self, x: Tensor, ctx: Context) -> Found:
        sampling = self.sampling(x.shape, ctx)
        if sampling is None:
            return super()._found(x, ctx)
        return select_by_sample(flat(x), sampling, ctx.kernels or REFERENCE)

    def sampling(self, shape: Sequence[int], ctx: Context) -> Selection | None:
        n = math.prod(shape)
        k = self.k(n)
        few = n < EXACT_BELOW or 2 * sample_size(n, self._share, self.sample_ratio) > n
        if self.selection == "exact" or (self.selection == "auto" and few) or k in (0, n):
            return None
        row = shape[-1] if shape else 1
        return plan_sample(n, k, row, ctx, ratio=self.sample_ratio, lower=self.lower, attempts=self.attempts)

    def own(self, payload: Payload, chosen: Tensor, like: Tensor, state: State, ctx: Context) -> Decompressed:
        if self.values in codes.CODES or chosen.numel() < self.k(like.numel()):
            return self.decompress(payload, like, state, ctx)
        return Sparse(chosen, payload[0], self._share, ctx.kernels)  # without decoding the indices


@register("topk")
@dataclass(frozen=True)
class TopK(Largest, ErrorTable):
    """Sends the ``k = ceil(density * n)`` elements of largest magnitude of each tensor.

    ``decompress(compress(x))_j = x_j`` for the k largest ``|x_j|``, 0 elsewhere; so
    ``||x - decompress(compress(x))||^2 <= (1 - k/n) ||x||^2``; with a code for ``values``, ``1 - 1/(2n)``.

    Args:
        density: kept / total, in (0, 1].
        values: dtype of the values on the wire, None for that of ``x``; or a code, see ``thinwire.coding.values``:
            ``"int8"``, ``"int4"``, ``"int2"`` (a sign, and one of 128, 8 or 2 magnitudes),
            or ``"sign"`` (1 bit, and the mean magnitude). The rounding error stays in the residual.
        selection: ``"exact"``; ``"sampled"``, a threshold from a sample, which may send fewer than k but never more;
            or ``"auto"``: sampled from 100,000 elements on if the sample is at most half the tensor.
        sample_ratio: smallest share of the elements to sample, in (0, 1].
        lower: a sampled threshold that passes fewer than ``lower * k`` elements is lowered, in (0, 1).
        attempts: the most times it is lowered.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: k values and k indices in Elias-Fano code: ``k * itemsize + ceil(k l / 8) + ceil((k + (n-1) / 2^l) / 8)``
    bytes with ``l = floor(log2(n/k))``; 5.5 bytes per selected element for float32 at 0.1 %. Coded values take
    ``ceil(k bits / 8)`` bytes plus 8 for the scales (sign: 4): 2.0 bytes per element for int4, 1.6 for sign. The size
    is the same at every step. If fewer are selected, the last index is repeated with value 0; a code has no 0, so
    there a repeated index means 0.

    Example:
        >>> x = torch.tensor([0.5, -3.0, 1.0, 2.0])
        >>> ctx = Context(seed=0, step=0, unit="w", rank=0)
        >>> payload = TopK(density=0.5).compress(x, {}, ctx)
        >>> TopK(density=0.5).decompress(payload, x, {}, ctx).write_to(out := torch.empty(4)); out
        tensor([ 0., -3.,  0.,  2.])
    """

    density: float
    values: str | None = None
    selection: Literal["auto", "exact", "sampled"] = "auto"
    sample_ratio: float = 0.0025
    lower: float = 0.8
    attempts: int = 10

    def __post_init__(self) -> None:
        check_fields(
            self,
            density=share("0.001"),
            values=VALUES,
            selection=one_of("auto", "exact", "sampled"),
            sample_ratio=share("0.0025", "a share of the elements"),
            lower=real(0.0, 1.0, above=True, below=True),
            attempts=whole(0),
        )

    def _contraction(self, n: int) -> float:
        return super()._contraction(n) if self.values in codes.CODES else self.k(n) / n

    def losses(self, x: Tensor, family: Sequence[Compressor]) -> list[float] | None:
        """Return the sums of squares outside the k largest, by one sort or selection; None if ``values`` is set."""
        alike = cast("Sequence[TopK]", family)
        if any(one.values is not None for one in alike):
            return None
        n = x.numel()
        ks = [one.k(n) for one in alike]
        magnitudes = flat(x).abs()
        if 4 * (most := max((k for k in ks if k < n), default=0)) > n:  # a selection would cost as much as a sort
            squares = magnitudes.sort().values.double().square().cpu()  # on the CPU, where cumsum is deterministic
            tails = torch.nn.functional.pad(squares.cumsum(0), (1, 0))
            return [float(tails[n - k]) for k in ks]
        whole = float(magnitudes.double().square().sum())
        heads = magnitudes.topk(most).values.double().square().cpu().cumsum(0)
        return [0.0 if k == n else max(0.0, whole - float(heads[k - 1])) for k in ks]


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
