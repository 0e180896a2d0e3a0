"""Reader of untrusted bytes: never reads past their end and never allocates more memory than allowed."""

import struct
from typing import Any

import torch
from torch import Tensor

from thinwire.core.errors import ThinwireError

MULTIPLE = 8
"""Memory that decoding may take, as a multiple of ``max_content``."""
LEAST = 2**16
"""Bytes of memory that decoding may always take."""
TEMPORARY = 200
"""Most bytes of temporaries for each element of a piece."""


class FrameError(ThinwireError):
    """Error: the bytes are not a valid frame. ``at`` is a byte offset; in compressed frames, in the content."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(f"bad frame at byte {at}: {what}")
        self.at = at


class Allowance:
    """Memory limit of one frame: an eighth for temporaries, in pieces of ``step`` elements; the rest for results."""

    def __init__(self, max_content: int) -> None:
        self.limit = max(MULTIPLE * max_content, LEAST)
        self.step = max(64, min(2**18, self.limit // 8 // TEMPORARY) // 64 * 64)
        self.kept = 0

    def keep(self, nbytes: int, at: int, what: str) -> None:
        """Count ``nbytes`` that are about to be allocated; beyond the limit, a ``FrameError`` says what for."""
        if self.kept + nbytes > self.limit - self.limit // 8:
            raise FrameError(
                at,
                f"{what} takes {nbytes} bytes of memory beside {self.kept}; all of it may take {self.limit}, which is "
                f"{MULTIPLE} times max_content=",
            )
        self.kept += nbytes


class Reader:
    """A forward reader; ``at`` is the offset of the next byte."""

    def __init__(self, data: bytes, allowance: Allowance) -> None:
        self.data = memoryview(data)
        self.allowance = allowance
        self.at = 0

    def take(self, nbytes: int, what: str) -> memoryview:
        if nbytes > len(self.data) - self.at:
            raise FrameError(self.at, f"{what} takes {nbytes} bytes, {len(self.data) - self.at} are left")
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def unpack(self, format: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(format, self.take(struct.calcsize(format), what))

    def number(self, format: str, what: str) -> int:
        return self.unpack("<" + format, what)[0]

    def text(self, length: str, what: str) -> str:
        at = self.at
        data = self.take(self.number(length, what), what)
        self.allowance.keep(5 * len(data), at, what)  # one wide character makes Python store 4 bytes for each
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise FrameError(at, f"{what} is not UTF-8") from error

    def values(self, count: int, dtype: torch.dtype, name: str) -> Tensor:
        at = self.at
        data = self.take(count * dtype.itemsize, f"data of {name!r}")
        self.allowance.keep(len(data), at, f"data of {name!r}")
        values = tensor(data, dtype)
        if dtype.is_floating_point and not finite(values, self.allowance.step):
            raise FrameError(at, f"{name!r} has values that are not finite")
        return values


def tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")


def finite(values: Tensor, step: int) -> bool:
    return all(bool(values[i : i + step].isfinite().all()) for i in range(0, len(values), step))
