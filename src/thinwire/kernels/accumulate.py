"""Accumulation of a gradient into a memory's state: the arithmetic that every kernel must reproduce."""

import torch
from torch import Tensor

from thinwire.core.loops import Accumulation


def accumulate(
    rule: Accumulation,
    scale: float,
    grad: Tensor,
    v: Tensor,
    new_v: Tensor,
    u: Tensor | None = None,
    new_u: Tensor | None = None,
) -> None:
    """Compute ``Accumulation`` in plain PyTorch: fill ``new_v`` and ``new_u``, and leave ``grad`` unchanged."""
    if new_v.dtype.itemsize < 4:  # 16-bit states are rounded once, when they are written
        wide_v, wide_u = new_v.float(), None if new_u is None else new_u.float()
        accumulate(rule, scale, grad, v.float(), wide_v, None if u is None else u.float(), wide_u)
        new_v.copy_(wide_v)
        if new_u is not None and wide_u is not None:
            new_u.copy_(wide_u)
        return
    grad = grad.to(new_v.dtype)
    if scale != 1.0:
        grad = grad * scale
    if u is None or new_u is None or rule.momentum is None:
        torch.add(v, grad, out=new_v)
    elif rule.nesterov:
        torch.add(u, grad, out=new_u).mul_(rule.momentum)
        torch.add(v, grad, out=new_v).add_(new_u)
    else:
        torch.add(grad, u, alpha=rule.momentum, out=new_u)
        torch.add(v, new_u, out=new_v)
