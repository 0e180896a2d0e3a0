import pytest
import torch

from thinwire.wire import head


def test_golden_bytes():
    encoded = head.encode([True, False, True], torch.tensor([False, True, True]), torch.uint8, 513)
    assert bytes(encoded.tolist()).hex() == "0135"  # step 513 is 1 in a byte; used 101, bad 011, from the lowest bit on


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [1, 4, 9])
def test_all_ranks_learn_what_each_said(dtype, units):
    used, bad = torch.rand(3, units) < 0.5, torch.rand(3, units) < 0.5
    heads = torch.stack([head.encode(used[r].tolist(), bad[r], dtype, 254 + r) for r in range(3)])
    assert heads.shape == (3, head.size(units, dtype))
    found = head.decode(heads, units)
    assert torch.equal(found[0], used)
    assert torch.equal(found[1], bad)
    assert found[2].tolist() == ([254, 255, 0] if dtype == torch.uint8 else [0, 0, 0])
