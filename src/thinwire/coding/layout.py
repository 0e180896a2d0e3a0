"""Layout of the payloads in a message. Every rank computes it, so a message does not describe it.

A message is one uint8 buffer. It holds the tensors of all payloads by falling element size, and in the order of the
units within a size. So every tensor is aligned without padding between them. Only the end of a gathered message is
padded, to 8 bytes, so that the rows of the result are aligned too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from thinwire.core import Payload, flat

WIDEST = 16
"""Bytes of the longest dtype (complex128), so that an empty message can be viewed as any."""
ROW_ALIGNMENT = 8


@dataclass(frozen=True)
class Part:
    """One tensor of one payload."""

    unit: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """The layout of a message for these payloads; only their shapes and dtypes are read."""

    def __init__(self, payloads: Sequence[Payload], alignment: int = ROW_ALIGNMENT) -> None:
        tensors = [(u, t) for u, payload in enumerate(payloads) for t in payload]
        self.order = sorted(range(len(tensors)), key=lambda j: -tensors[j][1].dtype.itemsize)
        self.parts: list[Part] = []
        offset = 0
        for j in self.order:
            u, t = tensors[j]
            self.parts.append(Part(u, tuple(t.shape), t.dtype, offset))
            offset += self.parts[-1].nbytes
        self.places = sorted(range(len(self.order)), key=lambda place: self.order[place])
        self.listed = [self.parts[place] for place in self.places]  # in the order of the payloads
        self.num_units = len(payloads)
        self.nbytes = -(-offset // alignment) * alignment
        self.padding = self.nbytes - offset
        self.sizes = [*(part.nbytes for part in self.parts), self.padding]

    @cached_property
    def unit_nbytes(self) -> list[int]:
        """Bytes of each unit's payload, without padding."""
        sums = [0] * self.num_units
        for part in self.parts:
            sums[part.unit] += part.nbytes
        return sums

    def pack(self, payloads: Sequence[Payload], *, in_place: bool = False) -> Tensor:
        """Build the message, uint8 ``[nbytes]``; with ``in_place`` it may be a view of payloads in this layout."""
        tensors = [t for payload in payloads for t in payload]
        ordered = [flat(tensors[j]).view(torch.uint8) for j in self.order]
        if in_place and not self.padding and _adjacent(ordered):
            return ordered[0].as_strided((self.nbytes,), (1,))
        if self.padding:
            ordered.append(ordered[0].new_zeros(self.padding))
        return torch.cat(ordered)

    def unpack(self, message: Tensor) -> list[Payload]:
        """Return the payloads in a message, as views of it."""
        return self.unpack_all(message[: self.nbytes].unsqueeze(0))[0][0]

    def unpack_all(self, messages: Tensor) -> tuple[list[list[Payload]], list[Tensor]]:
        """Return the payloads of all senders, and each payload tensor stacked over senders ``[senders, *shape]``.

        ``messages`` is ``[senders, n]``, n at least ``nbytes`` and a multiple of the largest itemsize. All are views.
        """
        if not self.nbytes:  # the strides of empty rows don't allow a view in a wider dtype
            messages = messages.new_empty(len(messages), WIDEST)
        pieces = cast("tuple[Tensor, ...]", cast(Any, messages[:, : self.nbytes]).split(self.sizes, 1))
        columns = [pieces[place].view(self.parts[place].dtype) for place in self.places]
        columns = [
            column if len(part.shape) == 1 else column.view(len(messages), *part.shape)
            for part, column in zip(self.listed, columns, strict=True)
        ]
        payloads: list[list[list[Tensor]]] = [[[] for _ in range(self.num_units)] for _ in range(len(messages))]
        for part, column in zip(self.listed, columns, strict=True):
            for own, tensor in zip(payloads, column.unbind(), strict=True):
                own[part.unit].append(tensor)
        return [[tuple(payload) for payload in own] for own in payloads], columns


def _adjacent(pieces: Sequence[Tensor]) -> bool:
    """Return True if the pieces follow each other in one storage."""
    storage = pieces[0].untyped_storage().data_ptr()
    end = pieces[0].data_ptr()
    for piece in pieces:
        if piece.untyped_storage().data_ptr() != storage or piece.data_ptr() != end:
            return False
        end += piece.numel()
    return True
