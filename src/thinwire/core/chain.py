"""Chains: the values that one compressor keeps, coded by another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor

from thinwire.core.capabilities import LeaderSelected, SumsSparsely, Thresholded, Wrapper, title
from thinwire.core.checks import check_fields, of_type
from thinwire.core.context import NOWHERE, NUMBER, Context
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor, Payload, State, Traits
from thinwire.core.loops import Found, Selection
from thinwire.core.registry import register
from thinwire.core.tensors import Decompressed, Sparse


@register("chain")
@dataclass(frozen=True)
class Chain(Wrapper, Thresholded, SumsSparsely, LeaderSelected):
    """``first``, and the first tensor of its payload (values, factors) by ``then``.

    What either loses stays in the residual of an error feedback: where ``first`` keeps a part ``s`` of ``x`` that is
    orthogonal to the rest, ``||x - C(x)||^2 = ||x - s||^2 + ||s - then(s)||^2``, so contractions multiply.

    Args:
        first: its payload begins with the values it keeps, e.g. ``TopK``, ``RandK``, ``PowerSGD``, ``Cast``.
        then: codes a vector and keeps no state, e.g. ``Quantize(4)``, ``Cast("float16")``.

    Raises:
        ThinwireError: ``then`` needs matrices or keeps a state, ``first`` sends codes and their scales instead of
            values, or it needs sums and ``then`` has none.

    **Wire**: the payload of ``then`` for the values, and the rest of ``first``'s.

    Example:
        >>> (TopK(0.01) >> Cast("float16")).compress(torch.empty(10_000, device="meta"), {}, NOWHERE)[0].nbytes
        200
    """

    first: Compressor
    then: Compressor

    adjusts: ClassVar[str] = "first"

    def __post_init__(self) -> None:
        side = of_type(Compressor, "both sides of >> are compressors, as in TopK(0.01) >> Quantize(4)")
        check_fields(self, first=side, then=side)
        first, then = title(self.first), title(self.then)
        kept, coder = self.first.traits, self.then.traits
        if coder.period != 1 or coder.min_ndim or self.then.init(NUMBER, NOWHERE):
            raise ThinwireError(f"{then} needs matrices or keeps a state; what stands after >> codes a vector")
        if coder.leader_selected:
            raise ThinwireError(f"{then} sends what one rank has chosen for all; it can't stand after >>, only before")
        if not kept.keeps_values:
            turned = f": {then} >> {first}" if coder.keeps_values else ""
            raise ThinwireError(
                f"{first} >> {then} would code the scales of {first} instead of values, and may lose more than sending "
                f"nothing; a compressor that keeps values stands first{turned}, as in TopK(0.01) >> Quantize(4)"
            )
        if (kept.warm_started or kept.leader_selected) and not coder.summable:
            raise ThinwireError(f"{first} needs the sum of what is sent, which {then} prevents; use Cast('float16')")

    @cached_property
    def traits(self) -> Traits:
        kept, coder = self.first.traits, self.then.traits
        return replace(
            kept,
            summable=kept.summable and coder.summable,
            selects=kept.selects and coder.summable,
            keeps_values=coder.keeps_values,
            needs_feedback=kept.needs_feedback or coder.needs_feedback,
            linear=False,
            votes=False,
            contraction=self._contraction,
            variance=self._variance,
            title=f"{title(self.first)} >> {title(self.then)}",
        )

    def _contraction(self, n: int) -> float | None:
        kept, coded = self.first.traits.contraction(n), self.then.traits.contraction(n)
        if 0.0 in (kept, coded):  # whatever is known of the other
            return 0.0
        return None if kept is None or coded is None else kept * coded

    def _variance(self, n: int) -> float | None:
        kept, coded = self.first.traits.variance(n), self.then.traits.variance(n)
        return None if kept is None or coded is None else (1.0 + kept) * (1.0 + coded) - 1.0

    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        return self._code(self.first.compress(x, state, ctx), ctx)

    def compress_sparse(self, x: Sparse, like: Tensor, state: State, ctx: Context) -> Payload:
        return self._code(super().compress_sparse(x, like, state, ctx), ctx)

    def follow(self, x: Tensor, choice: Payload, state: State, ctx: Context) -> Payload:
        return self._code(cast(LeaderSelected, self.first).follow(x, choice, state, ctx), ctx)

    def sampling(self, shape: Sequence[int], ctx: Context) -> Selection | None:
        return self.first.sampling(shape, ctx) if isinstance(self.first, Thresholded) else None

    def encode(self, chosen: Tensor, values: Tensor, n: int, ctx: Context) -> Payload:
        return self._code(cast(Thresholded, self.first).encode(chosen, values, n, ctx), ctx)

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        return self.first.decompress(self._decode(payload, like, ctx), like, state, ctx)

    def together(
        self, payloads: Sequence[tuple[int, Payload]], like: Tensor, ctx: Context, alpha: float, most: float
    ) -> Found | None:
        if not isinstance(self.first, SumsSparsely):
            return None
        decoded = [(rank, self._decode(one, like, replace(ctx, rank=rank))) for rank, one in payloads]
        return self.first.together(decoded, like, ctx, alpha, most)

    def commit(self, payload: Payload, like: Tensor, old: State, new: State, ctx: Context) -> None:
        super().commit(self._decode(payload, like, ctx), like, old, new, ctx)

    def _code(self, payload: Payload, ctx: Context) -> Payload:
        values, *rest = payload
        return *self.then.compress(values, {}, ctx), *rest

    def _decode(self, payload: Payload, like: Tensor, ctx: Context) -> Payload:
        values = self.first.compress(like.to("meta"), {}, ctx)[0]
        coded = len(self.then.compress(values, {}, ctx))
        out = torch.empty(values.shape, dtype=values.dtype, device=payload[0].device)
        self.then.decompress(payload[:coded], out, {}, ctx).write_to(out)
        return out, *payload[coded:]
