"""Normal random numbers of a counter: element i of tensor t in direction d is a function of (seed, d, t, i) alone.

So any part of a tensor can be made by itself, in any order, on any device, with the same bits. The random words are
Philox4x32-10's; the transform of Box and Muller turns two of them into two normal numbers. Logarithm, sine and cosine
are polynomials of float32 additions and multiplications, each rounded once; with a correctly rounded square root,
IEEE 754 determines every bit.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.4; G. Box and M. Muller,
"A note on the generation of random normal deviates", 1958; polynomials of S. Moshier's Cephes (``logf``, ``sinf``).

Departures: a word of 32 bits is rounded to a float32 before its logarithm is taken, so no number exceeds 6.7.
"""

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
LANES = 4
"""Normal numbers of one counter: element i is number i % 4 of counter i // 4."""
CHUNK = 2**16
"""Elements that are made at once, so that the intermediate values stay in the cache."""
CHUNK_CUDA = 2**22
ROOT_HALF = 0x3F3504F3
"""The bits of sqrt(1/2) in float32."""
LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LOG2_LOW, LOG2_HIGH = -2.12194440e-4, 0.693359375
SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
ANGLE = 1.4629180792671596e-9
"""pi / 2 / 2^30."""


class Normals(Protocol):
    """A maker of normal numbers; all makers leave the same bits."""

    name: str

    def fill(self, out: Tensor, seed: int, direction: int, tensor: int, start: int) -> None:
        """Fill ``out``, float32 ``[n]``, with the elements from ``start`` on.

        Args:
            seed: the key, 64 bits.
            direction, tensor: 32 bits each.
            start: the first element, a multiple of 4 and below 2^64.
        """
        ...


class ReferenceNormals:
    """Normal numbers in plain PyTorch, on any device."""

    name = "plain PyTorch"

    def fill(self, out: Tensor, seed: int, direction: int, tensor: int, start: int) -> None:
        size = CHUNK if out.device.type == "cpu" else CHUNK_CUDA
        for at in range(0, out.numel(), size):
            part = out[at : at + size]
            first, blocks = (start + at) // LANES, -(-part.numel() // LANES)
            counter = torch.arange(first, first + blocks, dtype=torch.int64, device=out.device)
            words = philox([counter & WORD, counter >> 32, tensor, direction], (seed & WORD, seed >> 32))
            pairs = [one for i in (0, 2) for one in box_muller(words[i], words[i + 1])]
            part.copy_(torch.stack(pairs, 1).view(-1)[: part.numel()])


def philox(counter: Sequence[Tensor | int], key: tuple[int, int]) -> list[Tensor]:
    """Return the four words of each counter, in int64; words of the counter may be ints that all of them share."""
    c0, c1, c2, c3 = (
        torch.as_tensor(word, dtype=torch.int64, device=counter[0].device if isinstance(counter[0], Tensor) else "cpu")
        for word in counter
    )
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # modulo 2^64; the mask clears the sign after a shift
        c0, c2 = (high >> 32 & WORD) ^ (c1 ^ k0), (low >> 32 & WORD) ^ (c3 ^ k1)
        c1, c3 = high & WORD, low & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [c0, c1, c2, c3]


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two normal numbers for two words of 32 bits: the radius from the first, the angle from the second."""
    bits = (first + 1).to(torch.float32).view(torch.int32)  # u 2^32, u in (0, 1]
    exponent = (bits - ROOT_HALF) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e, square = exponent.to(torch.float32) - 32.0, f * f
    log = _polynomial(LOG, f) * f * square + e * LOG2_LOW - square * 0.5 + f + e * LOG2_HIGH
    radius = (log * -2.0).double().sqrt().float()  # correctly rounded, which MKL's sqrt of a float32 is not
    radius = torch.where(second >> 31 != 0, -radius, radius)
    angle = ((second & 0x3FFFFFFF) - 0x20000000).to(torch.float32) * ANGLE  # in [-pi/4, pi/4)
    square = angle * angle
    sine = _polynomial(SINE, square) * square * angle + angle
    cosine = _polynomial(COSINE, square) * square * square - square * 0.5 + 1.0
    swap = (second >> 30 & 1) != 0
    return radius * torch.where(swap, sine, cosine), radius * torch.where(swap, cosine, sine)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    y = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        y = y * x + coefficient
    return y


@cache
def normals(device: str) -> Normals:
    """Return the fastest maker for a type of device."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cuda" and not interpreted and importlib.util.find_spec("triton") is not None:
        from thinwire.kernels.cuda_normal import CudaNormals

        return CudaNormals()
    if device == "cpu" and importlib.util.find_spec("numba") is not None:
        from thinwire.kernels.cpu_normal import CpuNormals

        return CpuNormals()
    return ReferenceNormals()
