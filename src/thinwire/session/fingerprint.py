"""64-bit hashes of the bits of tensors: cheap, sensitive to order, and equal on machines of one kind.

A word of 8 bytes is mixed, so that no sign stands in its highest bit alone, and multiplied by an odd number of its
place; the words of a chunk are added modulo 2^64, and chunks are chained. One word that differs always shows; several
cancel with a chance of some 2^-30, since signs end at bit 34 or below. It finds faults, not forgeries.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from thinwire.core.tensors import flat, is_dense

CHUNK = 2**13
"""Words that are hashed at once on a CPU, where what is made of them stays in the second cache."""
CHUNK_CUDA = 2**20
MIX = 29
"""Bits that a word is shifted by: of no number format a multiple of its size, so that signs don't meet each other."""
MASK = 2**64 - 1


def chained(hashes: Iterable[int], start: int = 0) -> int:
    """One hash of many, in their order."""
    h = start
    for one in hashes:
        h = ((h ^ one) * 0x9E3779B97F4A7C15) & MASK
        h ^= h >> 29
    return h


def fingerprint(x: Tensor) -> int:
    """The hash of what stands in memory: -0.0 is not 0.0, and every NaN is what it is."""
    x = x.detach()
    every = (flat(x) if is_dense(x) else x.contiguous().view(-1)).view(torch.uint8)
    size = (CHUNK if every.device.type == "cpu" else CHUNK_CUDA) * 8
    parts = (every[i : i + size] for i in range(0, every.numel(), size))
    if every.device.type == "cpu":
        scratch = np.empty(min(CHUNK, -(-every.numel() // 8)), np.uint64)
        return chained((_of_chunk(part.numpy(), scratch) for part in parts), x.numel())
    sums = [_on_device(part) for part in parts]  # read at once
    read = cast("list[int]", cast(Any, torch.stack(sums)).tolist()) if sums else []
    return chained((s & MASK for s in read), x.numel())


def _of_chunk(data: Any, scratch: Any) -> int:
    """NumPy multiplies and shifts 64 bits in half the time that torch takes on a CPU."""
    if data.size % 8:
        data = np.pad(data, (0, -data.size % 8))
    words = data.view(np.uint64)
    mixed = scratch[: words.size]
    np.right_shift(words, np.uint64(MIX), out=mixed)
    np.bitwise_xor(mixed, words, out=mixed)
    np.multiply(mixed, _weights(CHUNK)[: words.size], out=mixed)
    return int(mixed.sum(dtype=np.uint64))


def _on_device(part: Tensor) -> Tensor:
    if part.numel() % 8 or part.storage_offset() % 8:
        part = torch.nn.functional.pad(part, (0, -part.numel() % 8)).clone()
    words = part.view(torch.int64)
    mixed = (words >> MIX).bitwise_and_(MASK >> MIX).bitwise_xor_(words)  # what is shifted in are copies of the sign
    return mixed.mul_(_weights_on(words.device)[: words.numel()]).sum()


@cache
def _weights(count: int) -> Any:
    """Odd numbers, one for each place of a chunk; the same with every version of NumPy."""
    return np.random.PCG64(0).random_raw(count) | np.uint64(1)


@cache
def _weights_on(device: torch.device) -> Tensor:
    return torch.from_numpy(_weights(CHUNK_CUDA).view(np.int64)).to(device)
