"""Codes for indices of which every chunk has equally many: positions in the chunk, or Elias-Fano over all.

``k`` indices ascend below ``n``. Each chunk of ``size`` elements has ``each`` of them; the last chunk may be short and
has at most as many. Positions take ``ceil(log2 size)`` bits each, packed as in ``bitpack``. Elias-Fano takes fewer bits
from four indices per chunk on: 9.0 instead of 12 each for 32 of 4096. The choice depends only on the sizes.
"""

import torch
from torch import Tensor

from thinwire.coding import elias_fano
from thinwire.coding.bitpack import pack_words, unpack_words
from thinwire.core.context import Context
from thinwire.kernels.reference import REFERENCE


def nbytes(k: int, n: int, size: int) -> int:
    """Return the bytes of the shorter code."""
    return min(_local_bytes(k, size), sum(elias_fano.sizes(k, n)))


def encode(indices: Tensor, n: int, size: int, ctx: Context) -> Tensor:
    """Encode int64 ``[k]`` to uint8 ``[nbytes(k, n, size)]``."""
    if _is_local(indices.numel(), n, size):
        return pack_words(indices % size, _width(size))
    return (ctx.kernels or REFERENCE).encode_indices(indices, n)


def decode(packed: Tensor, k: int, n: int, size: int, each: int, ctx: Context) -> Tensor:
    """Undo ``encode``."""
    if not _is_local(k, n, size):
        return (ctx.kernels or REFERENCE).decode_indices(packed, k, n)
    chunk = torch.arange(k, device=packed.device).div_(max(each, 1), rounding_mode="floor")
    return unpack_words(packed, k, _width(size)).add_(chunk, alpha=size)


def _width(size: int) -> int:
    return max(size - 1, 0).bit_length()


def _local_bytes(k: int, size: int) -> int:
    return -(-k * _width(size) // 8)


def _is_local(k: int, n: int, size: int) -> bool:
    return _local_bytes(k, size) < sum(elias_fano.sizes(k, n))
