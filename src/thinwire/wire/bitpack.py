"""Bits to bytes and back, in plain PyTorch: bit ``j`` of the stream is bit ``j % 8`` of byte ``j // 8``."""

import torch
from torch import Tensor


def pack_fields(fields: Tensor, width: int) -> Tensor:
    """Pack uint8 ``[m]`` below ``2**width``, ``width`` from 1 to 8, into uint8 ``[ceil(m * width / 8)]``.

    The first field stands in the lowest bits, and fields follow each other without gaps; zeros fill the last byte.
    """
    if 8 % width:
        shifts = torch.arange(width, dtype=torch.uint8, device=fields.device)
        return pack_fields(((fields.unsqueeze(1) >> shifts) & 1).view(-1), 1)
    each = 8 // width
    padded = torch.nn.functional.pad(fields, (0, -fields.numel() % each)).view(-1, each)
    packed = padded[:, 0].clone()
    for j in range(1, each):
        packed |= padded[:, j] << (j * width)
    return packed


def unpack_fields(packed: Tensor, width: int) -> Tensor:
    """The inverse of ``pack_fields``: uint8 ``[b]`` to uint8 ``[floor(b * 8 / width)]``."""
    if width == 8:
        return packed
    if 8 % width:
        bits = unpack_fields(packed, 1)
        bits = bits[: bits.numel() // width * width].view(-1, width)
        fields = bits[:, 0].clone()
        for j in range(1, width):
            fields |= bits[:, j] << j
        return fields
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & (2**width - 1)).view(-1)


def pack_trits(trits: Tensor) -> Tensor:
    """Pack uint8 ``[m]`` of 0, 1 and 2, five a byte, into ``[ceil(m / 5)]``; the first is worth 1, the next 3."""
    padded = torch.nn.functional.pad(trits, (0, -trits.numel() % 5)).view(-1, 5)
    packed = padded[:, 4].clone()
    for j in (3, 2, 1, 0):
        packed.mul_(3).add_(padded[:, j])
    return packed


def unpack_trits(packed: Tensor) -> Tensor:
    """The inverse of ``pack_trits``: uint8 ``[b]`` to uint8 ``[5 b]``."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=packed.device)
    return (torch.div(packed.unsqueeze(1), powers, rounding_mode="floor") % 3).view(-1)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack 0/1 bytes, uint8 ``[m]``, into uint8 ``[ceil(m / 8)]``; the last byte is filled with zeros."""
    return pack_fields(bits, 1)


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of ``pack_bits``: uint8 ``[b]`` to 0/1 bytes ``[8 b]``."""
    return unpack_fields(packed, 1)


def pack_words(words: Tensor, width: int) -> Tensor:
    """Pack the low ``width`` bits of each int64 of ``words`` ``[k]``, least significant first, without gaps."""
    if 0 < width <= 8:
        return pack_fields((words & (2**width - 1)).to(torch.uint8), width)
    bits = torch.empty(words.numel(), width, dtype=torch.uint8, device=words.device)
    for j in range(width):
        bits[:, j] = (words >> j) & 1
    return pack_bits(bits.view(-1))


def unpack_words(packed: Tensor, count: int, width: int) -> Tensor:
    """The inverse of ``pack_words``: int64 ``[count]``."""
    if 0 < width <= 8:
        return unpack_fields(packed, width)[:count].to(torch.int64)
    bits = unpack_bits(packed)[: count * width].view(count, width)
    words = torch.zeros(count, dtype=torch.int64, device=packed.device)
    for j in range(width):
        words |= bits[:, j].to(torch.int64) << j
    return words
