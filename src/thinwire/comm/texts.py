"""Texts between ranks on the control channel: UTF-8 bytes after their length, read without trust.

Received bytes are never executed. A length is checked before memory is allocated for it. An error names the rank that
sent the bad text; if it sent the same to all ranks, all of them raise the error.
"""

import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from thinwire.core.errors import ThinwireError

Gather: TypeAlias = Callable[[bytes], Sequence[bytes]]
"""Function from this rank's bytes to the bytes of all ranks; each rank sends equally many."""
T = TypeVar("T")
R = TypeVar("R")
E = TypeVar("E", bound=BaseException)

HEAD = struct.Struct("<4sq")
MAGIC = b"THWT"
FIRST = 128
"""Bytes of the first message: the header and as much of the text as fits."""
CHUNK = 2**20
"""Most bytes of each further message; ranks with shorter texts pad it."""
LIMIT = 2**24
"""Most bytes of a text."""


def exchange(text: str, gather: Gather) -> list[str]:
    """Exchange texts: returns those of all ranks; one that is too long or is no text raises a ``ThinwireError``."""
    mine = text.encode("utf-8", "backslashreplace")  # a path may hold bytes that are not UTF-8
    room = FIRST - HEAD.size
    rows = gather((HEAD.pack(MAGIC, len(mine)) + mine[:room]).ljust(FIRST, b"\0"))
    lengths = [_length(row, rank) for rank, row in enumerate(rows)]
    parts = [bytearray(row[HEAD.size :][:length]) for row, length in zip(rows, lengths, strict=True)]
    longest = max(lengths)
    for at in range(room, longest, CHUNK):
        width = min(CHUNK, longest - at)
        for part, length, row in zip(parts, lengths, gather(mine[at : at + width].ljust(width, b"\0")), strict=True):
            part += row[: max(0, length - at)]
    return heard(parts, lambda part: part.decode(), "text")


def heard(said: Sequence[T], read: Callable[[T], R], what: str) -> list[R]:
    """Parse each rank's message; if ``read`` raises, it is no ``what``, and a ``ThinwireError`` names the rank."""
    found: list[R] = []
    for rank, one in enumerate(said):
        try:
            found.append(read(one))
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise known_to_all(
                ThinwireError(
                    f"rank {rank} said something that is no {what} ({type(error).__name__}: {error!s:.100}); give all "
                    "ranks the same version of thinwire, and call the same on all of them"
                )
            ) from error
    return found


def known_to_all(error: E) -> E:
    """Mark an error that every rank raises or has been told of."""
    setattr(error, _KNOWN, True)
    return error


def is_known(error: BaseException) -> bool:
    """Return True if every rank knows of this error, so that no rank needs to be told."""
    return getattr(error, _KNOWN, False)


_KNOWN = "known_to_all_ranks"


def _length(row: bytes, rank: int) -> int:
    magic, length = HEAD.unpack_from(row)
    if magic != MAGIC or length < 0:
        raise known_to_all(
            ThinwireError(
                f"rank {rank} sent {row[: HEAD.size].hex()} where a text begins with {MAGIC.hex()}: give all ranks the "
                "same version of thinwire, and call the same on all of them"
            )
        )
    if length > LIMIT:
        raise known_to_all(
            ThinwireError(f"rank {rank} has a text of {length:,} bytes for the others; the limit is {LIMIT:,}")
        )
    return length
