"""Queries and callbacks for the running backward pass, for which torch has no public API."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Variable


def in_backward() -> bool:
    """Return True if this thread runs a backward pass. Activation checkpointing in torch uses the same test."""
    return cast(Any, torch)._C._current_graph_task_id() != -1


def is_shared(grad: Tensor) -> bool:
    """Return True if another tensor uses the same memory: autograd may still read it, or it is another gradient.

    Autograd stores a gradient as ``.grad`` without a copy if nothing else owns the tensor. It does not check the
    storage, so ``.grad`` may be a view of a tensor that the backward pass still uses.
    """
    count = getattr(cast(Any, torch)._C, "_storage_Use_Count", None)
    return count is None or count(cast(Any, grad.untyped_storage())._cdata) > 2  # the gradient and this call


def queue(done: Callable[[], None]) -> None:
    """Call ``done`` at the end of the running backward pass, after earlier callbacks. DDP and FSDP2 do the same."""
    cast(Any, Variable)._execution_engine.queue_callback(done)
