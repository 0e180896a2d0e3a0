"""Small frames that claim a lot: whatever they hold, decoding takes at most 8 times ``max_content``."""

import json
import math
import os
import struct
import subprocess
import sys
import zlib

import pytest
import torch

from thinwire import ThinwireError
from thinwire.coding import elias_fano, rice, zstd
from thinwire.coding.frame import DTYPES, HEAD, Entry, Frame, decode, encode
from thinwire.coding.values import CODES, sizes

MAX = 2**21


def sealed(content):
    packed = struct.pack("<Q", len(content)) + zstd.compress(bytes(content))
    return HEAD.pack(b"THWR", 1, 1, HEAD.size + len(packed), zlib.crc32(packed)) + packed


def one(kind, dtype, numel, rest):
    return struct.pack("<HIH1sBBBQ", 0, 1, 1, b"w", kind, dtype, 1, numel) + rest


def many(kind, dtype, shape, room, k=0):
    """Entries of few values, which hold more of Python and of torch than of the frame."""
    code = list(CODES)[dtype - len(DTYPES)] if dtype >= len(DTYPES) else ""
    scales, packed = sizes(code, k) if code else (0, k)
    rest = struct.pack(f"<BBB{len(shape)}Q", kind, dtype, len(shape), *shape)
    if kind == 0:
        rest += bytes(math.prod(shape))
    else:
        rest += struct.pack(f"<Q{scales}f", k, *[1.0] * scales) + bytes(packed)
        indices = elias_fano.encode(torch.full((k,), math.prod(shape) - 1), math.prod(shape)).numpy().tobytes()
        rest += struct.pack("<BQ", rice.parameter(k, math.prod(shape)), 0) if kind == 2 else indices
    entries = [struct.pack("<H5s", 5, f"{i:05x}".encode()) + rest for i in range(room // (7 + len(rest)))]
    return struct.pack("<HI", 0, len(entries)) + b"".join(entries)


def hostile():
    """By name; each has up to ``MAX`` bytes of content."""
    room = MAX - 64
    for i, dtype in enumerate(DTYPES):
        count = room // dtype.itemsize
        yield f"dense {dtype}", one(0, i, count, bytes(count * dtype.itemsize))
    for i, (code, bits) in enumerate(CODES.items()):
        for name, byte in (("valid", 0x55), ("too many", 0xFF), ("too few", 0)):
            k = room * 8 // (bits + 2) // 8 * 8  # all elements are there: two bits an index
            scales, packed = sizes(code, k)
            body = struct.pack("<Q", k) + struct.pack("<f", 1.0) * scales + bytes(packed)
            yield f"{code} {name}", one(1, len(DTYPES) + i, k, body + bytes([byte]) * (2 * k // 8))
    for byte, b in ((0xFF, 0), (0, 0), (0x55, 0)):
        k = room * 8 // 11 // 8 * 8
        b = rice.parameter(k, k)
        body = struct.pack("<Q", k) + struct.pack("<f", 1.0) + bytes(k // 8) + struct.pack("<BQ", b, k // 4)
        yield f"rice {byte}", one(2, len(DTYPES), k, body + bytes([byte]) * (k // 4))
    b = rice.parameter(1, 2**40)
    yield (
        "one long gap",
        one(2, 6, 2**40, struct.pack("<QB", 1, 0) + struct.pack("<BQ", b, room - 60) + b"\xff" * (room - 60)),
    )
    yield "far and few", one(1, 6, 2**48, struct.pack("<Q", room // 9) + bytes(room))
    names = [struct.pack("<H3sBBB", 3, f"{i:03x}"[-3:].encode(), 0, 6, 0) + b"\0" for i in range(4096)]
    yield "entries", struct.pack("<HI", 0, 4096) + b"".join(names)
    more = [struct.pack("<H5sBBBQ", 5, f"{i:05x}".encode(), 0, 6, 1, 0) for i in range(room // 18)]
    yield "empty entries", struct.pack("<HI", 0, len(more)) + b"".join(more)
    for kind, dtype, name in ((0, 6, "dense"), (1, 6, "sparse"), (2, 6, "rice"), (1, 7, "sign"), (2, 8, "int2")):
        for ndim in (0, 1, 16):
            yield (
                f"many {name} of {ndim} dimensions",
                many(kind, dtype, (2**40,) * (ndim - 1) + (0,) * bool(ndim), room),
            )
    for dtype in (6, 7, 8):
        yield f"many of one value, {dtype}", many(1, dtype, (1,) * 14 + (300_000,), room, 1)
    notes = [struct.pack("<B4sBq", 4, f"{i:04x}".encode(), 0, 2**40 + i) for i in range(65535)]
    yield "notes", struct.pack("<H", 65535) + b"".join(notes) + bytes(4)
    text = "😀".encode() + b"x" * (room - 64)
    yield "text", struct.pack("<H", 1) + b"\x01a\x01" + struct.pack("<I", len(text)) + text + bytes(4)


def measure():
    """In a process of its own: the peak of memory beyond what there was before, and how each frame ended."""

    def status(field):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

    frames = {name: sealed(content) for name, content in hostile()}
    small = encode(Frame({"w": Entry.quantised((9,), torch.ones(3), torch.tensor([1, 2, 8]), "int4")}), indices="rice")
    decode(small, max_content=MAX), decode(sealed(struct.pack("<HI", 0, 0)), max_content=MAX)
    found = {}
    for name, data in frames.items():
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before, held = status("VmRSS"), None
        try:
            held = decode(data, max_content=MAX)
            dense = [entry.to_dense() for entry in held.entries.values() if entry.indices is not None]
            how = f"{len(held.entries)} entries, {len(dense)} dense"
        except ThinwireError as error:
            how = str(error)
        found[name] = [len(data), status("VmHWM") - before, how]
    print(json.dumps(found))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_frame_takes_more_than_it_may():
    env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    code = "from tests.coding.test_frame_memory import measure; measure()"
    found = json.loads(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert found["dense torch.float32"][2] == "1 entries, 0 dense"
    assert "8 times max_content=" in found["int8 valid"][2]
    assert any(taken > MAX for _, taken, _ in found.values())
    for name, (length, taken, how) in found.items():
        print(f"{name}: {length} bytes, {taken / MAX:.1f} x, {how[:120]}")
    over = {name: taken / MAX for name, (_, taken, _) in found.items() if taken > 8 * MAX + 2**18}
    assert not over


def test_what_is_decoded_in_pieces_is_the_same(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for n, k in ((10**6, 1000), (3000, 3000), (70_000, 20_000), (2**40, 257), (5, 1)):
        where = torch.randint(n, (k,), generator=generator).unique() if n != k else torch.arange(n)
        for code in CODES:
            entry = Entry.quantised((n,), torch.randn(len(where), generator=generator), where, code)
            for indices in ("elias_fano", "rice"):
                data = encode(Frame({"w": entry}), indices=indices)
                tight, wide = decode(data, max_content=max(len(data), 2**17)), decode(data)
                for again in (tight.entries["w"], wide.entries["w"]):
                    assert torch.equal(again.indices, entry.indices)
                    assert torch.equal(again.values, entry.values)


def test_what_may_become_dense_follows_from_max_content():
    data = encode(Frame({"w": Entry((2**22,), torch.ones(1), torch.tensor([7]))}))
    assert decode(data).entries["w"].to_dense().sum() == 1
    entry = decode(data, max_content=2**20).entries["w"]
    with pytest.raises(ThinwireError, match=r"4194304 elements was declared; at most 20\d\d\d\d\d are made dense"):
        entry.to_dense()
    assert entry.to_dense(2**22)[7] == 1
