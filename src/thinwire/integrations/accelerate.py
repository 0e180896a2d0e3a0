"""Hugging Face Accelerate: attach to what ``prepare`` returns, and follow ``save_state`` and ``load_state``.

Facts about Accelerate that shaped this file:

* ``register_for_checkpointing`` writes rank 0's file only and gives it to all ranks. So every rank writes its own file.
* ``prepare`` calls ``ddp_handler`` with the model only, but a method with a memory needs the optimizer too.
  ``kwargs_handlers`` accepts only Accelerate's own classes. So attach after ``prepare``, or set the handler.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from thinwire import Compressor, Method, Rule, Session, ThinwireError
from thinwire.integrations import per_rank_files
from thinwire.integrations.frameworks import attach_within, check_processes, framework
from thinwire.session.checkpoint import OnWorldChange

if TYPE_CHECKING:
    from accelerate import Accelerator

framework("accelerate", "accelerate", "1.0")
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs  # noqa: E402

ONE_PROCESS = (
    "start the script with `accelerate launch` or torchrun on 2 or more (on CPUs: Accelerator(cpu=True)), or leave "
    "thinwire out"
)


def attach(
    accelerator: "Accelerator",
    model: nn.Module,
    method: Method | Compressor | Rule,
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
        accelerator: its ``scaler`` is passed on, and its checkpoints are followed until ``detach()``.
        model: the model that ``accelerator.prepare`` returned.
        method: as for ``thinwire.attach``.
        optimizer: the prepared optimizer, or the one that it wraps.
        on_world_change: what ``load_state`` does with a checkpoint of another number of ranks, as for
            ``Session.load_state_dict``.
        strict: True if ``load_state`` refuses a folder that has no such files.
        options: further options of ``thinwire.attach``.

    Returns:
        The session.

    Raises:
        ThinwireError: the model contains no DDP or FSDP2 model, or as ``thinwire.attach``.

    Example::

        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        wire = attach(accelerator, model, thinwire.dgc(0.01), optimizer=optimizer)
    """
    check_processes("the accelerator", accelerator.num_processes, ONE_PROCESS)
    wire = attach_within(model, method, optimizer, cast(Any, accelerator).scaler, options)

    def save(models: Any, weights: Any, folder: str) -> None:
        per_rank_files.save(wire, folder)

    def load(models: Any, folder: str) -> None:
        per_rank_files.load(wire, Path(folder), on_world_change, strict)

    wire.cleanup.callback(accelerator.register_save_state_pre_hook(save).remove)
    wire.cleanup.callback(accelerator.register_load_state_pre_hook(load).remove)
    return wire


class DdpHandler:
    """A ``ddp_handler`` that attaches inside ``accelerator.prepare``, for code that calls ``prepare`` itself.

    Args:
        accelerator: sets itself as its handler, and attaches to the one model that is prepared next.
        method: as for ``thinwire.attach``.
        optimizer: the optimizer before it is given to ``prepare``.
        arguments: DDP's arguments; None for the defaults.
        options: further options of ``attach`` in this file.

    Raises:
        ThinwireError: the accelerator does not wrap models in DDP, or already has a handler, or DDP's arguments set a
            comm hook. In ``prepare``: as ``attach``, or it is the second model.

    Example::

        handler = DdpHandler(accelerator, thinwire.dgc(0.01), optimizer=optimizer)
        model, optimizer = accelerator.prepare(model, optimizer)
        wire = handler.wire
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        method: Method | Compressor | Rule,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        arguments: DistributedDataParallelKwargs | None = None,
        **options: Any,
    ) -> None:
        check_processes("the accelerator", accelerator.num_processes, ONE_PROCESS)
        kind, anything = accelerator.distributed_type, cast(Any, accelerator)
        parallelism = getattr(anything, "parallelism_config", None)
        if not kind.name.startswith("MULTI_") or (parallelism is not None and parallelism.tp_enabled):
            raise ThinwireError(
                f"this accelerator ({kind.name}) does not wrap models in DDP, and would never ask a handler of DDP's; "
                "call attach() on what prepare() answers"
            )
        if anything.ddp_handler is not None:
            raise ThinwireError(
                "the accelerator has a handler of DDP's arguments, from kwargs_handlers= or an earlier DdpHandler; set "
                "accelerator.ddp_handler = None first, and give the arguments here, as arguments="
            )
        self.arguments = DistributedDataParallelKwargs() if arguments is None else arguments
        if self.arguments.comm_hook != DDPCommunicationHookType.NO:
            raise ThinwireError(
                f"DDP's arguments ask for the hook {self.arguments.comm_hook}, and DDP has room for one; leave it out"
            )
        self._wire: Session | None = None
        self._attach = partial(attach, accelerator, method=method, optimizer=optimizer, **options)
        anything.ddp_handler = self

    @property
    def wire(self) -> Session:
        """The session.

        Raises:
            ThinwireError: ``prepare`` has not wrapped a model yet.
        """
        if self._wire is None:
            raise ThinwireError("no model has been prepared since; call accelerator.prepare(model, optimizer) first")
        return self._wire

    def to_kwargs(self) -> dict[str, Any]:
        """Return the arguments that Accelerate passes to DDP."""
        return self.arguments.to_kwargs()

    def register_comm_hook(self, model: nn.Module) -> None:
        """Attach to the wrapped model; Accelerate calls this."""
        if self._wire is not None:
            raise ThinwireError(
                "a DdpHandler attaches to one model, and this is the second; prepare the others before it is made, or "
                "leave it out and call attach() on each after prepare()"
            )
        self._wire = self._attach(model)
