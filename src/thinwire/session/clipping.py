"""Local gradient clipping."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from thinwire.core.ambient import undisturbed
from thinwire.core.tensors import norm


@undisturbed
def clip(
    grads: Sequence[Tensor], threshold: float, world: int, whole: Callable[[Tensor], Tensor] = lambda own: own
) -> None:
    """Scale one rank's gradients, in place, to a norm of at most ``threshold * sqrt(world)``.

    With independent noise, the mean of N gradients has 1 / sqrt(N) of their norm, so this is as strong as clipping
    the mean at ``threshold``. (DGC's paper uses ``threshold / sqrt(N)``, because it divides gradients by N first.)
    ``whole`` maps the norm of these gradients to the norm of the whole model's, if they are only a shard of it.
    """
    scale = (threshold * math.sqrt(world) / (whole(norm(grads)) + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.device))
