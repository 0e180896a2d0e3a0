import pytest
import torch

from thinwire.coding import values
from thinwire.coding.bitpack import pack_bits, pack_words, unpack_words


def restored(x, code, k=None):
    """``k``: what it is filled up to."""
    k = x.numel() if k is None else k
    scales, packed = values.encode(torch.nn.functional.pad(x, (0, k - x.numel())), code)
    assert (scales.numel(), packed.numel()) == values.sizes(code, k)
    assert (scales.dtype, packed.dtype) == (torch.float32, torch.uint8)
    return values.decode(scales, packed, code, k)


def test_golden_bytes():
    # levels of ratio 1.5: 1, 1.5, 2.25, ...; 1 is the 0th, 2 the 2nd, 1.5^7 the 7th, and 8 is nearest to the 5th
    x = torch.tensor([1.0, -2.0, 1.5**7, -8.0])
    assert [t.tolist() for t in values.encode(x, "sign")] == [[7.021484375], [0b1010]]
    assert [t.tolist() for t in values.encode(x, "int4")] == [[1.0, 1.5], [0xA0, 0xD7]]
    assert restored(x, "int4").tolist() == [1.0, -2.25, 1.5**7, -(1.5**5)]
    # 2 bits: the means of 1, 2 and of 5, 9
    x = torch.tensor([1.0, -2.0, 5.0, -10.0, 0.0])
    assert [t.tolist() for t in values.encode(x, "int2")] == [[1.5, 5.0], [0b11_01_10_00, 0]]
    assert restored(x[:4], "int2").tolist() == [1.5, -1.5, 7.5, -7.5]


@pytest.mark.parametrize("code", values.CODES)
def test_what_is_kept(code):
    """The l1 norm by a sign, both ends by levels; and the nearest level is within half a step of the ratio."""
    x = 1.0 + torch.randn(1001).abs() ** 3
    x[::3] *= -1
    back = restored(x, code)
    assert torch.equal(back.sign(), x.sign())
    if code == "sign":
        torch.testing.assert_close(back.abs().sum(), x.abs().sum())
    elif code != "int2":
        assert back.abs().min() == x.abs().min()
        torch.testing.assert_close(back.abs().max(), x.abs().max(), rtol=2e-5, atol=0)
        ratio = values.encode(x, code)[0][1]
        assert ((back - x) / x).abs().max() <= 1.0001 * (ratio - 1) / (ratio + 1)


def test_each_bit_loses_less():
    for x in (torch.randn(10_000), torch.randn(10_000) ** 3, torch.rand(10_000)):
        x = x[x.abs() > x.abs().median()]
        lost = [float((restored(x, code) - x).square().sum() / x.square().sum()) for code in values.CODES]
        assert lost[0] > lost[1] > lost[2] > lost[3] > 0


@pytest.mark.parametrize("code", values.CODES)
@pytest.mark.parametrize("k", [0, 1, 2, 9])
def test_equal_magnitudes_are_exact(code, k):
    for magnitude in (0.0, 1e-45, 0.3, 3e38):
        x = magnitude * torch.randn(k).sign()
        assert torch.equal(restored(x, code), x)
    assert restored(torch.empty(0), code, 5).tolist() == [0.0] * 5


@pytest.mark.parametrize("code", values.CODES)
def test_what_only_fills_a_message_changes_no_byte_of_the_rest(code):
    x = torch.randn(13)
    scales, packed = values.encode(x, code)
    for k in (14, 100):
        filled_scales, filled = values.encode(torch.nn.functional.pad(x, (0, k - 13)), code)
        assert torch.equal(filled_scales, scales)
        assert torch.equal(filled, torch.nn.functional.pad(packed, (0, values.sizes(code, k)[1] - packed.numel())))
    assert scales.all()
    assert 0 < packed.numel() < x.nbytes


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 64, 1001])
def test_the_fast_widths_write_the_bits_of_the_general_ones(width, count):
    words = torch.randint(0, 2**40, (count,))
    bits = torch.stack([(words >> j) & 1 for j in range(width)], 1).to(torch.uint8).view(-1)
    packed = pack_words(words, width)
    assert torch.equal(packed, pack_bits(bits))
    assert torch.equal(unpack_words(packed, count, width), words & (2**width - 1))
