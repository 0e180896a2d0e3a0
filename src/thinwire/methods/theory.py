"""Proven learning rates from smoothness constants, for experiments on problems with known constants.

For networks no useful constants are known; in practice the EF21 papers try powers of two times these rates.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from thinwire.core import ThinwireError
from thinwire.core.checks import one_of, real

Mean: TypeAlias = Literal["quadratic", "arithmetic"]


def xi(alpha: float) -> float:
    """Return EF21's factor on the smoothness of the workers: ``sqrt(beta / theta) = (1 + sqrt(1 - a)) / a - 1``.

    ``theta = 1 - sqrt(1 - a)``, ``beta = (1 - a) / theta``; about ``2 / a`` for a small ``a``.

    Args:
        alpha: contraction of the compressor in (0, 1]; ``k / n`` for Top-k.

    Raises:
        ThinwireError: ``alpha`` is outside its range.

    Example:
        >>> round(xi(1 / 68), 1), xi(1.0)
        (134.5, 0.0)

    Source: P. Richtárik et al., "EF21", 2021, arXiv:2106.05203, theorem 1.
    """
    real(0.0, 1.0, above=True, hint=": a contraction, k / n for Top-k")("alpha", alpha)
    return (1.0 + math.sqrt(1.0 - alpha)) / alpha - 1.0


def ef21_step(smoothness: float, each: Sequence[float], alpha: float, mean: Mean = "quadratic") -> float:
    """Return the learning rate of EF21, ``1 / (L + M xi(alpha))`` with ``M`` a mean of the workers' ``L_i``.

    Args:
        smoothness: ``L`` of the average of all workers' functions.
        each: ``L_i`` of each worker's function.
        alpha: contraction of the compressor, in (0, 1].
        mean: ``"quadratic"`` as in EF21; ``"arithmetic"``, which is smaller and which EF21-W proves to suffice.

    Raises:
        ThinwireError: a value is outside its range.

    Example:
        >>> ef21_step(1.0, [1.0, 3.0], 0.1, "arithmetic") > ef21_step(1.0, [1.0, 3.0], 0.1)
        True

    Source: P. Richtárik et al., "EF21", 2021, arXiv:2106.05203, theorem 1; P. Richtárik, E. Gasanov, K. Burlachenko,
    "Error Feedback Reloaded", 2024, arXiv:2402.10774.
    """
    return _step(smoothness, each, mean, xi(alpha))


def ef21_pp_step(smoothness: float, each: Sequence[float], alpha: float, participation: float) -> float:
    """Return the learning rate of EF21 if each worker takes part with probability ``p``.

    ``1 / (L + sqrt(B / t))`` with ``t = theta p - rho (1 - p)``, ``B = (beta p + (1 + 1 / rho)(1 - p)) mean L_i^2``
    and ``rho = theta p / (2 (1 - p))``, so that ``t = theta p / 2``; ``theta`` and ``beta`` as in ``xi``.

    Args:
        smoothness, each, alpha: as for ``ef21_step``.
        participation: ``p`` in (0, 1]; at 1 the result is that of ``ef21_step``.

    Raises:
        ThinwireError: a value is outside its range.

    Example:
        >>> 0 < ef21_pp_step(1.0, [1.0, 3.0], 0.001, 0.5) < ef21_step(1.0, [1.0, 3.0], 0.001)
        True

    Source: I. Fatkhullin et al., "EF21 with Bells & Whistles", 2021, arXiv:2110.03294, theorem 7.

    Departures: the authors' code fixes ``s = rho = 0.001``, which gives no rate for ``alpha <= 0.001``; here ``s`` is
    that of EF21, ``1 / sqrt(1 - alpha) - 1``.
    """
    ratio = xi(alpha)
    p = real(0.0, 1.0, above=True, hint=": it is a probability")("participation", participation)
    if p == 1.0:
        return ef21_step(smoothness, each, alpha)
    theta = alpha / (1.0 + math.sqrt(1.0 - alpha))  # avoids the cancellation in 1 - sqrt(1 - alpha)
    rho = theta * p / (2.0 * (1.0 - p))
    spread = ratio * ratio * theta * p + (1.0 + 1.0 / rho) * (1.0 - p)  # beta = xi^2 theta
    return _step(smoothness, each, "quadratic", math.sqrt(spread / (theta * p / 2.0)))


def logistic_smoothness(features: Tensor, regularizer: float = 0.0) -> float:
    """Return ``lambda_max(A^T A) / (4 n) + 2 r``, the smoothness of a logistic loss with a non-convex regulariser.

    ``f(x) = mean log(1 + exp(-y a.x)) + r sum x_j^2 / (1 + x_j^2)``.

    Args:
        features: ``A`` ``[n, d]``, one row per example.
        regularizer: ``r``, at least 0.

    Raises:
        ThinwireError: there are no examples, or the regulariser is negative.

    Example:
        >>> logistic_smoothness(torch.eye(2, dtype=torch.float64) * 4.0, 0.1)
        2.2
    """
    if features.ndim != 2 or features.shape[0] == 0 or not regularizer >= 0.0:
        raise ThinwireError(
            f"features are of shape {tuple(features.shape)} and the regularizer is {regularizer}; "
            "[examples, features] with at least one example and a number from 0 on are needed"
        )
    wide = features.double()
    eigenvalues = cast(Tensor, torch.linalg.eigvalsh(wide.T @ wide))
    return eigenvalues[-1].item() / (4 * wide.shape[0]) + 2.0 * regularizer


def _step(smoothness: float, each: Sequence[float], mean: Mean, factor: float) -> float:
    if not smoothness > 0.0 or not each or not all(value > 0.0 for value in each):
        raise ThinwireError(f"smoothness constants must be above 0, and one a worker; got {smoothness}, {list(each)}")
    power = 2 if one_of("quadratic", "arithmetic")("mean", mean) == "quadratic" else 1
    return 1.0 / (smoothness + (sum(value**power for value in each) / len(each)) ** (1 / power) * factor)
