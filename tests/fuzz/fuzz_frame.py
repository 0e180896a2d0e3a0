"""A coverage-guided fuzzing target for ``thinwire.coding.frame`` (libFuzzer, through atheris).

    python tests/fuzz/fuzz_frame.py -runs=1000000 -max_len=400 -rss_limit_mb=1500

Every input is decoded as it is, and with heads that fit, so that the fuzzer gets past the checksum: as plain content,
as the zstd frame of a compressed one, and as the content of one. Anything but a ``FrameError`` is a crash. So is a
frame that does not encode to the same bytes, or, where there are several ways to write it, to the same values.
"""

import struct
import sys
import tempfile
import zlib
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["thinwire.coding"]):
    from thinwire.coding import frame, zstd

MAX_CONTENT = 2**16
decode_rice = frame.rice.decode_checked
rice_entries = 0


def counted(*args):
    global rice_entries
    rice_entries += 1
    return decode_rice(*args)


frame.rice.decode_checked = counted


def sealed(content: bytes, stage: int) -> bytes:
    return frame.HEAD.pack(b"THWR", 1, stage, frame.HEAD.size + len(content), zlib.crc32(content)) + content


def target(data: bytes) -> None:
    check(data, False)
    plain = check(sealed(data, 0), True)
    check(sealed(data, 1), False)
    inside = check(sealed(struct.pack("<Q", len(data)) + zstd.compress(data), 1), False)
    if plain != inside:
        raise AssertionError("compression changed a frame")


def check(candidate: bytes, plain: bool) -> bytes | None:
    """What ``encode`` writes for this frame, None where it is none."""
    before = rice_entries
    try:
        decoded = frame.decode(candidate, max_content=MAX_CONTENT)
    except frame.FrameError:
        return None
    written = frame.encode(decoded)
    if written != candidate:
        if frame.encode(frame.decode(written)) != written:
            raise AssertionError("what encode wrote is read differently")
        if plain and rice_entries == before:
            raise AssertionError("a frame that was accepted is not what encode would write")
    return written


def seeds(folder: Path) -> None:
    """Frames of every kind, whole and without their heads."""
    where, shape = torch.tensor([1, 7, 18]), (4, 5)
    sparse = [frame.Entry(shape, torch.ones(3).to(dtype), where) for dtype in frame.DTYPES]
    sparse += [frame.Entry.quantised(shape, torch.tensor([1.0, -2.0, 8.0]), where, code) for code in frame.codes.CODES]
    for i, entry in enumerate(sparse):
        entries = {"w": entry, "b": frame.Entry((3,), entry.values), "e": frame.Entry((0,), entry.values[:0])}
        content = frame.Frame(entries, {"step": 7, "client": "one"})
        for indices in ("elias_fano", "rice"):
            data = frame.encode(content, indices=indices)
            (folder / f"{i}.{indices}.frame").write_bytes(data)
            (folder / f"{i}.{indices}.body").write_bytes(data[frame.HEAD.size :])
        data = frame.encode(content, compress="zstd")
        (folder / f"{i}.zstd.frame").write_bytes(data)
        (folder / f"{i}.zstd.body").write_bytes(data[frame.HEAD.size :])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as corpus:
        seeds(Path(corpus))
        atheris.Setup([*sys.argv, corpus], target)
        atheris.Fuzz()
