import pytest
import torch

from thinwire.wire import values
from thinwire.wire.bitpack import pack_bits, pack_words, unpack_words


def restored(x, code, k=None):
    k = x.numel() if k is None else k
    scales, packed = values.encode(x, code, k)
    assert (scales.numel(), packed.numel()) == values.sizes(code, k)
    assert (scales.dtype, packed.dtype) == (torch.float32, torch.uint8)
    return values.decode(scales, packed, code, k)


def test_golden_bytes():
    x = torch.tensor([1.0, -2.0, 3.0, -8.0, 4.5])
    # sign: 0 1 0 1 0, the mean is 3.7; int4: levels of 1 above 1: 0, 8|1, 2, 8|7, and 3.5 to even
    assert [t.tolist() for t in values.encode(x, "sign", 5)] == [[pytest.approx(3.7)], [0b01010]]
    assert [t.tolist() for t in values.encode(x, "int4", 5)] == [[1.0, 7.0], [0x90, 0xF2, 0x04]]
    assert restored(x, "int4").tolist() == [1.0, -2.0, 3.0, -8.0, 5.0]
    assert restored(x, "int2").tolist() == [1.0, -1.0, 1.0, -8.0, 1.0]


@pytest.mark.parametrize("code", values.CODES)
def test_what_is_kept(code):
    """The l1 norm by a sign, the smallest and the largest by levels; and half a level is the most that is lost."""
    x = torch.randn(1001) ** 3
    back = restored(x, code)
    assert torch.equal(back.sign(), x.sign())
    if code == "sign":
        torch.testing.assert_close(back.abs().sum(), x.abs().sum())
        return
    assert back.abs().min() == x.abs().min()
    torch.testing.assert_close(back.abs().max(), x.abs().max())
    half = (x.abs().max() - x.abs().min()) / (2 ** (values.CODES[code] - 1) - 1) / 2
    assert 0 < (back - x).abs().max() <= half * 1.001


@pytest.mark.parametrize("code", values.CODES)
@pytest.mark.parametrize("k", [0, 1, 2, 9])
def test_equal_magnitudes_are_exact(code, k):
    for magnitude in (0.0, 1e-45, 0.3, 3e38):
        x = magnitude * torch.randn(k).sign()
        assert torch.equal(restored(x, code), x)
    assert restored(torch.empty(0), code, 5).tolist() == [0.0] * 5


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 64, 1001])
def test_the_fast_widths_write_the_bits_of_the_general_ones(width, count):
    words = torch.randint(0, 2**40, (count,))
    bits = torch.stack([(words >> j) & 1 for j in range(width)], 1).to(torch.uint8).view(-1)
    packed = pack_words(words, width)
    assert torch.equal(packed, pack_bits(bits))
    assert torch.equal(unpack_words(packed, count, width), words & (2**width - 1))
