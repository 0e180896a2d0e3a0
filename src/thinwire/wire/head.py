"""The head of a message: which units a rank used, and which it found not to be finite.

Every rank learns the same of all ranks, so all of them keep or drop a step, and a unit, alike. In a gathered message
it is a bitmap, first all of *used*, then all of *bad*; in a summed one, an element of the message's dtype for each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.core import float_at_least_32
from thinwire.wire.bitpack import pack_bits, unpack_bits


def is_bad(values: Tensor) -> Tensor:
    """Whether anything is not finite; a sum finds it in one read, without a temporary."""
    return values.sum(dtype=float_at_least_32(values.dtype)).isfinite().logical_not()


def encode(used: Sequence[bool], bad: Tensor, dtype: torch.dtype) -> Tensor:
    """The head as bytes (uint8), or as elements of ``dtype`` to be summed, beside ``bad``, bool ``[units]``."""
    flags = torch.cat([torch.tensor(used, device=bad.device), bad]).to(torch.uint8)
    return pack_bits(flags) if dtype == torch.uint8 else flags.to(dtype)


def decode(heads: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    """From the heads of all senders, ``[senders, n]``: (used, bad), each bool ``[senders, num_units]``."""
    flags = torch.stack([unpack_bits(head) for head in heads]) if heads.dtype == torch.uint8 else heads
    return flags[:, :num_units] > 0, flags[:, num_units : 2 * num_units] > 0


def size(num_units: int, dtype: torch.dtype) -> int:
    """Elements of a head."""
    return -(-2 * num_units // 8) if dtype == torch.uint8 else 2 * num_units
