"""Recipes to start with: dense, a cast, Top-k with error feedback, DGC, and ``lean``, the lowest loss per byte."""

import math
from dataclasses import replace
from functools import partial
from typing import Literal, Unpack

import torch

from thinwire.coding import values as codes
from thinwire.compressors.cast import DTYPES, Cast, dtype_named
from thinwire.compressors.sparse import TopK
from thinwire.core import checks
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory, StateDtype
from thinwire.memories.momentum import Momentum, MomentumCorrection, WeightDecay
from thinwire.methods.method import Method, Rule
from thinwire.methods.options import IDENTITY, Options, recipe

LEAN_VALUES = "int4"
"""The code that lost least for the same bytes."""


def dense(*, clip: float | None = None) -> Method:
    """Send every gradient as it is: plain data parallelism, bit-equal to DDP without a hook.

    Args:
        clip: local gradient clipping, see ``thinwire.Method``.

    **Wire**: ``2 (N-1)/N`` times the gradient, by all-reduce.
    """
    return Method("dense", (IDENTITY,), clip)


def cast(dtype: str | torch.dtype = "float16", *, clip: float | None = None) -> Method:
    """Send every gradient in a shorter dtype without error feedback, like PyTorch's fp16 and bf16 hooks.

    Args:
        dtype: ``"float16"`` or ``torch.float16``, ``"bfloat16"`` and so on.
        clip: local gradient clipping, see ``thinwire.Method``.

    Raises:
        ThinwireError: ``dtype`` is not one of these.

    **Wire**: half of ``dense()`` for ``"float16"`` and ``"bfloat16"``.
    """
    name = checks.dtype(tuple(DTYPES), "; thinwire.dense() sends gradients as they are")("dtype", dtype)
    return Method(name, (Rule(Cast(name), NoMemory()),), clip)


def topk(
    density: float,
    *,
    values: str | None = None,
    selection: Literal["auto", "exact", "sampled"] = "auto",
    state_dtype: StateDtype = "float32",
    **options: Unpack[Options],
) -> Method:
    """Send the largest elements (Top-k) with error feedback, for AdamW and every other optimizer.

    ``x = residual + g``; the largest elements of ``x`` are sent, the rest is the next residual. Parameters of fewer
    than two dimensions are sent dense.

    Args:
        density: kept / total of each parameter, in (0, 1]; 0.01 is a safe start.
        values: precision of the values sent, e.g. ``"float16"``, ``"int4"`` or ``"sign"``; the rounding error stays in
            the residual. See ``thinwire.compressors.TopK``, also for ``selection``.
        state_dtype: dtype of the residual, see ``thinwire.memories.ErrorFeedback``.
        options: the options of all recipes, see ``Options``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: about ``density * n * 5.5`` bytes to each other rank, by all-gather. At a density of 0.1 % a sent element
    takes 5.5 bytes, 2 with ``values="int4"`` and 1.6 with ``"sign"``.

    Example:
        >>> topk(0.01).name
        'topk'

    Source: S. Stich et al., "Sparsified SGD with Memory", 2018, arXiv:1809.07599.
    """
    return recipe("topk", TopK(density, values, selection), ErrorFeedback(state_dtype), options)


def dgc(
    density: float = 0.001,
    *,
    masking: bool = True,
    mask_below_density: float = 0.05,
    decay: WeightDecay = "separate",
    values: str | None = None,
    selection: Literal["auto", "exact", "sampled"] = "auto",
    state_dtype: StateDtype = "float32",
    **options: Unpack[Options],
) -> Method:
    """Send 0.1 % of the gradient by Deep Gradient Compression, with momentum SGD.

    ``u = m u + g``, ``v = v + u``; the largest ``|v|`` of each parameter are sent. At the sent elements ``v`` is
    cleared, and ``u`` too (momentum factor masking). Parameters of fewer than two dimensions are sent dense, with
    ordinary momentum after averaging. Momentum, Nesterov and weight decay are taken from the attached SGD optimizer.

    Args:
        density: kept / total of each parameter, in (0, 1].
        masking, mask_below_density, decay: see ``thinwire.memories.MomentumCorrection``.
        values, selection: as for ``topk``.
        state_dtype: dtype of the residual and the momentum, see ``thinwire.memories.ErrorFeedback``.
        options: the options of all recipes, see ``Options``. The paper advises a ``warmup`` over 1 to 5 % of the
            training. ``clip`` needs the norm of the whole gradient, so the exchange starts only at the end of backward.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: about ``density * n * 5.5`` bytes to each other rank, by all-gather. At a density of 0.1 % a sent element
    takes 5.5 bytes, 2 with ``values="int4"`` and 1.6 with ``"sign"``.

    Example:
        >>> dgc(0.001, warmup=Warmup(steps=400)).absorbs
        True

    Source: Y. Lin et al., "Deep Gradient Compression", 2018, arXiv:1712.01887.

    Departures: Elias-Fano indices instead of 16-bit runs; see also ``thinwire.memories.MomentumCorrection`` and
    ``thinwire.compressors.sampling``.
    """
    memory = MomentumCorrection(
        decay=decay, masking=masking, mask_below_density=mask_below_density, state_dtype=state_dtype
    )
    return recipe("dgc", TopK(density, values, selection), memory, options, Rule(Cast(), Momentum(decay=decay)))


def bits_of(density: float, values: str | None) -> float:
    """Return the bits per parameter of a Top-k message: values and Elias-Fano indices."""
    width = codes.CODES[values] if values in codes.CODES else 8 * dtype_named(values, torch.float32).itemsize
    low = math.floor(math.log2(1.0 / density))
    return density * (width + low + 1) + 2.0**-low


def density_for(bits_per_parameter: float, values: str | None) -> float:
    """Return the density at which a Top-k message takes that many bits per parameter, without scales and rounding.

    Example:
        >>> 0.001 < density_for(0.02, "sign") < 0.002
        True
    """
    most = checks.real(0.0, bits_of(1.0, values), above=True, hint=f", which sends everything with values={values!r}")
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
    density = density_for(bits_per_parameter, LEAN_VALUES)
    make = partial(dgc, masking=False) if checks.flag("momentum", momentum) else topk
    return replace(make(density, values=LEAN_VALUES, **options), name="lean")
