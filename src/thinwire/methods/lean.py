"""What to send for a number of bytes: the density that a budget buys."""

import math

import torch

from thinwire.compressors.cast import dtype_named
from thinwire.tensors import ThinwireError
from thinwire.wire import values as codes


def bits_of(density: float, values: str | None) -> float:
    """Bits a parameter of a Top-k message: values, and Elias-Fano indices."""
    width = codes.CODES[values] if values in codes.CODES else 8 * dtype_named(values, torch.float32).itemsize
    low = math.floor(math.log2(1.0 / density))
    return density * (width + low + 1) + 2.0**-low


def density_for(bits_per_parameter: float, values: str | None) -> float:
    """The density at which a Top-k message takes that many bits a parameter, scales and rounding left out.

    Raises:
        ThinwireError: the budget is not above 0, or more than sending everything takes.

    Example:
        >>> 0.001 < density_for(0.02, "sign") < 0.002
        True
    """
    if not 0.0 < bits_per_parameter <= bits_of(1.0, values):
        raise ThinwireError(
            f"bits_per_parameter is {bits_per_parameter}; it must be above 0 and at most {bits_of(1.0, values):g}, "
            f"which sends everything with values={values!r}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if bits_of(middle, values) <= bits_per_parameter else (low, middle)
    return low
