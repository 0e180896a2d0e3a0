"""64-bit hashes of the bits of tensors: cheap, sensitive to order, and equal on machines of one kind.

Each word of 8 bytes is mixed, so that a sign affects more than the highest bit, and multiplied by an odd number that
depends on its place. The words of a chunk are added modulo 2^64, and chunks are chained. One changed word is always
detected; several cancel with a probability of about 2^-30, since signs end at bit 34 or below. Not cryptographic.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from thinwire.core.tensors import flat, is_dense

CHUNK = 2**13
"""Words that are hashed at once on a CPU, so that the intermediate values stay in the L2 cache."""
CHUNK_CUDA = 2**20
MIX = 29
"""Bits that a word is shifted by: not a multiple of any number format's size, so signs don't fall on signs."""
MASK = 2**64 - 1


def chained(hashes: Iterable[int], start: int = 0) -> int:
    """Combine many hashes into one that depends on their order."""
    h = start
    for one in hashes:
        h = ((h ^ one) * 0x9E3779B97F4A7C15) & MASK
        h ^= h >> 29
    return h


def fingerprint(x: Tensor) -> int:
    """Return the hash of the tensor's bits: -0.0 differs from 0.0, and NaNs differ if their bits do."""
    x = x.detach()
    every = (flat(x) if is_dense(x) else x.contiguous().view(-1)).view(torch.uint8)
    size = (CHUNK if every.device.type == "cpu" else CHUNK_CUDA) * 8
    parts = (every[i : i + size] for i in range(0, every.numel(), size))
    if every.device.type == "cpu":
        scratch = np.empty(min(CHUNK, -(-every.numel() // 8)), np.uint64)
        return chained((_of_chunk(part.numpy(), scratch) for part in parts), x.numel())
    sums = [_on_device(part) for part in parts]  # one device synchronization for all
    read = cast("list[int]", cast(Any, torch.stack(sums)).tolist()) if sums else []
    return chained((s & MASK for s in read), x.numel())


def _of_chunk(data: Any, scratch: Any) -> int:
    """Hash a chunk with NumPy, whose 64-bit multiply and shift take half the time of torch's on a CPU."""
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
    mixed = (words >> MIX).bitwise_and_(MASK >> MIX).bitwise_xor_(words)  # the mask clears the shifted-in sign bits
    return mixed.mul_(_weights_on(words.device)[: words.numel()]).sum()


@cache
def _weights(count: int) -> Any:
    """Return one odd number for each word of a chunk; the same with every NumPy version."""
    return np.random.PCG64(0).random_raw(count) | np.uint64(1)


@cache
def _weights_on(device: torch.device) -> Tensor:
    return torch.from_numpy(_weights(CHUNK_CUDA).view(np.int64)).to(device)
