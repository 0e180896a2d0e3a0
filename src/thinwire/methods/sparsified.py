"""Recipes that send few elements, coefficients or directions; vectors are sent dense."""

from typing import Literal, Unpack

from thinwire.compressors.block_topk import DctTopK
from thinwire.compressors.cast import DTYPES, Cast
from thinwire.compressors.powersgd import PowerSGD
from thinwire.compressors.randk import RandK
from thinwire.compressors.sparse import CLTK
from thinwire.compressors.threshold import SIDCo
from thinwire.core import Compressor
from thinwire.core.checks import dtype, flag, optional, real
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory, StateDtype
from thinwire.memories.sign_descent import DecoupledMomentum
from thinwire.methods.method import Method, Rule, Warmup
from thinwire.methods.options import Options, recipe


def randk(
    density: float,
    *,
    feedback: bool = True,
    shared: bool = True,
    state_dtype: StateDtype = "float32",
    **options: Unpack[Options],
) -> Method:
    """Send random positions (Rand-k); all workers draw the same ones, so an all-reduce sums them without indices.

    Args:
        density: kept / total of each parameter, in (0, 1].
        feedback: True for error feedback; without it values are scaled by ``1 / density`` to be unbiased.
        shared: True if all workers draw the same positions; if False, payloads are gathered.
        state_dtype: dtype of the residual, see ``thinwire.memories.ErrorFeedback``.
        options: the options of all recipes, see ``Options``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: ``2 (N-1)/N * density * 32`` bits per element, by all-reduce.

    Example:
        >>> randk(0.01).rules[0].compressor.traits.summable
        True

    Source: S. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", 2018, arXiv:1809.07599.
    """
    compressor = RandK(density, shared, scaled=not flag("feedback", feedback))
    return recipe("randk", compressor, ErrorFeedback(state_dtype) if feedback else NoMemory(), options)


def sidco(
    density: float,
    *,
    fit: Literal["exponential", "gamma", "pareto"] = "exponential",
    values: str | None = None,
    state_dtype: StateDtype = "float32",
    **options: Unpack[Options],
) -> Method:
    """Send about the largest elements by a threshold fitted to the magnitudes (SIDCo), with error feedback.

    Args:
        density: kept / total of each parameter, in (0, 1].
        fit, values: see ``thinwire.compressors.SIDCo``.
        state_dtype: dtype of the residual, see ``thinwire.memories.ErrorFeedback``.
        options: the options of all recipes, see ``Options``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: that of ``topk(density)``.

    Example:
        >>> sidco(0.01).name
        'sidco'

    Source: A. Abdelmoniem et al., 2021, arXiv:2101.10761, the paper of SIDCo.
    """
    return recipe("sidco", SIDCo(density, fit=fit, values=values), ErrorFeedback(state_dtype), options)


def scalecom(
    density: float, *, beta: float = 1.0, state_dtype: StateDtype = "float32", **options: Unpack[Options]
) -> Method:
    """Send the elements that a leader, in turn each worker, selects by Top-k (ScaleCom), with error feedback.

    It works best if the gradients of the workers are similar, as with large batches.

    Args:
        density: kept / total of each parameter, in (0, 1].
        beta: weight of the residual's low-pass filter, in (0, 1]; 1 turns it off. The paper takes 0.1 for batches and
            learning rates scaled up 8 to 12 times.
        state_dtype: dtype of the residual, see ``thinwire.memories.ErrorFeedback``.
        options: the options of all recipes, see ``Options``. The paper sends dense in the first epochs.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: k indices by a broadcast and k values by an all-reduce, about ``(N-1)/N * density * n * 9.5`` bytes per
    worker.

    Example:
        >>> scalecom(0.01).rules[0].compressor.traits.leader_selected
        True

    Source: C. Chen et al., "ScaleCom", 2020, arXiv:2104.11125, algorithm 1.
    """
    return recipe("scalecom", CLTK(density), ErrorFeedback(state_dtype, beta=beta), options)


def decoupled_momentum(
    density: float = 32 / 4096,
    *,
    chunk: int = 64,
    decay: float = 0.999,
    sign: bool = True,
    values: str | None = "bfloat16",
    **options: Unpack[Options],
) -> Method:
    """Send the largest DCT coefficients of each rank's momentum (DeMo), for SGD without momentum, at Adam's rates.

    Parameters of fewer than two dimensions are sent dense, so their momentum is empty after each step.

    Args:
        density, chunk: see ``thinwire.compressors.DctTopK``; the paper's 32 coefficients of 64 x 64 are ``32 / 4096``.
        decay, sign: see ``thinwire.memories.DecoupledMomentum``.
        values: dtype of the coefficients on the wire, None for float32; the cast's error stays in the momentum.
        options: the options of all recipes, see ``Options``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: 25 bits per coefficient, 0.2 per element, to each other rank, by all-gather.

    Example:
        >>> decoupled_momentum().name
        'demo'

    Source: B. Peng, J. Quesnelle, D. Kingma, "DeMo: Decoupled Momentum Optimization", 2024, arXiv:2411.19870.
    """
    memory = DecoupledMomentum(decay, sign)
    coded = optional(dtype(tuple(DTYPES), ", or None for float32"))("values", values)
    chosen: Compressor = DctTopK(density, chunk) if coded is None else DctTopK(density, chunk) >> Cast(coded)
    return recipe("demo", chosen, memory, options, Rule(Cast(), memory))


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
