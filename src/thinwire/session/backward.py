"""What autograd tells of the backward pass under way, for which torch has no public name."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Variable


def in_backward() -> bool:
    """Whether this thread is in a backward pass; torch's own checkpointing asks so too."""
    return cast(Any, torch)._C._current_graph_task_id() != -1


def is_shared(grad: Tensor) -> bool:
    """Tell whether another tensor lives in the same memory: autograd may still read it, or it is another gradient.

    A gradient that is a view of what flows on becomes ``.grad`` without a copy, since its tensor has one owner; whether
    its memory has another, autograd does not ask.
    """
    count = getattr(cast(Any, torch)._C, "_storage_Use_Count", None)
    return count is None or count(cast(Any, grad.untyped_storage())._cdata) > 2  # the gradient, and whoever asks


def queue(done: Callable[[], None]) -> None:
    """Call ``done`` at the end of the pass under way, after what has been queued before; as DDP and FSDP2 do."""
    cast(Any, Variable)._execution_engine.queue_callback(done)


def after_backward(done: Callable[[], None]) -> None:
    """Call ``done`` when gradients are where they belong: after what is queued by now, and by the hook that asks."""
    if in_backward():
        queue(lambda: queue(done))
    else:
        done()
