"""A coverage-guided fuzzing target for ``thinwire.wire.frame`` (libFuzzer, through atheris).

    python tests/fuzz/fuzz_frame.py -runs=1000000 -max_len=400 -rss_limit_mb=1500

Every input is decoded as it is, and once more with a head that fits, so that the fuzzer gets past the checksum.
Anything but a ``FrameError`` is a crash; so is a frame that does not encode to the same bytes.
"""

import sys
import tempfile
import zlib
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["thinwire.wire"]):
    from thinwire.wire import frame


def target(data: bytes) -> None:
    for candidate in (data, frame.HEAD.pack(b"THWR", 1, 0, frame.HEAD.size + len(data), zlib.crc32(data)) + data):
        try:
            decoded = frame.decode(candidate)
        except frame.FrameError:
            continue
        if frame.encode(decoded) != candidate:
            raise AssertionError("a frame that was accepted is not what encode would write")


def seeds(folder: Path) -> None:
    """Frames of every kind, whole and without their heads."""
    for i, dtype in enumerate(frame.DTYPES):
        values = torch.ones(3).to(dtype)
        entries = {
            "w": frame.Entry((4, 5), values, torch.tensor([1, 7, 18])),
            "b": frame.Entry((3,), values),
            "e": frame.Entry((0,), values[:0]),
        }
        data = frame.encode(frame.Frame(entries, {"step": 7, "client": "one"}))
        (folder / f"{i}.frame").write_bytes(data)
        (folder / f"{i}.body").write_bytes(data[frame.HEAD.size :])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as corpus:
        seeds(Path(corpus))
        atheris.Setup([*sys.argv, corpus], target)
        atheris.Fuzz()
