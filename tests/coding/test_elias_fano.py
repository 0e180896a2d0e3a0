import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.coding import elias_fano
from thinwire.coding.bitpack import pack_bits, pack_words, unpack_bits, unpack_words


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_round_trip_and_exact_size(data):
    n = data.draw(st.integers(1, 5000))
    indices = torch.tensor(sorted(data.draw(st.lists(st.integers(0, n - 1), max_size=300))), dtype=torch.int64)
    packed = elias_fano.encode(indices, n)
    k = indices.numel()
    assert packed.numel() == sum(elias_fano.sizes(k, n))
    assert torch.equal(elias_fano.decode(packed, k, n), indices)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 2**33), (7, 7), (63, 64), (2, 1_000_003)])
def test_first_and_last_index(k, n):
    indices = torch.cat([torch.zeros(k // 2, dtype=torch.int64), torch.full((k - k // 2,), n - 1)])
    packed = elias_fano.encode(indices, n)
    assert torch.equal(elias_fano.decode(packed, k, n), indices)


def test_golden_bytes():
    # k = 3 below n = 20: l = 2; low bits 01 11 10 -> 0b10_11_01; high 0, 1, 4 -> bits 0, 2, 6
    packed = elias_fano.encode(torch.tensor([1, 7, 18]), 20)
    assert packed.tolist() == [0b101101, 0b1000101]


def test_bits_per_index_at_a_thousandth():
    n = 2**24
    k = -(-n // 1000)
    bits = 8 * sum(elias_fano.sizes(k, n)) / k
    assert 11.40 < bits < 12.0  # the entropy is 11.41


def test_bits_against_numpy():
    bits = torch.randint(0, 2, (1003,), dtype=torch.uint8)
    packed = pack_bits(bits)
    assert np.array_equal(packed.numpy(), np.packbits(bits.numpy(), bitorder="little"))
    assert torch.equal(unpack_bits(packed)[:1003], bits)


@pytest.mark.parametrize("width", [0, 1, 5, 8, 13, 33])
def test_words(width):
    words = torch.randint(0, 2**width, (101,))
    packed = pack_words(words, width)
    assert packed.numel() == -(-101 * width // 8)
    assert torch.equal(unpack_words(packed, 101, width), words)
