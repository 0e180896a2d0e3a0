"""The recipe with the lowest loss per byte so far: many elements in few bits, within a budget, without masking."""

import math
from dataclasses import replace
from functools import partial
from typing import Unpack

import torch

from thinwire.coding import values as codes
from thinwire.compressors.cast import dtype_named
from thinwire.core.checks import flag, real
from thinwire.methods.basic import dgc, topk
from thinwire.methods.method import Method
from thinwire.methods.options import Options

VALUES = "int4"
"""The code that lost least for the same bytes."""


def bits_of(density: float, values: str | None) -> float:
    """Return the bits per parameter of a Top-k message: values and Elias-Fano indices."""
    width = codes.CODES[values] if values in codes.CODES else 8 * dtype_named(values, torch.float32).itemsize
    low = math.floor(math.log2(1.0 / density))
    return density * (width + low + 1) + 2.0**-low


def density_for(bits_per_parameter: float, values: str | None) -> float:
    """Return the density at which a Top-k message takes that many bits per parameter, without scales and rounding.

    Raises:
        ThinwireError: the budget is not above 0, or above what sending every element takes.

    Example:
        >>> 0.001 < density_for(0.02, "sign") < 0.002
        True
    """
    most = real(0.0, bits_of(1.0, values), above=True, hint=f", which sends everything with values={values!r}")
    bits_per_parameter = most("bits_per_parameter", bits_per_parameter)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if bits_of(middle, values) <= bits_per_parameter else (low, middle)
    return low


def lean(bits_per_parameter: float = 0.06, *, momentum: bool = True, **options: Unpack[Options]) -> Method:
    """Send within a budget of bits: more elements with 4-bit values instead of fewer with 32 bits.

    At 0.06 bits per parameter the density is 0.43 %; with float32 values it would be 0.14 %. With momentum SGD this is
    DGC without momentum factor masking; with any other optimizer, Top-k with error feedback.

    Args:
        bits_per_parameter: bits per step for each compressed parameter, indices and values, above 0; 0.02 to 0.3 were
            measured. Dense float32 takes 32.
        momentum: take momentum over from SGD, as ``dgc`` does; False for AdamW and every other optimizer.
        options: the options of all recipes, see ``Options``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: ``bits_per_parameter * n / 8`` bytes to each other rank, by all-gather.

    Example:
        >>> lean(0.06).rule("w", (512, 512), 512 * 512).compressor.values
        'int4'

    Source: the parts are those of ``dgc`` and ``topk``; the choice is measured, see
    ``benchmarks/results/frontier_cpu2_202611.md``.
    """
    density = density_for(bits_per_parameter, VALUES)
    make = partial(dgc, masking=False) if flag("momentum", momentum) else topk
    return replace(make(density, values=VALUES, **options), name="lean")
