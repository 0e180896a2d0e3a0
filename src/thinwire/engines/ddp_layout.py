"""How a gradient lies in a bucket of DDP.

What was observed of DDP and shaped it:

* A gradient goes in as its parameter lay when the buckets were made: at wrapping, and, where they are made anew, after
  the first backward pass. ``GradBucket.gradients()`` answers as if all were contiguous. So a sample of the gradient
  that autograd has left is compared with what stands in the bucket.
* What a hook answers is read as the parameter lies then; with ``gradient_as_bucket_view=True``, as it has gone in.
* There, a gradient is the bucket's own view, and ``module.to()`` moves it out of the bucket, which DDP never notices.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import own, real_strides
from thinwire.core.tensors import is_dense

SAMPLED = 1024
Strides: TypeAlias = tuple[int, ...]


class Bucketed:
    """The strides of the gradients in the buckets of one DDP model, as far as they are known.

    Args:
        views: whether gradients are views of the buckets.
    """

    def __init__(self, views: bool) -> None:
        self.views = views
        self.left = False  # whether a gradient has left its bucket
        self.strides: dict[int, Strides] = {}
        self.sure: set[int] = set()
        self.exchanges = 0

    def begin(self) -> None:
        """Another exchange; up to the second, the buckets may be others than before."""
        self.exchanges += 1
        if self.exchanges <= 2:
            self.sure.clear()

    def changed(self) -> None:
        """A parameter has changed its layout, and if the buckets are made anew, they follow."""
        self.left = self.views and self.exchanges > 0
        self.exchanges = 0

    def check(self) -> None:
        """Raises a ``ThinwireError`` where DDP no longer sees a gradient."""
        if self.left:
            raise ThinwireError(
                "the layout of a parameter was changed after wrapping with gradient_as_bucket_view=True, which takes "
                "its gradient out of DDP's buckets, so that DDP itself would average old values; change it before, or "
                "wrap the model and attach again"
            )

    def look(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Find out what is not known yet, given what DDP answers as gradients. Before they are changed."""
        for param, grad in zip(params, grads, strict=True):
            if id(param) not in self.sure:
                self._look(id(param), param, grad)

    def laid(
        self, params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The gradients as their parameters lie; and what is to be written in the end from which copy among them."""
        back: list[tuple[Tensor, Tensor]] = []
        answer: list[Tensor] = []
        for param, grad in zip(params, grads, strict=True):
            mine, found = own(param), _seen(grad, self._strides(param, grad))
            if found.stride() != mine.stride() and is_dense(mine):
                copy = torch.empty_like(mine, dtype=grad.dtype).copy_(found)
                back.append((found if self.views else _seen(grad, mine.stride()), copy))
                found = copy
            answer.append(found)
        return answer, back

    def answered(self, param: Tensor, grad: Tensor) -> Tensor:
        """What DDP will take for the gradient in the end."""
        return _seen(
            grad, self._strides(param, grad) if self.views or not is_dense(own(param)) else own(param).stride()
        )

    def _strides(self, param: Tensor, grad: Tensor) -> Strides:
        """As far as they are known."""
        mine = own(param)
        return self.strides.setdefault(id(param), mine.stride() if is_dense(mine) else grad.stride())

    def _look(self, key: int, param: Tensor, grad: Tensor) -> None:
        mine, known = own(param), self._strides(param, grad)
        local = None if param.grad is None else own(param.grad)
        if sum(size > 1 for size in param.shape) < 2 or not param.numel() or not is_dense(mine):
            self.strides[key] = mine.stride() if is_dense(mine) else grad.stride()
            self.sure.add(key)
        elif local is not None and self.views:
            self.left |= local.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr()
            self.check()
            self.strides[key] = local.stride()
            self.sure.add(key)
        elif local is not None and self.exchanges & (self.exchanges - 1) == 0:  # what can't be told is asked rarely
            fits = [strides for strides in _orders(param, known) if _same(local, grad, strides)]
            self.strides[key] = fits[0] if fits else known
            if len(fits) == 1:
                self.sure.add(key)


def _orders(param: Tensor, known: Strides) -> list[Strides]:
    """The strides that it may have had, in real numbers; what is known of it first."""
    shape = param.shape
    orders = [param.stride(), torch.empty(shape, device="meta").stride()]
    if (few := {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))) is not None:
        orders.append(torch.empty(shape, device="meta", memory_format=few).stride())
    orders.append(torch.empty(shape[::-1], device="meta").permute(*reversed(range(len(shape)))).stride())
    return list(dict.fromkeys([known, *(real_strides(param, strides) for strides in orders)]))


def _same(local: Tensor, grad: Tensor, strides: Strides) -> bool:
    """Whether a sample of the elements is the same, where ``grad`` has these strides; what is NaN, in both."""
    n = local.numel()
    where = torch.randint(n, (min(n, SAMPLED),), generator=torch.Generator().manual_seed(n), device="cpu")
    at = torch.unravel_index(where.to(local.device), local.shape)
    mine, theirs = local[at], _seen(grad, strides)[at]
    return bool((mine.eq(theirs) | (mine.isnan() & theirs.isnan())).all())


def _seen(grad: Tensor, strides: Strides) -> Tensor:
    return grad if grad.stride() == strides else grad.as_strided(grad.shape, strides, grad.storage_offset())
