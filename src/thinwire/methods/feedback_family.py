"""Recipes with error feedback: each remembers what compression lost, as a residual or in an estimate.

Each takes a density, for Top-k, or any contractive compressor. Parameters of fewer than two dimensions are sent dense.
If the method has no momentum of its own, momentum stays with the user's optimizer.
"""

from typing import Unpack

from thinwire.compressors.sparse import TopK
from thinwire.core import Compressor, ThinwireError
from thinwire.memories.error_feedback import ErrorFeedback
from thinwire.memories.shifted import EF21, EControl
from thinwire.methods.method import TYPICAL, Method
from thinwire.methods.options import Options, recipe


def ef14(compressor: float | Compressor, *, decay: float = 1.0, **options: Unpack[Options]) -> Method:
    """Compress with classical error feedback, by any contractive compressor.

    ``x = e + g``,  ``e = x - C(x)``; the optimizer gets the mean of ``C(x)``. ``topk()`` is this with Top-k.

    Args:
        compressor: a density in (0, 1], for Top-k; or a compressor.
        decay: see ``thinwire.memories.ErrorFeedback``.
        options: the options of all recipes, see ``Options``.

    Raises:
        ThinwireError: a value is outside its range, or the compressor may lose more than it is given.

    **Wire**: that of the compressor.

    Example:
        >>> ef14(TopK(0.01) >> Cast("float16")).name
        'ef14'

    Source: S. Stich et al., "Sparsified SGD with Memory", 2018, arXiv:1809.07599.
    """
    return recipe("ef14", _compressor(compressor), ErrorFeedback(decay=decay), options)


def ef21(compressor: float | Compressor, **options: Unpack[Options]) -> Method:
    """Send differences between the gradient and the estimate from earlier messages (EF21).

    ``h_i = h_i + C(g_i - h_i)``; the optimizer gets ``h = mean h_i``. With exact gradients and different data on each
    worker it converges where error feedback stalls. With small batches it stalls at a loss that neither a smaller
    learning rate nor more workers lower: use ``ef21_sgdm`` there. Heavy ball (EF21-HB) is SGD's own ``momentum=``.

    Args:
        compressor, options: as for ``ef14``. ``warmup=Warmup(1, (1.0,))`` starts from the first gradient, sent dense.

    Raises:
        ThinwireError: as ``ef14``.

    **Wire**: that of the compressor.

    Example:
        >>> ef21(0.01, warmup=Warmup(1, (1.0,))).rules[0].memory
        EF21(eta=1.0, participation=1.0, downlink=None)

    Source: see ``thinwire.memories.EF21``. ``thinwire.methods.theory.ef21_step`` has the learning rate that is proven.
    """
    return recipe("ef21", _compressor(compressor), EF21(), options)


def ef21_sgdm(compressor: float | Compressor, *, eta: float = 0.1, **options: Unpack[Options]) -> Method:
    """Use EF21 with momentum, the family's default for stochastic training, above all with different data per worker.

    ``v_i = (1 - eta) v_i + eta g_i``,  ``h_i = h_i + C(v_i - h_i)``; the optimizer gets ``h = mean h_i``.
    The optimizer gets an average of gradients, not their sum. With ``eta=0.1`` use SGD without momentum, at 10 times
    the learning rate of SGD with momentum 0.9. Dense parameters are not averaged; the same rate fits them.

    Args:
        compressor, options: as for ``ef21``.
        eta: weight of the newest gradient, in (0, 1]; a small one needs a small learning rate.

    Raises:
        ThinwireError: as ``ef14``.

    **Wire**: that of the compressor.

    Example:
        >>> ef21_sgdm(0.01).rules[0].memory.eta
        0.1

    Source: I. Fatkhullin et al., "Momentum Provably Improves Error Feedback!", 2023, arXiv:2305.15155, algorithm 1.
    """
    return recipe("ef21_sgdm", _compressor(compressor), EF21(eta), options)


def ef21_w(compressor: float | Compressor, **options: Unpack[Options]) -> Method:
    """Use EF21 at the larger learning rate ``thinwire.methods.theory.ef21_step(..., mean="arithmetic")`` (EF21-W).

    EF21-W weighs workers by ``w_i = L_i / sum L_j``: ``h_i = h_i + C(g_i / (N w_i) - h_i)``, and steps with
    ``sum w_i h_i``. If ``C(a x) = a C(x)`` for ``a > 0`` (Top-k, casts, scaled signs), ``H_i = N w_i h_i`` follows
    ``H_i + N w_i C((g_i - H_i) / (N w_i)) = H_i + C(g_i - H_i)``, which is EF21, and ``sum w_i h_i = mean H_i``. So
    both take the same steps, and only the learning rate differs.

    Args:
        compressor, options: as for ``ef21``.

    Raises:
        ThinwireError: as ``ef14``.

    **Wire**: that of the compressor.

    Example:
        >>> ef21_w(0.01).rules == ef21(0.01).rules
        True

    Source: P. Richtárik, E. Gasanov, K. Burlachenko, "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of
    Smoothness Constants", 2024, arXiv:2402.10774.
    """
    return recipe("ef21_w", _compressor(compressor), EF21(), options)


def ef21_pp(compressor: float | Compressor, *, participation: float, **options: Unpack[Options]) -> Method:
    """Use EF21 in which each rank takes part in a step with a given probability (EF21-PP).

    Present: ``h_i = h_i + C(g_i - h_i)``; absent: ``h_i`` stays as it is, also in the mean. An absent rank sends a
    message of zeros of the same size, since a collective has one size.

    Args:
        compressor, options: as for ``ef21``.
        participation: in (0, 1]; 1 is ``ef21``, bit for bit.

    Raises:
        ThinwireError: as ``ef14``.

    **Wire**: that of the compressor.

    Example:
        >>> ef21_pp(0.01, participation=0.5).rules[0].memory.participation
        0.5

    Source: I. Fatkhullin et al., "EF21 with Bells & Whistles", 2021, arXiv:2110.03294, algorithm 3;
    ``thinwire.methods.theory.ef21_pp_step`` has the learning rate.
    """
    return recipe("ef21_pp", _compressor(compressor), EF21(participation=participation), options)


def ef21_bc(compressor: float | Compressor, downlink: float | Compressor, **options: Unpack[Options]) -> Method:
    """Use EF21 with compression in both directions, as with a server that broadcasts compressed messages (EF21-BC).

    ``h_i = h_i + C(g_i - h_i)``,  ``s = s + downlink(mean h_i - s)``; the optimizer gets ``s``. Every rank computes
    the server's part from the messages of all ranks, so the downlink saves no bytes here.

    Args:
        compressor, options: as for ``ef21``.
        downlink: a density or a compressor, as ``compressor``.

    Raises:
        ThinwireError: as ``ef14``; or the downlink keeps a state.

    **Wire**: that of the compressor.

    Example:
        >>> ef21_bc(0.01, 0.05).rules[0].memory.downlink.density
        0.05

    Source: I. Fatkhullin et al., "EF21 with Bells & Whistles", 2021, arXiv:2110.03294, algorithm 5.
    """
    return recipe("ef21_bc", _compressor(compressor), EF21(downlink=_compressor(downlink)), options)


def econtrol(compressor: float | Compressor, *, eta: float | None = None, **options: Unpack[Options]) -> Method:
    """Use EF21 with a residual that is added back with the weight ``eta`` (EControl).

    ``x_i = eta e_i + g_i - h_i``,  ``h_i = h_i + C(x_i)``,  ``e_i = e_i + g_i - h_i``; the optimizer gets ``mean h_i``.

    Args:
        compressor, options: as for ``ef21``.
        eta: in [0, 1]; None for the density, or for the compressor's contraction for 2**20 elements. If that bound is
            loose, as for coded values, pass the density.

    Raises:
        ThinwireError: as ``ef14``; or the compressor's contraction is unknown.

    **Wire**: that of the compressor.

    Example:
        >>> econtrol(0.01).rules[0].memory
        EControl(eta=0.01)

    Source: Y. Gao, R. Islamov, S. Stich, "EControl", 2024, arXiv:2311.05645; see ``thinwire.memories.EControl``.
    """
    chosen = _compressor(compressor)
    if eta is None:
        eta = chosen.traits.contraction(TYPICAL) if isinstance(compressor, Compressor) else compressor
        if eta is None:
            raise ThinwireError(f"nothing is known of the contraction of {compressor}; give econtrol an eta, e.g. 0.01")
    return recipe("econtrol", chosen, EControl(eta), options)


def _compressor(given: float | Compressor) -> Compressor:
    return given if isinstance(given, Compressor) else TopK(given)
