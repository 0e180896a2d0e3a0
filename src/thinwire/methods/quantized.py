"""The recipes that send every element in few bits; parameters of fewer than two dimensions are sent dense."""

from typing import Literal

from thinwire.compressors.cast import Cast
from thinwire.compressors.natural import Natural
from thinwire.compressors.quantize import QSGD, Quantize
from thinwire.compressors.sign import Sign
from thinwire.compressors.ternary import TernGrad
from thinwire.core.checks import flag
from thinwire.core.interfaces import Compressor, Memory
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory, StateDtype
from thinwire.memories.majority_vote import MajorityVote
from thinwire.methods.basic import IDENTITY
from thinwire.methods.method import Method, Route, Rule


def _matrices(name: str, compressor: Compressor, memory: Memory, route: Route, rest: Rule = IDENTITY) -> Method:
    return Method(name, (Rule(compressor, memory, min_ndim=2), rest), route=route)


def qsgd(bits: int = 4, *, bucket: int = 512, norm: Literal["l2", "max"] = "l2", route: Route = "two_phase") -> Method:
    """QSGD: unbiased random rounding to few bits, without any memory, for every optimizer.

    Args:
        bits, bucket, norm: see ``thinwire.QSGD``.
        route: see ``thinwire.Method``; in two phases the mean is rounded once more, without a bias either.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: ``2 (N-1)/N * (bits + 32 / bucket)`` bits an element in two phases.

    Example:
        >>> qsgd(4).rules[0].compressor.bits
        4

    Source: D. Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", 2017,
    arXiv:1610.02132.
    """
    return _matrices("qsgd", QSGD(bits, bucket, norm), NoMemory(), route)


def maxmin(
    bits: int = 4,
    *,
    bucket: int = 512,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    feedback: bool = False,
    route: Route = "two_phase",
) -> Method:
    """CGX: evenly spaced levels between the minimum and the maximum of each bucket, for every optimizer.

    Args:
        bits, bucket, rounding: see ``thinwire.Quantize``.
        feedback: whether what rounding loses is remembered; it needs a bucket that contracts, e.g. 256 with 4 bits.
        route: see ``thinwire.Method``; two phases are CGX's scatter-reduce-all-gather.

    Raises:
        ThinwireError: a value outside its range; nearest rounding to fewer than 4 bits without feedback.

    **Wire**: ``2 (N-1)/N * (bits + 64 / bucket)`` bits an element in two phases.

    Example:
        >>> maxmin(4, bucket=256, feedback=True).name
        'maxmin'

    Source: I. Markov, H. Ramezanikebrya, D. Alistarh, "CGX: Adaptive System Support for Communication-Efficient Deep
    Learning", 2022, arXiv:2111.08617.

    Departures: the owner's own share is rounded as those of all others are.
    """
    memory = ErrorFeedback() if flag("feedback", feedback) else NoMemory()
    return _matrices("maxmin", Quantize(bits, bucket, rounding), memory, route)


def terngrad(*, clip: float | None = 2.5, route: Route = "two_phase") -> Method:
    """TernGrad: every element becomes -1, 0 or 1, times one scale, without any memory.

    Args:
        clip: see ``thinwire.TernGrad``.
        route: see ``thinwire.Method``.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: ``2 (N-1)/N * 1.6`` bits an element in two phases.

    Example:
        >>> terngrad().name
        'terngrad'

    Source: W. Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", 2017,
    arXiv:1705.07878.
    """
    return _matrices("terngrad", TernGrad(clip), NoMemory(), route)


def natural(*, route: Route = "two_phase") -> Method:
    """Natural compression: every element is rounded at random to a power of two, without any memory.

    Args:
        route: see ``thinwire.Method``.

    **Wire**: ``2 (N-1)/N * 9`` bits an element in two phases.

    Example:
        >>> natural().name
        'natural'

    Source: S. Horvath et al., "Natural Compression for Distributed Deep Learning", 2019, arXiv:1905.10988.
    """
    return _matrices("natural", Natural(), NoMemory(), route)


def signsgd(momentum: float = 0.9, *, route: Route = "two_phase") -> Method:
    """signSGD with majority vote; with a momentum, Signum. For plain SGD without a momentum, at Adam's learning rates.

    Parameters of fewer than two dimensions are sent dense, and become the sign of their mean too.

    Args:
        momentum: of each rank, before its vote; 0 for signSGD.
        route: see ``thinwire.Method``; in two phases, which are the paper's, a tie is broken by seed.

    Raises:
        ThinwireError: ``momentum`` is outside its range.

    **Wire**: ``2 (N-1)/N`` bits an element in two phases.

    Example:
        >>> signsgd().name
        'signsgd'

    Source: J. Bernstein et al., "signSGD with Majority Vote is Communication Efficient And Fault Tolerant", 2019,
    arXiv:1810.05291.
    """
    vote = MajorityVote(momentum)
    return _matrices("signsgd", Sign(scale="none"), vote, route, Rule(Cast(), vote))


def ef_sign(*, block: int = 4096, route: Route = "two_phase", state: StateDtype = "float32") -> Method:
    """Signs with a scale for each block, and error feedback, for every optimizer.

    Args:
        block: see ``thinwire.Sign``.
        route: see ``thinwire.Method``.
        state: what the residual is kept in, see ``thinwire.ErrorFeedback``.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: ``2 (N-1)/N * (1 + 32 / block)`` bits an element in two phases.

    Example:
        >>> ef_sign().name
        'ef_sign'

    Source: S. Karimireddy, Q. Rebjock, S. Stich, M. Jaggi, "Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes", 2019, arXiv:1901.09847.
    """
    return _matrices("ef_sign", Sign(block), ErrorFeedback(state), route)
