"""The strides of gradients in DDP's buckets.

Behaviour of DDP that this code depends on:

* A gradient enters with the strides that its parameter had when the buckets were built: at wrapping or, if they are
  rebuilt, after the first backward pass. ``GradBucket.gradients()`` assumes that all are contiguous. So a sample of
  autograd's gradient is compared with the bucket's content.
* DDP reads a hook's result with the parameter's strides; with ``gradient_as_bucket_view=True``, with those it entered.
* With that option a gradient is a view of the bucket. ``module.to()`` moves it elsewhere, and DDP does not notice.
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
    """The known strides of gradients in the buckets of one DDP model; ``views``: gradients are views of the buckets."""

    def __init__(self, views: bool) -> None:
        self.views = views
        self.left = False  # True if a gradient has left its bucket
        self.strides: dict[int, Strides] = {}
        self.sure: set[int] = set()
        self.exchanges = 0

    def begin(self) -> None:
        """Begin an exchange; at the first two, DDP may have rebuilt the buckets."""
        self.exchanges += 1
        if self.exchanges <= 2:
            self.sure.clear()

    def changed(self) -> None:
        """Note that a parameter has changed its strides; if DDP rebuilds the buckets, they follow."""
        self.left = self.views and self.exchanges > 0
        self.exchanges = 0

    def check(self) -> None:
        """Raise a ``ThinwireError`` if DDP no longer sees a gradient."""
        if self.left:
            raise ThinwireError(
                "the layout of a parameter was changed after wrapping with gradient_as_bucket_view=True, which takes "
                "its gradient out of DDP's buckets, so that DDP itself would average old values; change it before, or "
                "wrap the model and attach again"
            )

    def look(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Find the strides that are not known yet, from DDP's gradients; to be called before they are changed."""
        for param, grad in zip(params, grads, strict=True):
            if id(param) not in self.sure:
                self._look(param, grad)

    def laid(
        self, params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Return gradients with their parameters' strides, and (bucket view, copy) pairs to write back at the end."""
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
        """Return the view of the bucket that DDP will read as the gradient."""
        return _seen(
            grad, self._strides(param, grad) if self.views or not is_dense(own(param)) else own(param).stride()
        )

    def _strides(self, param: Tensor, grad: Tensor) -> Strides:
        """Return the known strides, or the likely ones."""
        mine = own(param)
        return self.strides.setdefault(id(param), mine.stride() if is_dense(mine) else grad.stride())

    def _look(self, param: Tensor, grad: Tensor) -> None:
        key, mine, known = id(param), own(param), self._strides(param, grad)
        local = None if param.grad is None else own(param.grad)
        if sum(size > 1 for size in param.shape) < 2 or not param.numel() or not is_dense(mine):
            self.strides[key] = mine.stride() if is_dense(mine) else grad.stride()
            self.sure.add(key)
        elif local is not None and self.views:
            self.left |= local.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr()
            self.check()
            self.strides[key] = local.stride()
            self.sure.add(key)
        elif local is not None and self.exchanges & (self.exchanges - 1) == 0:  # unclear: try rarely
            fits = [strides for strides in _orders(param, known) if _same(local, grad, strides)]
            self.strides[key] = fits[0] if fits else known
            if len(fits) == 1:
                self.sure.add(key)


def _orders(param: Tensor, known: Strides) -> list[Strides]:
    """Return the strides that the parameter may have had, in real numbers, the known ones first."""
    shape = param.shape
    orders = [param.stride(), torch.empty(shape, device="meta").stride()]
    if (few := {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))) is not None:
        orders.append(torch.empty(shape, device="meta", memory_format=few).stride())
    orders.append(torch.empty(shape[::-1], device="meta").permute(*reversed(range(len(shape)))).stride())
    return list(dict.fromkeys([known, *(real_strides(param, strides) for strides in orders)]))


def _same(local: Tensor, grad: Tensor, strides: Strides) -> bool:
    """Return True if a sample of elements is equal, reading ``grad`` with these strides; NaN equals NaN."""
    n = local.numel()
    where = torch.randint(n, (min(n, SAMPLED),), generator=torch.Generator().manual_seed(n), device="cpu")
    at = torch.unravel_index(where.to(local.device), local.shape)
    mine, theirs = local[at], _seen(grad, strides)[at]
    return bool((mine.eq(theirs) | (mine.isnan() & theirs.isnan())).all())


def _seen(grad: Tensor, strides: Strides) -> Tensor:
    return grad if grad.stride() == strides else grad.as_strided(grad.shape, strides, grad.storage_offset())
