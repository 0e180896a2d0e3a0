import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.coding import rice
from thinwire.core.errors import ThinwireError


def by_hand(indices, b):
    """The code as it is written down: one gap after the other."""
    bits, before = "", -1
    for index in indices:
        gap = index - before - 1
        bits += "1" * (gap >> b) + "0" + (format(gap & ((1 << b) - 1), f"0{b}b") if b else "")
        before = index
    return bits


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_round_trip_exact_length_and_bits(data):
    n = data.draw(st.integers(1, 3000))
    indices = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=300)))
    k, where = len(indices), torch.tensor(indices, dtype=torch.int64)
    b = data.draw(st.sampled_from([rice.parameter(k, n), 0, 1, 5, 13]))
    packed = rice.encode(where, b)
    bits = by_hand(indices, b)
    assert "".join(f"{byte:08b}" for byte in packed) == bits + "0" * (-len(bits) % 8)
    assert torch.equal(rice.decode_checked(packed, k, n, b), where)


def test_golden_bytes():
    # gaps 1, 5, 10 with b = 2: 0 01, 10 01, 110 10; so 0011 0011 1010
    assert rice.encode(torch.tensor([1, 7, 18]), 2).hex() == "33a0"
    assert rice.encode(torch.tensor([], dtype=torch.int64), 3) == b""


@pytest.mark.parametrize(("k", "n"), [(0, 0), (0, 9), (1, 1), (1, 2**40), (64, 64), (2, 1_000_003), (300_000, 900_000)])
def test_first_and_last_index(k, n):
    indices = torch.randperm(n)[:k].sort().values if k > 2 else torch.tensor([0, n - 1][2 - k :], dtype=torch.int64)
    b = rice.parameter(k, n)
    assert torch.equal(rice.decode_checked(rice.encode(indices, b), k, n, b), indices)


def test_a_gap_longer_than_a_window(monkeypatch):
    indices = torch.tensor([3, 40, 9_000, 9_001, 9_002, 70_000])
    expected = rice.encode(indices, 1)
    for window in (8, 64, 1000):
        monkeypatch.setattr(rice, "WINDOW", window)
        assert torch.equal(rice.decode_checked(expected, 6, 70_001, 1), indices)


@pytest.mark.parametrize(
    ("density", "b", "bits"),
    [(0.25, 1, 3.286), (0.05, 4, 5.786), (0.01, 6, 8.108), (0.001, 9, 11.495), (1e-4, 13, 14.788)],
)
def test_the_table_of_parameters_and_sizes(density, b, bits):
    n = 2**24
    k = round(n * density)
    assert rice.parameter(k, n) == b
    indices = torch.unique(torch.randint(n, (int(k * 1.2),)))
    indices = indices[torch.randperm(len(indices))[:k]].sort().values
    assert 8 * len(rice.encode(indices, b)) / k == pytest.approx(bits, rel=0.01)


def test_hostile_bytes_are_refused_or_are_what_encode_writes():
    rng = random.Random(0)
    good = rice.encode(torch.tensor([1, 7, 18, 19, 900]), 3)
    for _ in range(3000):
        data = bytearray(good if rng.random() < 0.7 else rng.randbytes(rng.randrange(20)))
        for _ in range(rng.randrange(3) if data else 0):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        k, n, b = rng.choice([0, 1, 5, 6, 40]), rng.choice([0, 1, 19, 1000, 2**61]), rng.choice([0, 1, 3, 47, 62])
        try:
            indices = rice.decode_checked(bytes(data), k, n, b)
        except ThinwireError:
            continue
        assert rice.encode(indices, b) == data
        assert (len(indices), bool((indices < n).all())) == (k, True)


@pytest.mark.parametrize(
    ("data", "k", "n", "b", "message"),
    [
        (b"\x33\xa0", 2**60, 20, 2, "are not those of"),
        (b"\x33\xa0", 3, 20, 63, "are not those of"),
        (b"\x33\xa0", 3, 18, 2, "beyond 18 elements"),
        (b"\x33\xa1", 3, 20, 2, "not zero"),
        (b"\x33\xa0\x00", 3, 20, 2, "3 bytes are not those of 3"),
        (b"\xff\xff", 3, 20, 2, "end after 0 of 3"),
        (b"\x33\xaf", 4, 20, 2, "end after 3 of 4"),
        (b"\x70" * 99, 12, 2**61, 62, "are not those of"),
    ],
)
def test_hostile_content(data, k, n, b, message):
    with pytest.raises(ThinwireError, match=message):
        rice.decode_checked(data, k, n, b)


@pytest.mark.parametrize("indices", [[3, 3], [4, 2], [-1, 2]])
def test_what_has_no_gaps(indices):
    with pytest.raises(ThinwireError, match="strictly ascend"):
        rice.encode(torch.tensor(indices), 2)
