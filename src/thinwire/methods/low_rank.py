"""The recipe of low rank."""

from collections.abc import Sequence

from thinwire.compressors.cast import Cast
from thinwire.compressors.powersgd import PowerSGD
from thinwire.core.checks import real, texts
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory, StateDtype
from thinwire.methods.basic import IDENTITY
from thinwire.methods.method import Method, Rule
from thinwire.methods.warmup import Warmup


def powersgd(
    rank: int = 4,
    *,
    min_compression_rate: float = 2.0,
    warmup: Warmup | int | None = None,
    clip: float | None = None,
    keep_dense: Sequence[str] | str = (),
    state: StateDtype = "float32",
) -> Method:
    """PowerSGD with error feedback, for any optimizer, whose momentum comes after averaging.

    ``x = residual + g`` as a matrix ``[n, m]``; its projection on ``rank`` directions is sent, the rest is the next
    residual. What is declined goes dense, and the ledger says so: vectors, and matrices with
    ``n m < min_compression_rate * rank * (n + m)``.

    Args:
        rank: directions, at least 1: 1 to 4 for convolutions, up to 32 for transformers.
        min_compression_rate: see above; 0 takes all matrices.
        warmup: ``Warmup(steps, (1.0,))`` sends dense at first, as the authors advise for about 10 % of the training. A
            number of steps is that.
        clip: local gradient clipping, see ``thinwire.Method``.
        keep_dense: globs of parameter names to send dense.
        state: what the residual is kept in, see ``thinwire.ErrorFeedback``.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: ``4 rank n`` bytes of a matrix at even steps, ``4 rank m`` at odd ones, by all-reduce.

    Example:
        >>> powersgd(2).rule("layer.weight", (512, 256), 512 * 256).compressor.rank
        2

    Source: T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", 2019, arXiv:1905.13727.

    Departures: see ``thinwire.PowerSGD``. Half a power iteration a step is half the bytes of a whole one, so compare at
    twice the rank.
    """
    least = real(0.0, hint=", which takes every matrix")("min_compression_rate", min_compression_rate)
    rules = (
        *(Rule(Cast(), NoMemory(), match=glob) for glob in texts("keep_dense", keep_dense)),
        Rule(PowerSGD(rank, least), ErrorFeedback(state)),
        IDENTITY,
    )
    return Method("powersgd", rules, clip, Warmup.read("warmup", warmup, (1.0,)))
