"""Hashes of bits: whatever differs shows, wherever it stands."""

import pytest
import torch

from thinwire.session.fingerprint import CHUNK, MASK, _on_device, chained, fingerprint

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 2 * CHUNK + 5])
def test_every_change_of_bits_shows(dtype, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    known = {fingerprint(x)}
    assert fingerprint(x.clone()) in known
    for other in (-x, x.flip(0), x.roll(1), torch.zeros_like(x), torch.cat([x, x[:1] * 0])):
        if not torch.equal(other, x):
            assert fingerprint(other) not in known
    for place in {0, n // 2, n - 1}:
        other = x.clone()
        other[place] += 1
        assert fingerprint(other) not in known
        known.add(fingerprint(other))


def test_signs_of_zeros_and_kinds_of_nan():
    zeros = torch.zeros(64)
    known = {fingerprint(zeros)}
    for count in range(1, 64):  # signs that cancel in any sum without mixing
        signs = zeros.clone()
        signs[:count] = -0.0
        known.add(fingerprint(signs))
    assert len(known) == 64
    nans = torch.tensor([0x7FC00000, 0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    assert len({fingerprint(nan) for nan in nans}) == 3


def test_layouts():
    x = torch.randn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert fingerprint(last) == fingerprint(last.clone()) != fingerprint(x)
    assert fingerprint(x[:, :2]) == fingerprint(x[:, :2].clone())
    whole = torch.randn(101)
    assert fingerprint(whole[1:]) == fingerprint(whole[1:].clone())
    assert fingerprint(torch.empty(0)) == fingerprint(torch.empty(0, 3)) == 0
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))


@pytest.mark.parametrize("n", [3, 4, 1001])
def test_a_device_answers_the_same(n):
    x = torch.randn(n + 1)
    for part in (x[1:], x[:n]):
        data = part.view(torch.uint8)
        assert chained([int(_on_device(data)) & MASK], n) == fingerprint(part)
