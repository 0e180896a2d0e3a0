"""Packing of bits into bytes in plain PyTorch: bit ``j`` of the stream is bit ``j % 8`` of byte ``j // 8``."""

from functools import partial

import torch
from torch import Tensor

TO_LAST_BYTE = sum(1 << (56 - 7 * j) for j in range(8))
"""Multiplier that moves bit ``8 j`` of a 64-bit word to bit ``56 + j``."""


def pack_fields(fields: Tensor, width: int) -> Tensor:
    """Pack uint8 ``[m]`` below ``2**width``, ``width`` from 1 to 8, into uint8 ``[ceil(m * width / 8)]``.

    The first field is in the lowest bits. Fields follow each other without gaps, and zeros fill the last byte.
    """
    if 8 % width:
        shifts = torch.arange(width, dtype=torch.uint8, device=fields.device)
        return pack_fields(((fields.unsqueeze(1) >> shifts) & 1).view(-1), 1)
    if not fields.numel():
        return torch.empty(0, dtype=torch.uint8, device=fields.device)
    each = 8 // width
    padded = torch.nn.functional.pad(fields, (0, -fields.numel() % each))
    if width == 1:  # a multiplication brings the lowest bit of each of 8 bytes into the last of them
        return (
            (padded.view(torch.int64) * TO_LAST_BYTE)
            .view(torch.uint8)[7::8]
            .clone(memory_format=torch.contiguous_format)
        )
    padded = padded.view(-1, each)
    packed = padded[:, 0].clone()
    for j in range(1, each):
        packed |= padded[:, j] << (j * width)
    return packed


def unpack_fields(packed: Tensor, width: int) -> Tensor:
    """Undo ``pack_fields``: uint8 ``[b]`` to uint8 ``[floor(b * 8 / width)]``."""
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
    """Pack uint8 ``[m]`` of 0, 1 and 2, five per byte, into ``[ceil(m / 5)]``: the first has weight 1, the next 3."""
    padded = torch.nn.functional.pad(trits, (0, -trits.numel() % 5)).view(-1, 5)
    packed = padded[:, 4].clone()
    for j in (3, 2, 1, 0):
        packed.mul_(3).add_(padded[:, j])
    return packed


def unpack_trits(packed: Tensor) -> Tensor:
    """Undo ``pack_trits``: uint8 ``[b]`` to uint8 ``[5 b]``."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=packed.device)
    return (torch.div(packed.unsqueeze(1), powers, rounding_mode="floor") % 3).view(-1)


pack_bits = partial(pack_fields, width=1)
"""Pack 0/1 bytes, uint8 ``[m]``, into uint8 ``[ceil(m / 8)]``; the last byte is filled with zeros."""
unpack_bits = partial(unpack_fields, width=1)
"""Undo ``pack_bits``: uint8 ``[b]`` to 0/1 bytes ``[8 b]``."""


def pack_words(words: Tensor, width: int) -> Tensor:
    """Pack the low ``width`` bits of each int64 of ``words`` ``[k]``, least significant first, without gaps."""
    if width <= 8:
        return pack_fields((words & (2**width - 1)).to(torch.uint8), width) if width else words.new_empty(0).byte()
    groups = torch.nn.functional.pad(words & (2**width - 1), (0, -words.numel() % 8)).view(-1, 8)
    start = torch.arange(0, 8 * width, 8, device=words.device)  # of each byte, in bits of its group
    first = start // width
    packed = groups.index_select(1, first) >> (start - width * first)
    packed |= groups.index_select(1, (first + 1).clamp_(max=7)) << (width * (first + 1) - start).clamp_(max=8)
    return packed.to(torch.uint8).view(-1)[: -(-words.numel() * width // 8)]


def unpack_words(packed: Tensor, count: int, width: int) -> Tensor:
    """Undo ``pack_words``; returns int64 ``[count]``."""
    if width <= 8:
        return unpack_fields(packed, width)[:count].long() if width else packed.new_zeros(count).long()
    groups = torch.nn.functional.pad(packed.long(), (0, -packed.numel() % width)).view(-1, width)
    start = torch.arange(0, 8 * width, width, device=packed.device)  # of each of 8 words, in bits of its group
    first, shift = start // 8, start % 8
    words = groups.index_select(1, first) >> shift
    for j in range(1, -(-(width + 7) // 8)):
        words |= groups.index_select(1, (first + j).clamp_(max=width - 1)) << (8 * j - shift)
    return words.view(-1)[:count] & (2**width - 1)
