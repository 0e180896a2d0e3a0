"""Recipes that send every element in few bits; parameters of fewer than two dimensions are sent dense."""

from typing import Literal, Unpack

from thinwire.compressors.cast import Cast
from thinwire.compressors.quantize import QSGD, Quantize
from thinwire.compressors.rounding import Natural, TernGrad
from thinwire.compressors.sign import Sign
from thinwire.core.checks import flag
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory, StateDtype
from thinwire.memories.sign_descent import MajorityVote
from thinwire.methods.method import Method, Rule
from thinwire.methods.options import Options, recipe


def qsgd(bits: int = 4, *, block: int = 512, norm: Literal["l2", "max"] = "l2", **options: Unpack[Options]) -> Method:
    """Round every element at random and without bias to few bits (QSGD), without a memory, for every optimizer.

    Args:
        bits, block, norm: see ``thinwire.compressors.QSGD``.
        options: the options of all recipes, see ``Options``. The default ``route`` has two phases; the second rounds
            the mean again, also without bias.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: ``2 (N-1)/N * (bits + 32 / block)`` bits per element in two phases.

    Example:
        >>> qsgd(4).rules[0].compressor.bits
        4

    Source: D. Alistarh et al., "QSGD", 2017, arXiv:1610.02132.
    """
    return recipe("qsgd", QSGD(bits, block, norm), NoMemory(), options, route="two_phase")


def maxmin(
    bits: int = 4,
    *,
    block: int = 512,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    feedback: bool = False,
    **options: Unpack[Options],
) -> Method:
    """Round to evenly spaced levels between the minimum and maximum of each block (CGX), for every optimizer.

    Args:
        bits, block, rounding: see ``thinwire.compressors.Quantize``.
        feedback: True for error feedback; it needs a small enough block, e.g. 256 with 4 bits.
        options: the options of all recipes, see ``Options``. The default ``route``, in two phases, is CGX's
            scatter-reduce-all-gather.

    Raises:
        ThinwireError: a value is outside its range, or nearest rounding to fewer than 4 bits has no feedback.

    **Wire**: ``2 (N-1)/N * (bits + 64 / block)`` bits per element in two phases.

    Example:
        >>> maxmin(4, block=256, feedback=True).name
        'maxmin'

    Source: I. Markov, H. Ramezanikebrya, D. Alistarh, "CGX", 2022, arXiv:2111.08617.

    Departures: the owner's own share is rounded like all others.
    """
    memory = ErrorFeedback() if flag("feedback", feedback) else NoMemory()
    return recipe("maxmin", Quantize(bits, block, rounding), memory, options, route="two_phase")


def terngrad(*, clip_rms: float | None = 2.5, **options: Unpack[Options]) -> Method:
    """Send every element as -1, 0 or 1, times one scale (TernGrad), without a memory.

    Args:
        clip_rms: see ``thinwire.compressors.TernGrad``.
        options: the options of all recipes, see ``Options``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: ``2 (N-1)/N * 1.6`` bits per element in two phases.

    Example:
        >>> terngrad().name
        'terngrad'

    Source: W. Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", 2017,
    arXiv:1705.07878.
    """
    return recipe("terngrad", TernGrad(clip_rms), NoMemory(), options, route="two_phase")


def natural(**options: Unpack[Options]) -> Method:
    """Round every element at random to a power of two (natural compression), without a memory.

    Args:
        options: the options of all recipes, see ``Options``.

    **Wire**: ``2 (N-1)/N * 9`` bits per element in two phases.

    Example:
        >>> natural().name
        'natural'

    Source: S. Horvath et al., "Natural Compression for Distributed Deep Learning", 2019, arXiv:1905.10988.
    """
    return recipe("natural", Natural(), NoMemory(), options, route="two_phase")


def signsgd(momentum: float = 0.9, **options: Unpack[Options]) -> Method:
    """Use signSGD with majority vote (with momentum: Signum), for SGD without momentum, at Adam's learning rates.

    Parameters of fewer than two dimensions are sent dense; their gradient is also the sign of the mean.

    Args:
        momentum: momentum of each rank before its vote; 0 for signSGD.
        options: the options of all recipes, see ``Options``. With the default ``route`` in two phases, as in the
            paper, the seed decides ties.

    Raises:
        ThinwireError: ``momentum`` is outside its range.

    **Wire**: ``2 (N-1)/N`` bits per element in two phases.

    Example:
        >>> signsgd().name
        'signsgd'

    Source: J. Bernstein et al., "signSGD with Majority Vote", 2019, arXiv:1810.05291.
    """
    vote = MajorityVote(momentum)
    return recipe("signsgd", Sign(scale="none"), vote, options, Rule(Cast(), vote), route="two_phase")


def ef_sign(*, block: int = 4096, state_dtype: StateDtype = "float32", **options: Unpack[Options]) -> Method:
    """Send signs with a scale for each block, with error feedback, for every optimizer.

    Args:
        block: see ``thinwire.compressors.Sign``.
        state_dtype: dtype of the residual, see ``thinwire.memories.ErrorFeedback``.
        options: the options of all recipes, see ``Options``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: ``2 (N-1)/N * (1 + 32 / block)`` bits per element in two phases.

    Example:
        >>> ef_sign().name
        'ef_sign'

    Source: S. Karimireddy et al., "Error Feedback Fixes SignSGD", 2019, arXiv:1901.09847.
    """
    return recipe("ef_sign", Sign(block), ErrorFeedback(state_dtype), options, route="two_phase")
