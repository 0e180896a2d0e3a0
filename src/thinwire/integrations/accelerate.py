"""Hugging Face Accelerate: attach to what ``prepare`` answers, and follow ``save_state`` and ``load_state``.

What was observed of Accelerate and shaped it:

* ``register_for_checkpointing`` writes one file, rank 0's, and gives it to all ranks. So every rank has its own.
* A handler of DDP's arguments is called inside ``prepare``, with the model alone; a method that remembers needs the
  optimizer too. So this is called after ``prepare``.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from thinwire.checkpoint import OnWorldChange
from thinwire.engines.attach import attach as attach_to
from thinwire.integrations import beside
from thinwire.integrations.needs import framework
from thinwire.policy.plan import Method
from thinwire.session import Session
from thinwire.tensors import ThinwireError

if TYPE_CHECKING:
    from accelerate import Accelerator

framework("accelerate", "accelerate", "1.0")


def attach(
    accelerator: "Accelerator",
    model: nn.Module,
    method: Method,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    on_world_change: OnWorldChange = "error",
    strict: bool = True,
    **options: Any,
) -> Session:
    """Exchange the gradients of a prepared model by ``method``, and keep its memory in the accelerator's checkpoints.

    ``accelerator.save_state(folder)`` then also writes ``thinwire-rank<r>-of-<world>.pt`` there, on every rank, and
    ``load_state`` reads them. A collective call.

    Args:
        accelerator: whose ``scaler`` is passed on, and whose checkpoints are followed until ``detach()``.
        model: what ``accelerator.prepare`` answered.
        method: as for ``thinwire.attach``.
        optimizer: the prepared optimizer, or the one inside.
        on_world_change: what ``load_state`` does with a checkpoint of another number of ranks, as for
            ``Session.load_state_dict``.
        strict: whether ``load_state`` refuses a folder that has no such files.
        options: what else ``thinwire.attach`` takes.

    Returns:
        The session.

    Raises:
        ThinwireError: there is no DDP or FSDP2 in the model, or as ``thinwire.attach``.

    Example::

        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        wire = attach(accelerator, model, thinwire.dgc(0.01), optimizer=optimizer)
    """
    if accelerator.num_processes == 1:
        raise ThinwireError(
            "the accelerator has 1 process, so nothing is exchanged and the model is not wrapped; start the script "
            "with `accelerate launch` or torchrun on 2 or more (on CPUs: Accelerator(cpu=True)), or leave thinwire out"
        )
    wrapped = next((part for part in model.modules() if isinstance(part, DistributedDataParallel)), model)
    scaler = cast(Any, accelerator).scaler
    wire = attach_to(wrapped, method, optimizer=optimizer, **{"scaler": scaler, **options})

    def save(models: Any, weights: Any, folder: str) -> None:
        beside.save(wire, folder)

    def load(models: Any, folder: str) -> None:
        beside.load(wire, Path(folder), on_world_change, strict)

    wire.cleanup.callback(accelerator.register_save_state_pre_hook(save).remove)
    wire.cleanup.callback(accelerator.register_load_state_pre_hook(load).remove)
    return wire
