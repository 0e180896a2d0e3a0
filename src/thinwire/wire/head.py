"""The head of a message: which units a rank used, which it found not to be finite, and at which step it is.

Every rank learns the same of all ranks, so all of them keep or drop a step, and a unit, alike. In a gathered message
it is a byte of the step clock and a bitmap, first all of *used*, then all of *bad*; in a summed one, an element of the
message's dtype for each flag, and no clock: a sum could not tell whose it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.tensors import float_at_least_32
from thinwire.wire.bitpack import pack_bits, unpack_bits

CLOCK = 256
"""Steps until the clock of a head begins again."""


def total(values: Tensor) -> Tensor:
    """Is not finite where any value is not: a sum finds it in one read, without a temporary.

    It may overflow, so on CPUs whoever asks looks again; on CUDA it is in float64, which costs nothing there.
    """
    return values.sum(dtype=torch.float64 if values.is_cuda else float_at_least_32(values.dtype))


def not_finite(totals: Tensor) -> Tensor:
    """Of each; ``x - x`` is 0 for what is finite, else NaN."""
    return (totals - totals).ne(0)


def is_bad(values: Tensor) -> Tensor:
    """Whether anything is not finite."""
    found = not_finite(total(values))
    return found if found.is_cuda or not bool(found) else values.isfinite().all().logical_not()


def encode(used: Sequence[bool], bad: Tensor, dtype: torch.dtype, step: int) -> Tensor:
    """The head as bytes (uint8), or as elements of ``dtype`` to be summed, beside ``bad``, bool ``[units]``."""
    flags = torch.cat([torch.ones(len(used), dtype=torch.uint8, device=bad.device), bad.to(torch.uint8)])
    for i, one in enumerate(used):
        if not one:  # by hand, since on CUDA a copy from the host waits
            flags[i] = 0
    if dtype != torch.uint8:
        return flags.to(dtype)
    return torch.cat([flags.new_full((1,), step % CLOCK), pack_bits(flags)])


def decode(heads: Tensor, num_units: int) -> tuple[Tensor, Tensor, Tensor]:
    """From the heads of all senders, ``[senders, n]``: (used, bad), each bool ``[senders, num_units]``, and clocks."""
    if heads.dtype == torch.uint8:
        flags, clocks = unpack_bits(heads[:, 1:].reshape(-1)).view(len(heads), -1).bool(), heads[:, 0]
    else:
        flags, clocks = heads > 0, torch.zeros_like(heads[:, 0], dtype=torch.uint8)
    return flags[:, :num_units], flags[:, num_units : 2 * num_units], clocks


def size(num_units: int, dtype: torch.dtype) -> int:
    """Elements of a head."""
    return 1 + -(-2 * num_units // 8) if dtype == torch.uint8 else 2 * num_units
