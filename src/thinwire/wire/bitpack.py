"""Bits to bytes and back, in plain PyTorch: bit ``j`` of the stream is bit ``j % 8`` of byte ``j // 8``."""

import torch
from torch import Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """Pack 0/1 bytes, uint8 ``[m]``, into uint8 ``[ceil(m / 8)]``; the last byte is filled with zeros."""
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    packed = padded[:, 0].clone()
    for j in range(1, 8):
        packed |= padded[:, j] << j
    return packed


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of ``pack_bits``: uint8 ``[b]`` to 0/1 bytes ``[8 b]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & 1).view(-1)


def pack_words(words: Tensor, width: int) -> Tensor:
    """Pack the low ``width`` bits of each int64 of ``words`` ``[k]``, least significant first, without gaps."""
    bits = torch.empty(words.numel(), width, dtype=torch.uint8, device=words.device)
    for j in range(width):
        bits[:, j] = (words >> j) & 1
    return pack_bits(bits.view(-1))


def unpack_words(packed: Tensor, count: int, width: int) -> Tensor:
    """The inverse of ``pack_words``: int64 ``[count]``."""
    bits = unpack_bits(packed)[: count * width].view(count, width)
    words = torch.zeros(count, dtype=torch.int64, device=packed.device)
    for j in range(width):
        words |= bits[:, j].to(torch.int64) << j
    return words
