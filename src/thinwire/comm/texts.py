"""Texts between ranks, for control: UTF-8 bytes with their length in front, read without trust.

Nothing that arrives is run. A length is looked at before room is made for it, and what is wrong is an error that names
the rank; where a rank says the same to all, all of them raise it.
"""

import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from thinwire.core.errors import ThinwireError

Gather: TypeAlias = Callable[[bytes], Sequence[bytes]]
"""From this rank's bytes to those of all, which are as many."""
T = TypeVar("T")
R = TypeVar("R")
E = TypeVar("E", bound=BaseException)

HEAD = struct.Struct("<4sq")
MAGIC = b"THWT"
FIRST = 128
"""Bytes of the first message, which holds the head and as much of the text as there is room for."""
CHUNK = 2**20
"""Bytes of each further one: what ranks with short texts send and get along with the longest."""
LIMIT = 2**24
"""Bytes of a text."""


def exchange(text: str, gather: Gather) -> list[str]:
    """The texts of all ranks, from the text of this one.

    Raises:
        ThinwireError: one of them is too long, or is no text.
    """
    mine = text.encode("utf-8", "backslashreplace")  # a path may hold what is no UTF-8
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
    """Read what every rank said.

    Args:
        read: raises whatever it likes where that is not ``what``.

    Raises:
        ThinwireError: a rank said something else.
    """
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
    """Mark an error that every rank raises, or has heard of."""
    setattr(error, _KNOWN, True)
    return error


def is_known(error: BaseException) -> bool:
    """Whether every rank knows of it, so that nobody need be told."""
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
