"""Recipes of local updates: workers step on their own, and exchange what they have changed.

Each takes the method that compresses the exchange, as ``exchange``: any method, compressor or rule whose result is a
gradient; None sends it dense.
"""

from dataclasses import replace
from typing import Any, TypeAlias

from thinwire.compressors.quantize import Quantize
from thinwire.compressors.sparse import TopK
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor
from thinwire.core.memory_capabilities import traits_of
from thinwire.memories.error_feedback import ErrorFeedback
from thinwire.methods.basic import dense
from thinwire.methods.local_settings import Local
from thinwire.methods.method import Method, Rule
from thinwire.methods.options import recipe

Exchange: TypeAlias = Method | Compressor | Rule | None


def local(exchange: Exchange = None, *, every: int, name: str = "local", **settings: Any) -> Method:
    """Exchange what ``every`` steps of each worker's own optimizer have changed, instead of gradients.

    ``delta = anchor - parameters``; the mean of all workers' deltas, compressed by ``exchange``, moves the anchor by an
    outer step with momentum, and the parameters become the anchor. The residual of a compressor is in units of updates.

    Args:
        exchange: the method, compressor or rule that compresses ``delta``; None sends it dense.
        every: inner steps in a round, at least 1.
        name: the method's name in tables, with that of ``exchange`` added.
        settings: ``lr``, ``momentum``, ``nesterov``, ``clip``, ``delay``, ``fragments``, ``mix``, ``penalty``,
            ``per_lr``, ``start``, ``contraction``, ``buffers`` and ``sync_moments``, see ``thinwire.methods.Local``.

    Raises:
        ThinwireError: a setting is outside its range, or ``exchange`` owns the optimizer's momentum.

    **Wire**: that of ``exchange``, once in ``every`` steps.

    Example:
        >>> local(topk(0.01), every=8, lr=0.7, momentum=0.9, nesterov=True).name
        'local(topk)'
    """
    from thinwire.methods.given import method_of  # it imports this package

    method = dense() if exchange is None else method_of(exchange)
    if method.local is not None:
        raise ThinwireError(f"exchange is {method.name}, which makes local updates already; give the method inside")
    if method.absorbs or any(traits_of(rule.memory).gives != "gradient" for rule in method.rules):
        raise ThinwireError(
            f"exchange is {method.name}, which stands in for a part of the optimizer, and local updates keep the whole "
            "optimizer on each worker; use thinwire.topk(), thinwire.lean(..., momentum=False), or another method "
            "without momentum of its own"
        )
    return replace(method, name=f"{name}({method.name})", local=Local(every, **settings))


def updates(exchange: Exchange, **settings: Any) -> Method:
    """Exchange each step's update instead of the gradient, for any optimizer.

    Each worker steps with its own optimizer and its own moments. What the step has changed is compressed and averaged;
    the residual is in units of updates. It is to AdamW what DGC is to momentum SGD.

    Args:
        exchange: the method that compresses the updates, e.g. ``thinwire.topk(0.01)``.
        settings: as for ``local``.

    **Wire**: that of ``exchange``, in each step.

    Example:
        >>> updates(topk(0.01)).name
        'updates(topk)'
    """
    return local(exchange, every=1, name="updates", **settings)


def post_local_sgd(every: int = 8, *, start: int = 0, exchange: Exchange = None, **settings: Any) -> Method:
    """Average the parameters in each of the first ``start`` steps, and then after every ``every`` steps.

    Args:
        every, exchange, settings: as for ``local``.
        start: steps of data parallelism at the beginning.

    **Wire**: that of ``exchange``, once in ``every`` steps.

    Source: T. Lin, S. Stich, K. Patel, M. Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", 2020, arXiv:1808.07217.
    """
    return local(exchange, every=every, name="post_local_sgd", start=start, **settings)


def slowmo(
    every: int = 12, *, lr: float = 1.0, momentum: float = 0.5, exchange: Exchange = None, **settings: Any
) -> Method:
    """Add a slow momentum to local updates.

    ``m = momentum m + mean(delta) / lr_inner``; ``anchor -= lr lr_inner m``, with the inner optimizer's learning rate
    at the start of the round.

    Args:
        every, exchange, settings: as for ``local``.
        lr, momentum: of the outer step.

    **Wire**: that of ``exchange``, once in ``every`` steps.

    Source: J. Wang, V. Tantia, N. Ballas, M. Rabbat, "SlowMo: Improving Communication-Efficient Distributed SGD with
    Slow Momentum", 2020, arXiv:1910.00643, algorithm 1.
    """
    return local(exchange, every=every, name="slowmo", lr=lr, momentum=momentum, per_lr=True, **settings)


def diloco(
    every: int = 50, *, lr: float = 0.7, momentum: float = 0.9, exchange: Exchange = None, **settings: Any
) -> Method:
    """Step on each worker alone, and move all of them by an outer Nesterov step (DiLoCo).

    ``m = momentum m + mean(delta)``; ``anchor -= lr (mean(delta) + momentum m)``.

    Args:
        every, exchange, settings: as for ``local``. The paper takes 500; at few steps, small periods lose less.
        lr, momentum: of the outer step.

    **Wire**: that of ``exchange``, once in ``every`` steps: dense, ``2 (N-1)/N`` times the parameters.

    Example:
        >>> diloco(every=50).local.nesterov
        True

    Source: A. Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
    arXiv:2311.08105, algorithm 1.
    """
    return local(exchange, every=every, name="diloco", lr=lr, momentum=momentum, nesterov=True, **settings)


def streaming_diloco(
    every: int = 100,
    *,
    fragments: int = 4,
    delay: int = 5,
    mix: float = 0.5,
    lr: float = 0.7,
    momentum: float = 0.9,
    exchange: Exchange = None,
    **settings: Any,
) -> Method:
    """Exchange one fragment of the model at a time, while the inner steps go on (Streaming DiLoCo).

    Args:
        every, fragments, delay, mix, exchange, settings: as for ``local``.
        lr, momentum: of the outer step.

    **Wire**: that of ``exchange``, once in ``every`` steps, in ``fragments`` parts.

    Source: A. Douillard et al., "Streaming DiLoCo with overlapping communication", 2025, arXiv:2501.18512.

    Departures: the paper sends 4-bit floats; here ``exchange`` says, e.g. ``Quantize(4, rounding="stochastic")``.
    """
    return local(
        exchange, every=every, name="streaming_diloco", lr=lr, momentum=momentum, nesterov=True, fragments=fragments,
        delay=delay, mix=mix, **settings,
    )  # fmt: skip


def sparse_loco(
    every: int = 30, *, density: float = 64 / 4096, values: str | None = "int2", decay: float = 0.95, **settings: Any
) -> Method:
    """Send the largest elements of the update in 2 bits, with a decayed residual (SparseLoCo).

    ``e = decay e + delta``; the largest elements of ``e`` are sent and subtracted; the anchor moves by their mean.
    Vectors are compressed too: dense, those of a usual transformer would cost a fifth of all bits.

    Args:
        every, settings: as for ``local``; the outer step is ``lr=1`` without momentum.
        density: kept / total, in (0, 1].
        values: the code of the values, see ``thinwire.compressors.TopK``.
        decay: factor on the residual in each round.

    **Wire**: about 10 bits per sent element, 0.0052 bits per parameter and step by default.

    Source: A. Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", 2025, arXiv:2508.15706.

    Departures: the largest elements of a whole parameter, not of each chunk of 4096, in Elias-Fano code.
    """
    sent = recipe("topk", TopK(density, values), ErrorFeedback(decay=decay), {}, min_ndim=0)
    return local(sent, every=every, name="sparse_loco", **settings)


def muloco(
    every: int = 30,
    *,
    lr: float = 0.7,
    momentum: float = 0.6,
    bits: int = 4,
    decay: float = 0.9,
    **settings: Any,
) -> Method:
    """Send the update of Muon in few bits, with a decayed residual (MuLoCo).

    Pass Muon (``torch.optim.Muon`` for matrices, AdamW for the rest) as the inner optimizers.

    Args:
        every, settings: as for ``local``.
        lr, momentum: of the outer Nesterov step.
        bits: bits of a value.
        decay: factor on the residual in each round.

    **Wire**: about ``bits`` bits an element, once in ``every`` steps.

    Source: B. Therien, X. Huang, I. Rish, E. Belilovsky, "MuLoCo: Muon is a practical inner optimizer for DiLoCo",
    2025, arXiv:2505.23725.

    Departures: the outer learning rate multiplies the mean, never the residual.
    """
    sent = Rule(Quantize(bits), ErrorFeedback(decay=decay), min_ndim=2)
    return local(sent, every=every, name="muloco", lr=lr, momentum=momentum, nesterov=True, **settings)


def co2(
    every: int = 48,
    *,
    lr: float = 1.0,
    momentum: float = 0.0,
    clip: float | None = 1.0,
    penalty: Any = "gap",
    exchange: Exchange = None,
    **settings: Any,
) -> Method:
    """Hide the exchange of a round behind the steps of the next one (CO2).

    At the end of round t the mean update of round t-1 has arrived: ``m = momentum m + mean / penalty``, limited to
    ``[-clip, clip]``; ``anchor -= lr m``. Round t+1 begins from the anchor.

    Args:
        every, exchange, settings: as for ``local``. The exchange is hidden if it takes less than ``every`` steps.
        lr, momentum, clip: of the outer step. A late outer step is stable if ``lr contraction < 1 - momentum``; the
            paper's momentum of 0.2 for up to 32 workers needs ``contraction=0.8``.
        penalty: divisor of late updates, see ``thinwire.methods.Local``.

    **Wire**: that of ``exchange``, once in ``every`` steps, and 8 bytes to each other worker with a penalty.

    Source: W. Sun et al., "CO2: Efficient Distributed Training with Full Communication-Computation Overlap", 2024,
    arXiv:2401.16265.

    Departures: updates are exchanged, not parameters; the clip limits the momentum, which in the released code it does
    not.
    """
    return local(
        exchange, every=every, name="co2", lr=lr, momentum=momentum, clip=clip, delay="round", penalty=penalty,
        **settings,
    )  # fmt: skip


def lookahead(every: int = 5, *, lr: float = 0.5, **settings: Any) -> Method:
    """Move slow weights by a share of what the fast ones have changed (Lookahead); one worker sends nothing.

    Args:
        every, settings: as for ``local``.
        lr: the share.

    **Wire**: nothing with one worker; else dense, once in ``every`` steps.

    Source: M. Zhang, J. Lucas, G. Hinton, J. Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019,
    arXiv:1907.08610.
    """
    return local(None, every=every, name="lookahead", lr=lr, **settings)
