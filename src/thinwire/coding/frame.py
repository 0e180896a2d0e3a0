"""Frames: a self-describing byte format for files and for messages between federated clients.

Decoding does not trust the bytes. It checks every length against the bytes that are left before it allocates, and
it takes at most 8 times ``max_content`` of memory (at least 64 KiB). A ``FrameError`` names what is wrong and at which
byte.

Format, version 1, all numbers little-endian::

    header   magic "THWR" | version u16 | stage u16 | length u64 of all bytes | crc32 u32 of what follows
             stage 0: notes and entries follow; 1: their length u64, then both as one zstd frame
    notes    count u16, each: key u8 length + UTF-8 | kind u8: 0 int64, 1 text u32 length + UTF-8
    entries  count u32, each: name u16 length + UTF-8 | kind u8 | dtype u8 | ndim u8 | ndim x u64, and by kind
             0 dense:  the elements, in row-major order
             1 sparse: k u64 | k values | k indices into the flat tensor in Elias-Fano code (``coding.elias_fano``)
             2 sparse: k u64 | k values | b u8 | length u64 | k indices in Golomb-Rice code (``coding.rice``)

dtype: 0 float32, 1 float64, 2 float16, 3 bfloat16, 4 int64, 5 int32, 6 uint8; sparse entries also 7 sign, 8 int2,
9 int4, 10 int8 (``coding.values``): the scales, then the packed values. Floating-point values are finite. Names differ.
Indices ascend (equal ones add; Golomb-Rice code allows none), and nothing follows the last entry.
"""

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from thinwire.coding import elias_fano, rice, zstd
from thinwire.coding import values as codes
from thinwire.coding.reader import Allowance, FrameError, Reader, finite, tensor
from thinwire.core import ThinwireError, flat

MAGIC = b"THWR"
VERSION = 1
HEAD = struct.Struct("<4sHHQI")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
DENSE, ELIAS_FANO, RICE = range(3)
PLAIN, ZSTD = range(2)
MAX_NDIM = 16
MAX_NUMEL = 2**48
ENTRY_BYTES = 900
TENSOR_BYTES = 800
DIMENSION_BYTES = 48
NOTE_BYTES = 300
"""Bytes of memory besides the values: for an entry with its name, each of its tensors, each dimension, and a note."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape and the values that were sent, all of them or those at the ascending ``indices``."""

    shape: tuple[int, ...]
    values: Tensor  # [numel], or [k]
    indices: Tensor | None = None  # int64 [k]
    coded: tuple[str, Tensor, Tensor] | None = None
    """Code name, scales and packed bytes of ``coding.values``; None if ``values`` are written in their dtype."""
    allowance: Allowance | None = field(default=None, compare=False, repr=False)
    """Memory limit of the frame that this entry was decoded from."""

    @staticmethod
    def quantised(shape: tuple[int, ...], values: Tensor, indices: Tensor, code: str) -> "Entry":
        """Make a sparse entry in a code of ``coding.values``; its ``values`` are the decoded ones, without zeros.

        Raises:
            ThinwireError: there is no such code.
        """
        if code not in codes.CODES:
            raise ThinwireError(f"code is {code!r}; choose {', '.join(codes.CODES)}")
        values, indices = values[values != 0].detach().cpu(), indices[values != 0]
        scales, packed = codes.encode(values, code)
        return Entry(shape, codes.decode(scales, packed, code, values.numel()), indices, (code, scales, packed))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to_dense(self, max_numel: int | None = None) -> Tensor:
        """Return the whole tensor, with zeros for elements that were not sent; this allocates ``numel`` elements.

        Args:
            max_numel: the most elements allowed. By default as many as fit into what ``decode`` left of its memory
                limit, 8 times ``max_content``; 2^31 for an entry that was not decoded.

        Raises:
            ThinwireError: more than ``max_numel`` elements were declared.
        """
        if self.indices is None:
            return self.values.view(self.shape)
        if max_numel is None:
            allowance = self.allowance
            max_numel = (allowance.limit - allowance.kept) // self.values.element_size() if allowance else 2**31
        if self.numel > max_numel:
            raise ThinwireError(
                f"an entry of {self.numel} elements was declared; at most {max_numel} are made dense, give max_numel= "
                "if you know its size, or decode with a larger max_content="
            )
        out = torch.zeros(self.numel, dtype=self.values.dtype, device="cpu")
        return out.index_add_(0, self.indices, self.values).view(self.shape)


@dataclass(frozen=True)
class Frame:
    """Named tensors, with notes."""

    entries: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    notes: Mapping[str, int | str] = field(default_factory=dict[str, int | str])


def encode(
    frame: Frame, *, indices: Literal["elias_fano", "rice"] = "elias_fano", compress: Literal["zstd"] | None = None
) -> bytes:
    """Return the bytes of a frame.

    Args:
        indices: the code of sparse indices: Golomb-Rice is 4 % shorter and slower to read.
        compress: ``"zstd"`` as a last stage, which needs ``thinwire[zstd]``. It saves a tenth of sparse float32
            values, a few percent of 4-bit values, and nothing of 1- or 2-bit values.

    Raises:
        ThinwireError: a name is too long, a frame can't hold a dtype or a value, or an option is unknown.
    """
    if indices not in ("elias_fano", "rice") or compress not in (None, "zstd"):
        raise ThinwireError(
            f"indices={indices!r}, compress={compress!r}; choose 'elias_fano' or 'rice', None or 'zstd'"
        )
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
        body += _text(name, "H") + _entry_bytes(name, entry, RICE if indices == "rice" else ELIAS_FANO)
    content = bytes(body)
    if compress == "zstd":
        content = struct.pack("<Q", len(body)) + zstd.compress(content)
    stage = ZSTD if compress == "zstd" else PLAIN
    return HEAD.pack(MAGIC, VERSION, stage, HEAD.size + len(content), zlib.crc32(content)) + content


def decode(data: bytes, *, max_content: int = 2**28) -> Frame:
    """Decode a frame from untrusted bytes.

    Args:
        max_content: the most bytes a compressed frame may have after decompression. Decoding any frame allocates at
            most 8 times this (or 64 KiB if that is more), including decompressed content, tensors and names.
            ``Entry.to_dense`` on one entry stays within the same limit. In memory a sparse entry takes 8 bytes per
            index and up to 8 per value, even if it has fewer on the wire.

    Raises:
        FrameError: the bytes are not a valid frame, or they need more memory.
        ThinwireError: the frame is compressed, and the package zstandard is not installed.
    """
    if not isinstance(data, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FrameError(0, f"a frame is bytes, not {type(data).__name__}")
    allowance = Allowance(max_content)
    reader = Reader(data, allowance)
    magic, version, stage, length, checksum = reader.unpack(HEAD.format, "head")
    if magic != MAGIC:
        raise FrameError(0, f"the magic is {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FrameError(4, f"version {version}; this thinwire reads version {VERSION}")
    if stage not in (PLAIN, ZSTD):
        raise FrameError(6, f"the stage is {stage}, not 0 or 1")
    if length != len(data):
        raise FrameError(8, f"{len(data)} bytes where {length} were declared")
    if zlib.crc32(memoryview(data)[HEAD.size :]) != checksum:
        raise FrameError(16, "the checksum does not fit the content")
    if stage == ZSTD:
        size = reader.number("Q", "length of the content")
        at = reader.at - 8
        if size > max_content:
            raise FrameError(at, f"{size} bytes of content; at most {max_content} are read, see max_content=")
        allowance.keep(size, at, "its content")
        try:
            reader = Reader(zstd.decompress(reader.data[reader.at :], size), allowance)
        except zstd.BadContent as error:
            raise FrameError(reader.at, str(error)) from error
    notes: dict[str, int | str] = {}
    for _ in range(reader.number("H", "number of notes")):
        allowance.keep(NOTE_BYTES, reader.at, "a note")
        key = reader.text("B", "note")
        kind = reader.number("B", "kind of note")
        if kind > 1 or key in notes:
            raise FrameError(reader.at - 1, f"note {key!r} is of kind {kind}, or there twice")
        notes[key] = reader.text("I", "note") if kind else reader.number("q", "note")
    entries: dict[str, Entry] = {}
    for _ in range(reader.number("I", "number of entries")):
        allowance.keep(ENTRY_BYTES, reader.at, "an entry")
        name = reader.text("H", "name of an entry")
        if name in entries:
            raise FrameError(reader.at, f"entry {name!r} is there twice")
        entries[name] = _entry(reader, name)
    if reader.at != len(reader.data):
        raise FrameError(reader.at, f"{len(reader.data) - reader.at} bytes after the last entry")
    return Frame(entries, notes)


def _entry_bytes(name: str, entry: Entry, kind: int) -> bytes:
    values = entry.values.detach().cpu().contiguous().view(-1)
    _check_entry(name, entry, values.numel())
    if values.dtype not in DTYPES or (values.is_floating_point() and not values.isfinite().all()):
        raise ThinwireError(f"{name}: a frame holds finite values of {', '.join(map(str, DTYPES))} only")
    shape = struct.pack(f"<{len(entry.shape)}Q", *entry.shape)
    if entry.indices is None:
        return struct.pack("<BBB", DENSE, DTYPES.index(values.dtype), len(entry.shape)) + shape + _bytes(values)
    if entry.coded is None:
        dtype, written = DTYPES.index(values.dtype), _bytes(values)
    else:
        code, scales, packed = entry.coded
        dtype, written = len(DTYPES) + list(codes.CODES).index(code), _bytes(scales) + _bytes(packed)
    where = entry.indices.cpu()
    if kind == RICE:
        b = rice.parameter(values.numel(), entry.numel)
        packed = rice.encode(where, b)
        where = struct.pack("<BQ", b, len(packed)) + packed
    else:
        where = _bytes(elias_fano.encode(where, entry.numel))
    head = struct.pack("<BBB", kind, dtype, len(entry.shape)) + shape + struct.pack("<Q", values.numel())
    return head + written + where


def _check_entry(name: str, entry: Entry, count: int) -> None:
    where = entry.indices
    if where is None:
        good = count == entry.numel
    else:
        good = where.numel() == count <= entry.numel and where.dtype == torch.int64 and where.ndim == 1
        good = good and (not count or (int(where[0]) >= 0 and int(where[-1]) < entry.numel))
        good = good and not bool((where.diff() < 0).any())
    if entry.coded is not None:
        code, scales, packed = entry.coded
        good = good and where is not None and (scales.numel(), packed.numel()) == codes.sizes(code, count)
    if not good or len(entry.shape) > MAX_NDIM or entry.numel > MAX_NUMEL:
        raise ThinwireError(
            f"{name}: {count} values do not fit shape {entry.shape}, or their indices do not ascend in it"
        )


def _entry(reader: Reader, name: str) -> Entry:
    start = reader.at
    kind, dtype, ndim = (int(field) for field in reader.unpack("<BBB", f"kind of {name!r}"))
    coded = dtype >= len(DTYPES)
    if kind > RICE or dtype >= len(DTYPES) + (kind != DENSE) * len(codes.CODES) or ndim > MAX_NDIM:
        raise FrameError(start, f"{name!r} has kind {kind}, dtype {dtype}, {ndim} dimensions")
    tensors = 1 if kind == DENSE else 4 if coded else 2
    reader.allowance.keep(TENSOR_BYTES * tensors + DIMENSION_BYTES * ndim, start, f"what {name!r} is made of")
    shape = reader.unpack(f"<{ndim}Q", f"shape of {name!r}")
    numel = math.prod(shape)
    if numel > MAX_NUMEL or max(shape, default=0) > MAX_NUMEL:
        raise FrameError(start + 3, f"{name!r} has {numel} elements; at most {MAX_NUMEL} are read")
    if kind == DENSE:
        return Entry(shape, reader.values(numel, DTYPES[dtype], name), allowance=reader.allowance)
    at = reader.at
    k = reader.number("Q", f"k of {name!r}")
    if k > numel:
        raise FrameError(at, f"{name!r} has {k} values for {numel} elements")
    if coded:
        code = list(codes.CODES)[dtype - len(DTYPES)]
        coded, values = _coded(reader, code, k, name)
    else:
        coded, values = None, reader.values(k, DTYPES[dtype], name)
    b, nbytes = reader.unpack("<BQ", f"b of {name!r}") if kind == RICE else (0, sum(elias_fano.sizes(k, numel)))
    if kind == RICE and b != rice.parameter(k, numel):
        raise FrameError(
            reader.at, f"{name!r} has b = {b} where {k} of {numel} indices take {rice.parameter(k, numel)}"
        )
    at = reader.at
    packed = reader.take(nbytes, f"indices of {name!r}")
    copied = 0 if kind == RICE else nbytes
    reader.allowance.keep(8 * k + copied, at, f"indices of {name!r}")
    try:
        if kind == RICE:
            indices = rice.decode_checked(packed, k, numel, b, reader.allowance.step)
        else:
            indices = elias_fano.decode_checked(tensor(packed, torch.uint8), k, numel, reader.allowance.step)
    except ThinwireError as error:
        raise FrameError(at, f"indices of {name!r}: {error}") from error
    reader.allowance.kept -= copied
    return Entry(shape, values, indices, coded, reader.allowance)


def _coded(reader: Reader, code: str, k: int, name: str) -> tuple[tuple[str, Tensor, Tensor], Tensor]:
    """Read coded values; returns them as written (code, scales, packed bytes) and decoded."""
    at = reader.at
    num_scales, nbytes = codes.sizes(code, k)
    scales = reader.values(num_scales, torch.float32, name)
    packed = reader.values(nbytes, torch.uint8, name)
    reader.allowance.keep(4 * k, at, f"values of {name!r}")
    values, step, bits = torch.empty(k, dtype=torch.float32, device="cpu"), reader.allowance.step, codes.CODES[code]
    for i in range(0, k, step):  # a multiple of 8, so that each piece begins with a byte
        piece = packed[i * bits // 8 : (i + step) * bits // 8]
        values[i : i + step] = codes.decode(scales, piece, code, min(step, k - i))
    spare = k * bits % 8 and bool(packed[-1] >> k * bits % 8)
    if bool((scales < 0).any()) or not finite(values, step) or spare:
        raise FrameError(at, f"{name!r} has scales {scales.tolist()}, or bits after the last value")
    return (code, scales, packed), values


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
