import pytest
import torch

from thinwire.coding import header


def test_golden_bytes():
    encoded = header.encode([True, False, True], torch.tensor([False, True, True]), torch.uint8, 513)
    assert (
        bytes(encoded.tolist()).hex() == "0135"
    )  # step 513 is 1 in a byte; used 101, nonfinite 011, from the lowest bit on


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [1, 4, 9])
def test_all_ranks_learn_what_each_said(dtype, units):
    used, nonfinite = torch.rand(3, units) < 0.5, torch.rand(3, units) < 0.5
    heads = torch.stack([header.encode(used[r].tolist(), nonfinite[r], dtype, 254 + r) for r in range(3)])
    assert heads.shape == (3, header.size(units, dtype))
    found = header.decode(heads, units)
    assert torch.equal(found[0], used)
    assert torch.equal(found[1], nonfinite)
    assert found[2].tolist() is True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_tells_that_steps_differ(dtype):
    for steps in ([7, 7, 7], [7, 7, 8], [3, 4, 4], [255, 256, 256], [5, 5, 8]):
        heads = [header.encode([True], torch.tensor([False]), dtype, step) for step in steps]
        summed = torch.stack(heads).mul(1 / 3).sum(0, keepdim=True)
        used, nonfinite, parted = header.decode(summed, 1)
        assert (used.tolist(), nonfinite.tolist()) == ([[True]], [[False]])
        assert parted.tolist() is (len(set(steps)) > 1)
