"""Hashes of tensors on the device are those of their copies on the CPU."""

import pytest
import torch

from tests.gpu.training import DEVICE
from thinwire.session import fingerprint as module
from thinwire.session.checksums import checksum
from thinwire.session.fingerprint import fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
SIZES = [0, 1, 7, 8, 63, 1000, 8191, 8192, 100_003, 3_000_001]


def bits(n, dtype):
    """Any bits at all, NaN among them."""
    raw = torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksums_are_those_of_the_copy(dtype):
    for n in SIZES:
        for before in (0, 1, 3):
            x = bits(n + before, dtype)
            assert checksum(x.to(DEVICE)[before:]) == checksum(x[before:])
    x = bits(1200, dtype).view(30, 40)
    assert checksum(x.to(DEVICE).t()) == checksum(x.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fingerprints_are_those_of_the_copy(monkeypatch, dtype):
    """A device takes larger chunks than a CPU; by chunks of that size the CPU finds the same."""
    whole = [bits(n + 3, dtype) for n in SIZES]
    mine = [[fingerprint(x.to(DEVICE)[before:]) for before in (0, 1, 3)] for x in whole]
    if DEVICE != "cpu":
        monkeypatch.setattr(module, "CHUNK", module.CHUNK_CUDA)
    assert mine == [[fingerprint(x[before:]) for before in (0, 1, 3)] for x in whole]


def test_one_bit_shows():
    x = bits(3_000_000, torch.float32).to(DEVICE)
    before = fingerprint(x), checksum(x)
    for place in (0, 1_234_567, 2_999_999):
        x.view(torch.int32)[place] ^= 1 << (place % 31)
        assert fingerprint(x) != before[0]
        assert checksum(x) != before[1]
        x.view(torch.int32)[place] ^= 1 << (place % 31)
    assert (fingerprint(x), checksum(x)) == before
