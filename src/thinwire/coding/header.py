"""The header of a message: which units a rank used, which it found not to be finite, and at which step it is.

Every rank learns the same of all ranks, so all of them keep or drop a step, and a unit, alike. In a gathered message
it is a byte of the step clock and a bitmap, first all of *used*, then all of *nonfinite*. In a summed one it is an
element of the message's dtype for each flag, and ``SLOTS`` of which a rank fills the one of its step: if more than one
is not zero in the sum, the ranks are at different steps. A sum can't tell whose step is which.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.coding.bitpack import pack_bits, unpack_bits
from thinwire.core.tensors import float_at_least_32

CLOCK = 256
"""Steps until the clock of a gathered header begins again."""
SLOTS = 4
"""Steps until the clock of a summed header wraps around. Few suffice: the first exchange shows a gap of one step."""


def total(values: Tensor) -> Tensor:
    """Sum all values: the sum is nonfinite if any value is. It takes one read and no temporary.

    On CPUs the sum of finite values may overflow, so the caller checks again; on CUDA it is in float64, at no cost.
    """
    return values.sum(dtype=torch.float64 if values.is_cuda else float_at_least_32(values.dtype))


def nonfinite_of(totals: Tensor) -> Tensor:
    """Return True for each nonfinite total: ``x - x`` is 0 if x is finite, else NaN."""
    return (totals - totals).ne(0)


def is_nonfinite(values: Tensor) -> Tensor:
    """Return a bool tensor ``[]``: True if any value is nonfinite."""
    found = nonfinite_of(total(values))
    return found if found.is_cuda or not bool(found) else values.isfinite().all().logical_not()


def encode(used: Sequence[bool], nonfinite: Tensor, dtype: torch.dtype, step: int) -> Tensor:
    """Encode to bytes (uint8), or to elements of ``dtype`` to be summed; ``nonfinite`` is bool ``[units]``."""
    gathered = dtype == torch.uint8
    parts = [torch.ones(len(used), dtype=torch.uint8, device=nonfinite.device), nonfinite.to(torch.uint8)]
    flags = torch.cat(parts if gathered else [*parts, parts[0].new_zeros(SLOTS)])
    for i, one in enumerate(used):
        if not one:  # one write per flag, since on CUDA a copy from the host would wait
            flags[i] = 0
    if not gathered:
        flags[step % SLOTS - SLOTS] = 1
        return flags.to(dtype)
    return torch.cat([flags.new_full((1,), step % CLOCK), pack_bits(flags)])


def decode(headers: Tensor, num_units: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decode the headers of all senders, ``[senders, n]``, or their sum, ``[1, n]``.

    Returns used and nonfinite, each bool ``[senders, num_units]``, and if the senders are at different steps, ``[]``.
    """
    if headers.dtype == torch.uint8:
        flags = unpack_bits(headers[:, 1:].reshape(-1)).view(len(headers), -1).bool()
        parted = (headers[:, 0] != headers[0, 0]).any()
    else:
        flags = headers > 0
        parted = flags[:, -SLOTS:].any(0).sum() > 1
    return flags[:, :num_units], flags[:, num_units : 2 * num_units], parted


def size(num_units: int, dtype: torch.dtype) -> int:
    """Return the elements of a header."""
    return 1 + -(-2 * num_units // 8) if dtype == torch.uint8 else 2 * num_units + SLOTS
