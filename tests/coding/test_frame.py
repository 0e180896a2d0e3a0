"""Golden bytes, and hostile ones."""

import contextlib
import random
import struct
import sys
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.coding import zstd
from thinwire.coding.frame import HEAD, Entry, Frame, FrameError, decode, encode
from thinwire.core.errors import ThinwireError


def example() -> Frame:
    return Frame(
        {
            "w": Entry((4, 5), torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1, 7, 18])),
            "b": Entry((2,), torch.tensor([3.0, 4.0], dtype=torch.float16)),
        },
        {"step": 7, "client": "é"},
    )


def sealed(body: bytes, stage: int = 0) -> bytes:
    """A head that fits: what a hostile sender would do."""
    return HEAD.pack(b"THWR", 1, stage, HEAD.size + len(body), zlib.crc32(body)) + body


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


def test_golden_bytes_of_rice_indices_and_four_bits():
    values, indices = torch.tensor([1.0, -2.0, 1.5**7]), torch.tensor([1, 7, 18])
    frame = Frame({"w": Entry.quantised((4, 5), values, indices, "int4")})
    data = encode(frame, indices="rice")
    assert data.hex() == (
        "54485752010000004d0000000000000026be8595"  # head: 77 bytes
        "000001000000"  # no notes, one entry
        "01007702090204000000000000000500000000000000"  # w: Rice, int4, [4, 5]
        "03000000000000000000803f0000c03fa007"  # 3 values, from 1 on by a ratio of 1.5: levels 0, -2, 7
        "02020000000000000033a0"  # b = 2, and 2 bytes of indices
    )
    again = decode(data)
    assert again.entries["w"].values.tolist() == [1.0, -2.25, 1.5**7]
    assert same(again, frame)
    assert encode(again, indices="rice") == data


def test_golden_content_of_a_compressed_frame():
    data = encode(example(), compress="zstd")
    assert data[:8].hex() == "5448575201000100"
    assert zstd.decompress(data[HEAD.size + 8 :], 96) == encode(example())[HEAD.size :]
    assert same(decode(data), example())
    assert len(encode(Frame({}, {"log": "again and " * 999}), compress="zstd")) < 100


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
    entry = Entry(shape, values, where)
    if where is not None and data.draw(st.booleans()):
        entry = Entry.quantised(shape, values, where, data.draw(st.sampled_from(["sign", "int2", "int4", "int8"])))
    frame = Frame(
        {data.draw(st.text(max_size=20)): entry},
        {data.draw(st.text(max_size=9)): data.draw(st.integers(-(2**63), 2**63 - 1))},
    )
    options = {
        "indices": data.draw(st.sampled_from(["elias_fano", "rice"])),
        "compress": data.draw(st.sampled_from([None, "zstd"])),
    }
    again = decode(encode(frame, **options))
    assert same(again, frame)
    assert encode(again, **options) == encode(frame, **options)


@pytest.mark.parametrize(("indices", "compress"), [("elias_fano", None), ("rice", None), ("rice", "zstd")])
def test_every_truncation_and_every_flipped_bit_is_noticed(indices, compress):
    good = encode(example(), indices=indices, compress=compress)
    for length in range(len(good)):
        with pytest.raises(FrameError):
            decode(good[:length])
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            with pytest.raises(FrameError):
                decode(bytes(bad))
    with pytest.raises(FrameError, match=f"{len(good) + 1} bytes where {len(good)} were declared"):
        decode(good + b"\0")


def entry(kind=1, dtype=0, shape=(20,), rest=b"", name=b"w"):
    return (
        struct.pack("<HI", 0, 1)
        + struct.pack("<H", len(name)) + name
        + struct.pack("<BBB", kind, dtype, len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        + rest
    )  # fmt: skip


def rice(packed, b=2, nbytes=2):
    return entry(kind=2, rest=struct.pack("<Q3f", 3, 1, 2, 3) + struct.pack("<BQ", b, nbytes) + packed)


def coded(dtype, scales, packed):
    return entry(dtype=dtype, rest=struct.pack(f"<Q{len(scales)}f", 3, *scales) + packed + b"\x2d\x45")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (entry(shape=(2**63,)), "has 9223372036854775808 elements; at most"),
        (entry(shape=(2**62, 0)), "at most"),
        (entry(kind=0, shape=(2**40,)), "takes 4398046511104 bytes, 0 are left"),
        (entry(rest=struct.pack("<Q", 21)), "has 21 values for 20 elements"),
        (entry(rest=struct.pack("<Q", 2**63)), "values for 20 elements"),
        (entry(kind=3), "has kind 3"),
        (entry(kind=0, dtype=7), "has kind 0, dtype 7"),
        (entry(dtype=11), "dtype 11"),
        (rice(b"\x33\xa0", b=63), "has b = 63 where 3 of 20 indices take 2"),
        (rice(b"\xff" * 999, nbytes=999), "999 bytes are not those of 3 indices"),  # would take 40 bytes a bit to read
        (rice(b"\x33\xa0", nbytes=3), "takes 3 bytes, 2 are left"),
        (rice(b"\x33\xa0", nbytes=2**63), "takes 9223372036854775808 bytes"),
        (rice(b"\x33\xa1"), "fills the last byte is not zero"),
        (rice(b"\x33\xe0"), "reach beyond 20 elements"),
        (rice(b"\xff\xff"), "end after 0 of 3"),
        (coded(9, [1.0, float("inf")], b"\x90\x02"), "not finite"),
        (coded(9, [1.0, -1.0], b"\x90\x02"), "scales"),
        (coded(10, [0.0, 3e38], b"\x97\x02\x7f"), "scales"),
        (coded(9, [1.0, 7.0], b"\x90\x12"), "bits after the last value"),
        (coded(7, [1.0], b"\x0a"), "bits after the last value"),
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
    [(0, b"JUNK", "magic is b'JUNK'"), (4, b"\x02\x00", "version 2"), (6, b"\x02\x00", "stage is 2")],
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


@pytest.mark.parametrize(("indices", "compress"), [("elias_fano", None), ("rice", None), ("rice", "zstd")])
def test_mutations_with_a_right_checksum(indices, compress):
    frame = Frame({**example().entries, "q": Entry.quantised((9,), torch.randn(3), torch.tensor([1, 2, 8]), "int4")})
    rng, good = random.Random(0), encode(frame, indices=indices, compress=compress)
    stage, good = good[6], good[HEAD.size :]
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(bad))
            bad[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        with contextlib.suppress(FrameError):
            decode(sealed(bytes(bad[: rng.randint(0, len(bad))] if rng.random() < 0.2 else bad), stage))


def test_hostile_compression():
    content = encode(example())[HEAD.size :]

    def refused(size, packed, message, **options):
        with pytest.raises(FrameError, match=message):
            decode(sealed(struct.pack("<Q", size) + packed, 1), **options)

    good = zstd.compress(content)
    refused(len(content), good, "at most 95 are read, see max_content=", max_content=95)
    refused(2**63, good, "at most 268435456 are read")
    refused(len(content) + 1, good, "97 bytes of content were declared, and 96 in the zstd frame")
    refused(len(content), good + b"\0", "bad frame at byte 28")
    refused(len(content), good[:-1], "bad frame at byte 28")
    refused(len(content), b"", "bad frame at byte 28")
    refused(len(content), content, "bad frame at byte 28")
    refused(2**27, zstd.compress(bytes(2**27))[:40], "bad frame at byte 28")  # declares 128 MiB, and has not
    bomb = zstd.compress(bytes(2**20))
    assert len(bomb) < 100
    refused(2**20, bomb, "bytes after the last entry")


def test_without_the_package(monkeypatch):
    data = encode(example(), compress="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for call in (lambda: decode(data), lambda: encode(example(), compress="zstd")):
        with pytest.raises(ThinwireError, match=r"pip install 'thinwire\[zstd\]'"):
            call()
    assert same(decode(encode(example())), example())


def test_options_and_codes_that_are_not_there():
    for options in ({"indices": "huffman"}, {"compress": "gzip"}):
        with pytest.raises(ThinwireError, match=r"huffman|gzip"):
            encode(example(), **options)
    with pytest.raises(ThinwireError, match="'int3'"):
        Entry.quantised((4,), torch.ones(1), torch.tensor([1]), "int3")
    with pytest.raises(ThinwireError, match="strictly ascend"):
        encode(Frame({"w": Entry((4,), torch.ones(2), torch.tensor([1, 1]))}), indices="rice")


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
        Entry((2,), torch.ones(2), None, ("sign", torch.ones(1), torch.zeros(1, dtype=torch.uint8))),
        Entry((4,), torch.ones(2), torch.tensor([1, 2]), ("sign", torch.ones(1), torch.zeros(2, dtype=torch.uint8))),
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
    with pytest.raises(ThinwireError, match="at most 536870273 are made dense"):
        huge.entries["w"].to_dense()
    transposed = torch.arange(6.0).view(3, 2).t()
    assert torch.equal(decode(encode(Frame({"w": Entry((2, 3), transposed)}))).entries["w"].to_dense(), transposed)
