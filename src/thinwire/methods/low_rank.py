"""The recipe of low rank."""

from typing import Unpack

from thinwire.compressors.powersgd import PowerSGD
from thinwire.core.checks import real
from thinwire.memories.error_feedback import ErrorFeedback, StateDtype
from thinwire.methods.method import Method
from thinwire.methods.options import Options, recipe
from thinwire.methods.warmup import Warmup


def powersgd(
    rank: int = 4,
    *,
    min_compression_rate: float = 2.0,
    state_dtype: StateDtype = "float32",
    **options: Unpack[Options],
) -> Method:
    """PowerSGD with error feedback, for any optimizer, whose momentum comes after averaging.

    ``x = residual + g`` as a matrix ``[n, m]``; its projection on ``rank`` directions is sent, the rest is the next
    residual. What is declined goes dense, and the ledger says so: vectors, and matrices with
    ``n m < min_compression_rate * rank * (n + m)``.

    Args:
        rank: directions, at least 1: 1 to 4 for convolutions, up to 32 for transformers.
        min_compression_rate: see above; 0 takes all matrices.
        state_dtype: of the residual, see ``thinwire.memories.ErrorFeedback``.
        options: those of all recipes, see ``Options``. A ``warmup`` of a number of steps is ``Warmup(steps, (1.0,))``,
            which sends dense at first, as the authors advise for about 10 % of the training.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: ``4 rank n`` bytes of a matrix at even steps, ``4 rank m`` at odd ones, by all-reduce.

    Example:
        >>> powersgd(2).rule("layer.weight", (512, 256), 512 * 256).compressor.rank
        2

    Source: T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", 2019, arXiv:1905.13727.

    Departures: see ``thinwire.compressors.PowerSGD``. Half a power iteration a step is half the bytes of a
    whole one, so compare at twice the rank.
    """
    least = real(0.0, hint=", which takes every matrix")("min_compression_rate", min_compression_rate)
    options["warmup"] = Warmup.read("warmup", options.get("warmup"), (1.0,))
    return recipe("powersgd", PowerSGD(rank, least), ErrorFeedback(state_dtype), options, min_ndim=0)
