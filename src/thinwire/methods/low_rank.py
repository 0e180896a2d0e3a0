"""The low-rank recipe."""

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
    """Compress with PowerSGD and error feedback, for any optimizer; its momentum is applied after averaging.

    ``x = residual + g`` as a matrix ``[n, m]``; its projection on ``rank`` directions is sent, the rest is the next
    residual. Vectors, and matrices with ``n m < min_compression_rate * rank * (n + m)``, are sent dense, and the
    ledger notes them.

    Args:
        rank: number of directions, at least 1: 1 to 4 for convolutions, up to 32 for transformers.
        min_compression_rate: see above; 0 compresses all matrices.
        state_dtype: dtype of the residual, see ``thinwire.memories.ErrorFeedback``.
        options: the options of all recipes, see ``Options``. For ``warmup`` a number of steps means
            ``Warmup(steps, (1.0,))``, which sends dense; the authors advise about 10 % of the training.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: ``4 rank n`` bytes for a matrix at even steps, ``4 rank m`` at odd ones, by all-reduce.

    Example:
        >>> powersgd(2).rule("layer.weight", (512, 256), 512 * 256).compressor.rank
        2

    Source: T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD", 2019, arXiv:1905.13727.

    Departures: see ``thinwire.compressors.PowerSGD``. Each step does half a power iteration for half the bytes of a
    whole one, so compare at twice the rank.
    """
    least = real(0.0, hint=", which takes every matrix")("min_compression_rate", min_compression_rate)
    options["warmup"] = Warmup.read("warmup", options.get("warmup"), (1.0,))
    return recipe("powersgd", PowerSGD(rank, least), ErrorFeedback(state_dtype), options, min_ndim=0)
