"""Golden bytes, and hostile ones."""

import contextlib
import random
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.core import ThinwireError
from thinwire.wire.frame import HEAD, Entry, Frame, FrameError, decode, encode


def example() -> Frame:
    return Frame(
        {
            "w": Entry((4, 5), torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1, 7, 18])),
            "b": Entry((2,), torch.tensor([3.0, 4.0], dtype=torch.float16)),
        },
        {"step": 7, "client": "é"},
    )


def sealed(body: bytes) -> bytes:
    """A head that fits: what a hostile sender would do."""
    return HEAD.pack(b"THWR", 1, 0, HEAD.size + len(body), zlib.crc32(body)) + body


def same(a: Frame, b: Frame) -> bool:
    return a.notes == b.notes and all(
        a.entries[k].shape == b.entries[k].shape and torch.equal(a.entries[k].to_dense(), b.entries[k].to_dense())
        for k in a.entries | b.entries
    )


def test_golden_bytes():
    assert encode(example()).hex() == (
        "54485752010000007400000000000000cb569789"  # head: 116 bytes
        "0200047374657000070000000000000006636c69656e740102000000c3a9"  # notes
        "02000000"
        "01007701000204000000000000000500000000000000"  # w: sparse, float32, [4, 5]
        "03000000000000000000803f000000c00000003f2d45"  # 3 values, and indices 1, 7, 18
        "010062000201020000000000000000420044"  # b: dense, float16, [2]
    )  # fmt: skip


def test_round_trip():
    assert same(decode(encode(example())), example())
    assert decode(encode(example())).entries["w"].to_dense()[0, 1] == 1.0


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_round_trip_of_anything(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    numel = int(torch.Size(shape).numel())
    indices = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, max(0, numel - 1)), max_size=numel))), dtype=torch.int64
    )
    dense = torch.randn(numel).to(dtype), None
    values, where = data.draw(st.sampled_from([dense, (torch.randn(indices.numel()).to(dtype), indices)]))
    frame = Frame(
        {data.draw(st.text(max_size=20)): Entry(shape, values, where)},
        {data.draw(st.text(max_size=9)): data.draw(st.integers(-(2**63), 2**63 - 1))},
    )
    assert same(decode(encode(frame)), frame)


def test_every_truncation_and_every_flipped_bit_is_noticed():
    good = encode(example())
    for length in range(len(good)):
        with pytest.raises(FrameError):
            decode(good[:length])
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            with pytest.raises(FrameError):
                decode(bytes(bad))
    with pytest.raises(FrameError, match="117 bytes where 116 were declared"):
        decode(good + b"\0")


def entry(kind=1, dtype=0, shape=(20,), rest=b"", name=b"w"):
    return (
        struct.pack("<HI", 0, 1)
        + struct.pack("<H", len(name)) + name
        + struct.pack("<BBB", kind, dtype, len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        + rest
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (entry(shape=(2**63,)), "has 9223372036854775808 elements; at most"),
        (entry(shape=(2**62, 0)), "at most"),
        (entry(kind=0, shape=(2**40,)), "takes 4398046511104 bytes, 0 are left"),
        (entry(rest=struct.pack("<Q", 21)), "has 21 values for 20 elements"),
        (entry(rest=struct.pack("<Q", 2**63)), "values for 20 elements"),
        (entry(kind=2), "has kind 2"),
        (entry(dtype=99), "dtype 99"),
        (entry(shape=(1,) * 17), "17 dimensions"),
        (entry(rest=struct.pack("<Q3f", 3, 1, float("nan"), 2) + b"\x2d\x45"), "values that are not finite"),
        (entry(rest=struct.pack("<Q3f", 3, 1, 2, 3) + b"\x2d\x05"), "2 upper parts for 3 indices"),
        (entry(rest=struct.pack("<Q3f", 3, 1, 2, 3) + b"\x2d\xc8"), "reach .* of 20 elements|do not ascend"),
        (entry(rest=struct.pack("<Q3f", 3, 1, 2, 3) + b"\xed\x45"), "fill the last bytes"),
        (entry(rest=struct.pack("<Q3f", 3, 1, 2, 3) + b"\x2d\x45\x00"), "1 bytes after the last entry"),
        (entry(name=b"\xff"), "not UTF-8"),
        (struct.pack("<H", 1) + b"\x01a\x07", "of kind 7"),
        (struct.pack("<H", 2) + (b"\x01a\x00" + bytes(8)) * 2, "there twice"),
        (struct.pack("<HI", 0, 2**32 - 1), "takes 2 bytes, 0 are left"),
        (struct.pack("<H", 1) + b"\x01a\x01" + struct.pack("<I", 2**32 - 1), "takes 4294967295 bytes"),
    ],
)
def test_hostile_content_with_a_right_checksum(body, message):
    with pytest.raises(FrameError, match=f"bad frame at byte \\d+: .*({message})"):
        decode(sealed(body))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [(0, b"JUNK", "magic is b'JUNK'"), (4, b"\x02\x00", "version 2"), (6, b"\x01\x00", "reserved field is 1")],
)
def test_hostile_heads(at, value, message):
    bad = bytearray(encode(example()))
    bad[at : at + len(value)] = value
    with pytest.raises(FrameError, match=message):
        decode(bytes(bad))


@given(st.binary(max_size=400))
@settings(max_examples=500, deadline=None)
def test_nothing_but_a_frame_error_escapes(data):
    for candidate in (data, sealed(data)):
        try:
            decode(candidate)
        except FrameError as error:
            at = error.at
        else:
            at = 0
        assert 0 <= at <= len(candidate)


def test_mutations_with_a_right_checksum():
    rng, good = random.Random(0), encode(example())[HEAD.size :]
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(bad))
            bad[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        with contextlib.suppress(FrameError):
            decode(sealed(bytes(bad[: rng.randint(0, len(bad))] if rng.random() < 0.2 else bad)))


def test_what_can_not_be_written():
    nan = Frame({"w": Entry((1,), torch.tensor([float("nan")]))})
    with pytest.raises(ThinwireError, match="finite values"):
        encode(nan)
    with pytest.raises(ThinwireError, match="too many for a frame"):
        encode(Frame({}, {"k" * 256: 1}))


@pytest.mark.parametrize(
    "entry",
    [
        Entry((3,), torch.ones(2)),
        Entry((4,), torch.ones(2), torch.tensor([3, 1])),
        Entry((4,), torch.ones(2), torch.tensor([1, 4])),
        Entry((4,), torch.ones(2), torch.tensor([1])),
    ],
)
def test_entries_that_do_not_fit(entry):
    with pytest.raises(ThinwireError, match=r"do not fit|do not ascend"):
        encode(Frame({"w": entry}))


def test_other_things_that_can_not_be_written_or_read():
    for frame in (Frame({}, {"n": 2**63}), Frame({}, {"\ud800": 1})):
        with pytest.raises(ThinwireError):
            encode(frame)
    with pytest.raises(FrameError, match="a frame is bytes, not NoneType"):
        decode(None)
    huge = decode(sealed(entry(shape=(2**47,), rest=struct.pack("<Q", 0))))
    with pytest.raises(ThinwireError, match="at most 2147483648 are made dense"):
        huge.entries["w"].to_dense()
    transposed = torch.arange(6.0).view(3, 2).t()
    assert torch.equal(decode(encode(Frame({"w": Entry((2, 3), transposed)}))).entries["w"].to_dense(), transposed)
