"""Recipes with an optimizer of their own: 1-bit Adam, 0/1 Adam, 1-bit LAMB."""

from typing import Unpack

from thinwire.compressors.cast import Cast
from thinwire.compressors.sign import Sign
from thinwire.core import Memory
from thinwire.memories.compressed_momentum import CompressedMomentum, SteadyFeedback
from thinwire.methods.method import Method, Rule
from thinwire.methods.options import Options, recipe


def onebit_adam(*, block: int = 4096, **options: Unpack[Options]) -> Method:
    """Exchange 1-bit Adam's momentum, dense at first, then in one bit per element; for ``thinwire.optim.OneBitAdam``.

    Tensors of fewer than two dimensions exchange their momentum dense. ``OneBitAdam(freeze_step=)`` sets the step at
    which the variance is frozen.

    Args:
        block: elements that share a scale, the mean of their magnitudes.
        options: the options of all recipes, see ``Options``. The default ``route`` has two phases, which take 2 bits
            per element for any number of workers. The optimizer keeps tensors of rare features (embeddings, bags of
            words) dense, see ``thinwire.optim.OneBitAdam``.

    Raises:
        ThinwireError: a value is outside its range.

    **Wire**: as ``dense()`` until the variance is frozen; then 1 bit per element and 4 bytes per block in each of two
    phases, 32 times less.

    Example:
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = thinwire.optim.OneBitAdam(model.parameters(), lr=1e-3, freeze_step=2)
        >>> result = simulate(model, onebit_adam(), optimizer=optimizer, workers=4, steps=4,
        ...     batches=lambda worker, step: torch.randn(4, 64), loss=lambda model, x: model(x).square().mean())
        >>> [round(row.dense_bytes / row.wire_bytes) for row in result.ledger.rows]
        [1, 1, 21, 21]

    Source: H. Tang et al., "1-bit Adam", 2021, arXiv:2102.02888.

    Departures: see ``thinwire.optim.OneBitAdam`` and ``thinwire.memories.CompressedMomentum``.
    """
    return _signs("onebit_adam", CompressedMomentum(), block, options)


def zeroone_adam(*, block: int = 4096, **options: Unpack[Options]) -> Method:
    """Exchange gradients in one bit per element, with ever rarer dense steps; for ``thinwire.optim.ZeroOneAdam``.

    Args:
        block, options: as for ``onebit_adam``.

    **Wire**: as ``onebit_adam``, with spread dense steps: ``16 (1 + log2(T / 16))`` of T steps.

    Source: Y. Lu et al., 2022, arXiv:2202.06009, the paper of 0/1 Adam.

    Departures: without the local steps of its second half, see ``thinwire.optim.ZeroOneAdam``.
    """
    return _signs("zeroone_adam", SteadyFeedback(), block, options)


def onebit_lamb(*, block: int = 4096, **options: Unpack[Options]) -> Method:
    """Exchange 1-bit LAMB's momentum as ``onebit_adam`` does; for ``thinwire.optim.OneBitLamb``.

    Source: C. Li et al., "1-bit LAMB", 2021, arXiv:2104.06069.

    Departures: see ``thinwire.optim.OneBitLamb``.
    """
    return _signs("onebit_lamb", CompressedMomentum(), block, options)


def _signs(name: str, memory: Memory, block: int, options: Options) -> Method:
    return recipe(name, Sign(block), memory, options, Rule(Cast(), memory), route="two_phase")
