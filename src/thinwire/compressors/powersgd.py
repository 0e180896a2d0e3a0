"""PowerSGD: a matrix is approximated by the product of two thin ones; each step sends one of them.

Source: T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", 2019, arXiv:1905.13727.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from thinwire.core import Compressor, Context, Decompressed, Dense, Payload, State, Traits, flat, register
from thinwire.core.ambient import full_precision
from thinwire.core.capabilities import ErrorTable, WarmStarted
from thinwire.core.checks import check_fields, real, whole
from thinwire.core.tensors import float_at_least_32


def as_matrix(x: Tensor) -> Tensor:
    """View ``x`` in the order of memory as a matrix ``[n, m]``; n is the size of the outermost dimension there."""
    n = max(zip(x.stride(), x.shape, strict=True), default=(1, 1))[1]
    return flat(x).view(n, -1) if x.numel() else x.reshape(n, 0)


def orthonormalise(x: Tensor, fallback: Tensor) -> Tensor:
    """Orthonormalise the columns of ``x`` ``[n, r]``, ``r <= n``; never raises, and gives NaN if x is nonfinite.

    ``fallback`` ``[n, r]`` is added to x with the weight of a rounding error. So columns that are zero, or depend on
    earlier ones, take the direction of ``fallback``; a zero ``x`` gives an orthonormal ``fallback``.
    """
    largest = x.abs().amax()
    scaled = x / torch.where(largest > 0, largest, 1.0)
    # Householder's Q is orthonormal for any finite matrix; Gram-Schmidt may divide by zero
    return cast(Tensor, torch.linalg.qr(scaled.add(fallback, alpha=torch.finfo(x.dtype).eps)).Q)


def random_columns(rows: int, rank: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Draw orthonormal columns ``[rows, rank]``, on the CPU."""
    drawn = torch.randn(rows, rank, generator=generator, dtype=torch.float64, device="cpu")
    # contiguous, as in a checkpoint: products with the other memory order differ in their last bits
    return orthonormalise(drawn, drawn).to(dtype).contiguous()


@dataclass(frozen=True)
class LowRank(Decompressed):
    """The matrix ``left @ right.T``; the product is added in place if possible, and not stored."""

    left: Tensor  # [n, r]
    right: Tensor  # [m, r]
    density: float = 1.0

    def write_to(self, out: Tensor, alpha: float = 1.0) -> None:
        self._add(out, alpha, 0.0)

    def add_to(self, out: Tensor, alpha: float = 1.0) -> None:
        self._add(out, alpha, 1.0)

    def clear(self, out: Tensor) -> None:
        out.zero_()

    @full_precision()
    def entries(self) -> tuple[Tensor, Tensor]:
        values = (self.left @ self.right.mT).view(-1)
        return torch.arange(values.numel(), device=values.device), values

    @full_precision()
    def _add(self, out: Tensor, alpha: float, beta: float) -> None:
        whole = flat(out).view(self.left.shape[0], -1)
        if out.dtype.itemsize < self.left.dtype.itemsize:  # so that it is rounded once
            product = self.left @ self.right.mT
            whole.copy_(product.mul_(alpha).add_(whole) if beta else product.mul_(alpha))
        else:
            left, right = self.left.to(out.dtype), self.right.to(out.dtype)
            whole.addmm_(left, right.mT, beta=beta, alpha=alpha)


@register("powersgd")
@dataclass(frozen=True)
class PowerSGD(Compressor, WarmStarted, ErrorTable):
    """Sends a matrix projected on ``rank`` directions, which follow the mean of what all ranks send.

    ``P_i = M_i R`` at even steps, received as ``mean(P) R^T``, and then ``L = orth(mean(P))``;
    ``Q_i = M_i^T L`` at odd steps, received as ``L mean(Q)^T``, and then ``R = orth(mean(Q))``.
    So each step is half a power iteration on the mean, which continues from the last step. The part that a rank did
    not send, ``M_i - M_i R R^T``, is never larger than ``M_i``.

    Args:
        rank: columns of ``L`` ``[n, rank]`` and ``R`` ``[m, rank]``, at least 1. If a side of the matrix is not larger
            than that, the matrix is sent as it is.
        min_rate: matrices with ``n m < min_rate * rank * (n + m)`` are left to the method's next rule; 0 takes all.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: ``4 rank n`` bytes at even steps and ``4 rank m`` at odd ones, summed by one all-reduce.

    State: ``left`` ``[n, rank]`` and ``right`` ``[m, rank]``, orthonormal columns in float32 (float64 for float64),
    equal on all ranks. Every rank computes them from equal means, so all ranks need the same kind of processor.

    Example:
        >>> PowerSGD(2).compress(torch.empty(512, 100, device="meta"), {}, NOWHERE)[0].shape
        torch.Size([512, 2])

    Source: T. Vogels, S. P. Karimireddy, M. Jaggi, 2019, arXiv:1905.13727, algorithm 1; the projection that alternates
    between the sides, with one all-reduce per step, is from the authors' later package.

    Departures: a rank's residual is what *it* did not send, not what was lost of the mean. Both give the same updates,
    but in the paper's form a rank's deviation from the mean stays in its residual and grows without bound (see
    ``tests/compressors/test_powersgd.py``). Products are not batched over equal shapes: gradients are not adjacent in
    memory, and gathering them costs as much as it saves. With error feedback, a constant mean of rank at most ``rank``
    arrives whole at every second step, not at every step.
    """

    rank: int
    min_rate: float = 0.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            rank=whole(1, says="it must be at least 1 and whole, and 4 is a safe start"),
            min_rate=real(0.0, hint=", which takes every matrix"),
        )

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            summable=True, min_ndim=2, period=2, needs_feedback=True, keeps_values=True, warm_started=True,
            declines=self._declines,
        )  # fmt: skip

    def _declines(self, shape: Sequence[int]) -> str | None:
        n, m = shape[0], torch.Size(shape[1:]).numel()
        if n * m >= self.min_rate * self.rank * (n + m):
            return None
        return f"{n} x {m} is less than {self.min_rate:g} times {self.rank} x ({n} + {m})"

    def init(self, like: Tensor, ctx: Context) -> State:
        n, m = as_matrix(like).shape
        if self.rank >= min(n, m):
            return {}
        generator, dtype = ctx.generator(shared=True), float_at_least_32(like.dtype)
        sides = {"left": n, "right": m}
        return {key: random_columns(size, self.rank, generator, dtype).to(like.device) for key, size in sides.items()}

    def inherit(self, old: State, fresh: State) -> State:
        """Keep the leading columns, which are the most important ones; a higher rank gets random new columns."""
        return {key: _widened(old[key], x) if key in old else x for key, x in fresh.items()}

    def moved(self, old: State, fresh: State, order: Tensor) -> State:
        """Permute the directions if whole columns have moved, as on a change of the memory format."""
        if not fresh:
            return {}
        rows = order.view(len(fresh["left"]), -1)
        begins = rows.shape[1] * torch.arange(len(rows), device=rows.device).unsqueeze(1)
        if not bool((rows == rows[:1] + begins).all()):
            return super().moved(old, fresh, order)
        return {"left": old["left"], "right": old["right"][rows[0]]}

    @full_precision()
    def compress(self, x: Tensor, state: State, ctx: Context) -> Payload:
        matrix = as_matrix(x)
        n, m = matrix.shape
        wide = float_at_least_32(x.dtype)
        if self.rank >= min(n, m):
            return (flat(x).to(wide),)
        if x.is_meta:
            return (x.new_empty(m if ctx.phase % 2 else n, self.rank, dtype=wide),)
        if ctx.phase % 2:
            return (matrix.mT.to(wide) @ state["left"],)
        return (matrix.to(wide) @ state["right"],)

    def decompress(self, payload: Payload, like: Tensor, state: State, ctx: Context) -> Decompressed:
        if self.rank >= min(as_matrix(like).shape):
            return Dense(payload[0])
        return LowRank(state["left"], payload[0]) if ctx.phase % 2 else LowRank(payload[0], state["right"])

    @full_precision()
    def commit(self, payload: Payload, like: Tensor, old: State, new: State, ctx: Context) -> None:
        if self.rank >= min(as_matrix(like).shape):
            return
        turned, kept = ("right", "left") if ctx.phase % 2 else ("left", "right")
        new[turned].copy_(orthonormalise(payload[0], old[turned]))
        new[kept].copy_(old[kept])

    @full_precision()
    def losses(self, x: Tensor, family: Sequence[Compressor]) -> list[float]:
        """Return the sums of the smallest squared singular values: the loss once the directions have converged."""
        matrix = as_matrix(x).to(float_at_least_32(x.dtype))
        n, m = matrix.shape
        squares = matrix @ matrix.mT if n <= m else matrix.mT @ matrix
        spectrum = cast(Tensor, torch.linalg.eigvalsh(squares.double())).clamp_(min=0.0)  # ascending
        tails = spectrum.cpu().cumsum(0)  # on the CPU, since cumsum on CUDA is not deterministic
        ranks = [min(cast(PowerSGD, one).rank, n, m) for one in family]
        return [float(tails[-1 - rank]) if rank < tails.numel() else 0.0 for rank in ranks]


def _widened(old: Tensor, fresh: Tensor) -> Tensor:
    if old.shape[0] != fresh.shape[0]:
        return fresh
    old = old.to(fresh)
    if old.shape[1] >= fresh.shape[1]:
        return old[:, : fresh.shape[1]].clone()
    more = fresh[:, : fresh.shape[1] - old.shape[1]]
    both = torch.cat([old, more], 1)
    return torch.cat([old, orthonormalise(both, both)[:, old.shape[1] :]], 1)
