"""Frames: self-describing bytes for what leaves the process, in files and between federated clients.

A frame is decoded without trust: every length is checked against what is there before anything is allocated, and
whatever is wrong is a ``FrameError`` that says what, and at which byte.

Format, version 1, all numbers little-endian::

    head     magic "THWR" | version u16 | reserved u16 = 0 | length u64 of all bytes | crc32 u32 of what follows
    notes    count u16, each: key u8 length + UTF-8 | kind u8: 0 int64, 1 text u32 length + UTF-8
    entries  count u32, each: name u16 length + UTF-8 | kind u8: 0 dense, 1 sparse | dtype u8 | ndim u8 | ndim x u64
             dense:  the elements, in row-major order
             sparse: k u64 | k values | k indices into the flat tensor in Elias-Fano code (``wire.elias_fano``)

dtype: 0 float32, 1 float64, 2 float16, 3 bfloat16, 4 int64, 5 int32, 6 uint8. Values of floating dtypes are finite,
names differ, indices ascend (equal ones add), and nothing follows the last entry.
"""

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thinwire.core import ThinwireError, flat
from thinwire.wire import elias_fano

MAGIC = b"THWR"
VERSION = 1
HEAD = struct.Struct("<4sHHQI")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
MAX_NDIM = 16
MAX_NUMEL = 2**48


class FrameError(ThinwireError):
    """These bytes are no frame, or not one that can be trusted."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(f"bad frame at byte {at}: {what}")
        self.at = at


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape, and what of it was sent: all values, or those at ``indices``, which ascend."""

    shape: tuple[int, ...]
    values: Tensor  # [numel], or [k]
    indices: Tensor | None = None  # int64 [k]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to_dense(self, max_numel: int = 2**31) -> Tensor:
        """The tensor, with zeros where nothing was sent; this is what allocates ``numel`` elements.

        Raises:
            ThinwireError: more than ``max_numel`` elements were declared.
        """
        if self.numel > max_numel:
            raise ThinwireError(f"an entry of {self.numel} elements was declared; at most {max_numel} are made dense")
        if self.indices is None:
            return self.values.view(self.shape)
        out = torch.zeros(self.numel, dtype=self.values.dtype)
        return out.index_add_(0, self.indices, self.values).view(self.shape)


@dataclass(frozen=True)
class Frame:
    """Named tensors, and notes about them."""

    entries: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    notes: Mapping[str, int | str] = field(default_factory=dict[str, int | str])


def encode(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        ThinwireError: a name too long, a dtype or a value that a frame can't hold.
    """
    body = bytearray(struct.pack("<H", len(frame.notes)))
    for key, value in frame.notes.items():
        body += _text(key, "B")
        if isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                raise ThinwireError(f"note {key!r} is {value}; a frame holds 64-bit integers")
            body += struct.pack("<Bq", 0, value)
        else:
            body += b"\x01" + _text(value, "I")
    body += struct.pack("<I", len(frame.entries))
    for name, entry in frame.entries.items():
        values = entry.values.detach().cpu().contiguous().view(-1)
        _check_entry(name, entry, values.numel())
        if values.dtype not in DTYPES or (values.is_floating_point() and not values.isfinite().all()):
            raise ThinwireError(f"{name}: a frame holds finite values of {', '.join(map(str, DTYPES))} only")
        body += _text(name, "H")
        body += struct.pack("<BBB", entry.indices is not None, DTYPES.index(values.dtype), len(entry.shape))
        body += struct.pack(f"<{len(entry.shape)}Q", *entry.shape)
        if entry.indices is not None:
            body += struct.pack("<Q", values.numel())
            body += _bytes(values) + _bytes(elias_fano.encode(entry.indices.cpu(), entry.numel))
        else:
            body += _bytes(values)
    return HEAD.pack(MAGIC, VERSION, 0, HEAD.size + len(body), zlib.crc32(body)) + bytes(body)


def decode(data: bytes) -> Frame:
    """The frame in these bytes, which may come from anywhere.

    Raises:
        FrameError: whatever is wrong with them.
    """
    if not isinstance(data, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FrameError(0, f"a frame is bytes, not {type(data).__name__}")
    reader = _Reader(data)
    magic, version, reserved, length, checksum = reader.unpack(HEAD.format, "head")
    if magic != MAGIC:
        raise FrameError(0, f"the magic is {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FrameError(4, f"version {version}; this thinwire reads version {VERSION}")
    if reserved:
        raise FrameError(6, f"the reserved field is {reserved}, not 0")
    if length != len(data):
        raise FrameError(8, f"{len(data)} bytes where {length} were declared")
    if zlib.crc32(data[HEAD.size :]) != checksum:
        raise FrameError(16, "the checksum does not fit the content")
    notes: dict[str, int | str] = {}
    for _ in range(reader.number("H", "number of notes")):
        key = reader.text("B", "note")
        kind = reader.number("B", "kind of note")
        if kind > 1 or key in notes:
            raise FrameError(reader.at - 1, f"note {key!r} is of kind {kind}, or there twice")
        notes[key] = reader.text("I", "note") if kind else reader.number("q", "note")
    entries: dict[str, Entry] = {}
    for _ in range(reader.number("I", "number of entries")):
        name = reader.text("H", "name of an entry")
        if name in entries:
            raise FrameError(reader.at, f"entry {name!r} is there twice")
        entries[name] = _entry(reader, name)
    if reader.at != len(data):
        raise FrameError(reader.at, f"{len(data) - reader.at} bytes after the last entry")
    return Frame(entries, notes)


def _check_entry(name: str, entry: Entry, count: int) -> None:
    where = entry.indices
    if where is None:
        good = count == entry.numel
    else:
        good = where.numel() == count <= entry.numel and where.dtype == torch.int64 and where.ndim == 1
        good = good and (not count or (int(where[0]) >= 0 and int(where[-1]) < entry.numel))
        good = good and not bool((where.diff() < 0).any())
    if not good or len(entry.shape) > MAX_NDIM or entry.numel > MAX_NUMEL:
        raise ThinwireError(
            f"{name}: {count} values do not fit shape {entry.shape}, or their indices do not ascend in it"
        )


def _entry(reader: "_Reader", name: str) -> Entry:
    start = reader.at
    kind, code, ndim = (int(field) for field in reader.unpack("<BBB", f"kind of {name!r}"))
    if kind > 1 or code >= len(DTYPES) or ndim > MAX_NDIM:
        raise FrameError(start, f"{name!r} has kind {kind}, dtype {code}, {ndim} dimensions")
    shape = reader.unpack(f"<{ndim}Q", f"shape of {name!r}")
    numel = math.prod(shape)
    if numel > MAX_NUMEL or max(shape, default=0) > MAX_NUMEL:
        raise FrameError(start + 3, f"{name!r} has {numel} elements; at most {MAX_NUMEL} are read")
    dtype: torch.dtype = DTYPES[code]
    if kind == 0:
        return Entry(shape, reader.values(numel, dtype, name))
    at = reader.at
    k = reader.number("Q", f"k of {name!r}")
    if k > numel:
        raise FrameError(at, f"{name!r} has {k} values for {numel} elements")
    values = reader.values(k, dtype, name)
    at = reader.at
    packed = reader.values(sum(elias_fano.sizes(k, numel)), torch.uint8, name)
    try:
        indices = elias_fano.decode_checked(packed, k, numel)
    except ThinwireError as error:
        raise FrameError(at, f"indices of {name!r}: {error}") from error
    return Entry(shape, values, indices)


class _Reader:
    """Reads forward, never beyond the end, and knows where it is."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, nbytes: int, what: str) -> bytes:
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
        try:
            return self.take(self.number(length, what), what).decode()
        except UnicodeDecodeError as error:
            raise FrameError(at, f"{what} is not UTF-8") from error

    def values(self, count: int, dtype: torch.dtype, name: str) -> Tensor:
        at = self.at
        data = self.take(count * dtype.itemsize, f"data of {name!r}")
        if not count:
            return torch.empty(0, dtype=dtype)
        values = torch.frombuffer(bytearray(data), dtype=dtype)
        if dtype.is_floating_point and not values.isfinite().all():
            raise FrameError(at, f"{name!r} has values that are not finite")
        return values


def _text(text: str, length: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ThinwireError(f"{text!r:.60} can't be written as UTF-8") from error
    if len(data) >= 256 ** struct.calcsize(length):
        raise ThinwireError(f"{text[:40]!r}... has {len(data)} bytes, too many for a frame")
    return struct.pack("<" + length, len(data)) + data


def _bytes(tensor: Tensor) -> bytes:
    return flat(tensor).view(torch.uint8).numpy().tobytes()
