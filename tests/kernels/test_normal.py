"""Normal numbers of a counter: Philox's published words, and the same bits from all makers, for any part."""

import os
from itertools import pairwise

import pytest
import torch

from thinwire.kernels import normal
from thinwire.kernels.normal import LANES, ReferenceNormals, normals, philox

SEED = 0x123456789ABCDEF0
KNOWN = [
    ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""Random123's known answers: counter, key, words."""


@pytest.fixture(params=["reference", "cpu", "cuda"])
def maker(request):
    if request.param == "reference":
        return ReferenceNormals()
    if request.param == "cpu":
        pytest.importorskip("numba", reason="the CPU kernels are in thinwire[cpu]")
        from thinwire.kernels.cpu_normal import CpuNormals

        return CpuNormals()
    pytest.importorskip("triton", reason="the CUDA kernels need triton, which interprets them here")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set, and CUDA is here: tests/gpu has them")
    from thinwire.kernels.cuda_normal import CudaNormals

    return CudaNormals()


def drawn(maker, n, start=0, direction=3, tensor=7, seed=SEED):
    out = torch.full((n,), float("nan"))
    maker.fill(out, seed, direction, tensor, start)
    return out


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_is_the_published_one(counter, key, words):
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == words


@pytest.mark.parametrize("start", [0, 8, 2**40])
def test_all_makers_leave_the_same_bits(maker, start):
    for n in (0, 1, 3, 4097, normal.CHUNK + 5):
        assert torch.equal(drawn(maker, n, start), drawn(ReferenceNormals(), n, start)), n


def test_any_part_of_a_tensor_is_that_part_of_the_whole(maker):
    whole = drawn(maker, 5000)
    for cuts in ([0, 4, 8, 5000], [0, 1024, 4096, 5000], [0, 2500 // LANES * LANES, 5000]):
        parts = [drawn(maker, end - start, start) for start, end in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)


def test_each_of_seed_direction_tensor_and_element_changes_the_numbers(maker):
    first = drawn(maker, 64)
    others = [
        drawn(maker, 64, **change)
        for change in ({"seed": SEED + 1}, {"seed": SEED + 2**32}, {"direction": 4}, {"tensor": 8}, {"start": 64})
    ]
    assert all((first != other).all() for other in others)


def test_they_are_normal():
    z = torch.cat([drawn(normals("cpu"), 500_000, tensor=t) for t in range(2)]).double()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * (variance / n) ** 0.5
    assert 4.0 < z.abs().max() < 6.8
    edges = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    cdf = torch.special.ndtr(edges)
    for edge, share in zip(edges, cdf, strict=True):
        assert abs((z < edge).double().mean() - share) < 5 * (share * (1 - share) / n) ** 0.5
    for lag in range(1, 5):  # elements of one counter, and of neighbours, are independent
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / n**0.5


def test_the_smallest_and_the_largest_words():
    ends = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    for words in (ends, ends.flip(0)):
        x, y = normal.box_muller(words, ends)
        assert torch.isfinite(x).all()
        assert torch.allclose(
            x.double() ** 2 + y.double() ** 2, -2 * torch.log((words.double() + 1) / 2**32), atol=1e-5
        )
