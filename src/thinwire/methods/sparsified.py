"""The recipes that send few elements, or few coefficients; parameters of fewer than two dimensions are sent dense."""

from typing import Literal

from thinwire.compressors.cast import DTYPES, Cast
from thinwire.compressors.cltk import CLTK
from thinwire.compressors.dct import DctTopK
from thinwire.compressors.randk import RandK
from thinwire.compressors.sidco import SIDCo
from thinwire.core.checks import dtype, flag, optional
from thinwire.core.interfaces import Compressor
from thinwire.memories.decoupled_momentum import DecoupledMomentum
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory, StateDtype
from thinwire.methods.basic import IDENTITY
from thinwire.methods.method import Method, Route, Rule
from thinwire.methods.warmup import Warmup


def randk(
    density: float,
    *,
    feedback: bool = True,
    shared: bool = True,
    warmup: Warmup | int | None = None,
    state: StateDtype = "float32",
) -> Method:
    """Rand-k: random positions that all workers draw alike, so that an all-reduce carries them without any index.

    Args:
        density: kept / total of each parameter, in (0, 1].
        feedback: whether the rest is remembered; without, what is sent is scaled by ``1 / density`` to be unbiased.
        shared: whether all workers draw the same positions; if not, payloads are gathered.
        warmup: densities of the first steps.
        state: what the residual is kept in, see ``thinwire.ErrorFeedback``.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: ``2 (N-1)/N * density * 32`` bits an element, by all-reduce.

    Example:
        >>> randk(0.01).rules[0].compressor.summable
        True

    Source: S. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", 2018, arXiv:1809.07599.
    """
    compressor = RandK(density, shared, scaled=not flag("feedback", feedback))
    memory = ErrorFeedback(state) if feedback else NoMemory()
    return Method("randk", (Rule(compressor, memory, min_ndim=2), IDENTITY), warmup=Warmup.read("warmup", warmup))


def sidco(
    density: float,
    *,
    fit: Literal["exponential", "gamma", "pareto"] = "exponential",
    values: str | None = None,
    warmup: Warmup | int | None = None,
    route: Route = "all_gather",
    state: StateDtype = "float32",
) -> Method:
    """SIDCo: Top-k by a threshold that is fitted to the magnitudes, with error feedback, for every optimizer.

    Args:
        density: kept / total of each parameter, in (0, 1].
        fit, values: see ``thinwire.SIDCo``.
        warmup: densities of the first steps.
        route: see ``thinwire.Method``.
        state: what the residual is kept in, see ``thinwire.ErrorFeedback``.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: that of ``topk(density)``.

    Example:
        >>> sidco(0.01).name
        'sidco'

    Source: A. Abdelmoniem, A. Elzanaty, M. Alouini, M. Canini, "An Efficient Statistical-based Gradient Compression
    Technique for Distributed Training Systems", 2021, arXiv:2101.10761.
    """
    rules = (Rule(SIDCo(density, fit=fit, values=values), ErrorFeedback(state), min_ndim=2), IDENTITY)
    return Method("sidco", rules, warmup=Warmup.read("warmup", warmup), route=route)


def scalecom(
    density: float, *, beta: float = 1.0, warmup: Warmup | int | None = None, state: StateDtype = "float32"
) -> Method:
    """ScaleCom: Top-k with error feedback, of which one worker, each in its turn, makes the choice for all.

    Works best where workers ask for similar things, as with large batches.

    Args:
        density: kept / total of each parameter, in (0, 1].
        beta: of the residual's low-pass filter, in (0, 1]; 1 is none, and the paper takes 0.1 where batch and learning
            rate are scaled up 8 to 12 times.
        warmup: densities of the first steps; the paper sends dense in the first epochs.
        state: what the residual is kept in, see ``thinwire.ErrorFeedback``.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: k indices by a broadcast and k values by an all-reduce, about ``(N-1)/N * density * n * 9.5`` bytes at any
    world size.

    Example:
        >>> scalecom(0.01).rules[0].compressor.led
        True

    Source: C. Chen et al., "ScaleCom: Scalable Sparsified Gradient Compression for Communication-Efficient Distributed
    Training", 2020, arXiv:2104.11125, algorithm 1.
    """
    memory = ErrorFeedback(state, beta=beta)
    return Method("scalecom", (Rule(CLTK(density), memory, min_ndim=2), IDENTITY), warmup=Warmup.read("warmup", warmup))


def decoupled_momentum(
    density: float = 32 / 4096,
    *,
    chunk: int = 64,
    decay: float = 0.999,
    sign: bool = True,
    values: str | None = "bfloat16",
) -> Method:
    """DeMo: the fastest moving part of each rank's momentum. For SGD without a momentum, at the learning rates of Adam.

    Parameters of fewer than two dimensions are sent dense, so nothing of them stays in the momentum.

    Args:
        density, chunk: see ``thinwire.DctTopK``; the paper's 32 coefficients of 64 x 64 are ``32 / 4096``.
        decay, sign: see ``thinwire.DecoupledMomentum``.
        values: dtype of the coefficients on the wire, None for float32; what a cast loses stays in the momentum.

    Raises:
        ThinwireError: a value outside its range.

    **Wire**: 25 bits a coefficient, 0.2 an element, to each other rank, by all-gather.

    Example:
        >>> decoupled_momentum().name
        'demo'

    Source: B. Peng, J. Quesnelle, D. Kingma, "DeMo: Decoupled Momentum Optimization", 2024, arXiv:2411.19870.
    """
    memory = DecoupledMomentum(decay, sign)
    coded = optional(dtype(tuple(DTYPES), ", or None for float32"))("values", values)
    chosen: Compressor = DctTopK(density, chunk) if coded is None else DctTopK(density, chunk) >> Cast(coded)
    return Method("demo", (Rule(chosen, memory, min_ndim=2), Rule(Cast(), memory)))
