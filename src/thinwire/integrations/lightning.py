"""Lightning: a callback that attaches when training begins, and follows the checkpoints.

Facts about Lightning that shaped this file:

* ``DDPStrategy(ddp_comm_hook=)`` is silently ignored on CPUs; a callback that attaches works.
* Rank 0 writes a callback's ``state_dict`` for all ranks, and ``on_save_checkpoint`` does not get the file's path. The
  strategy gets it, on all ranks, so this callback wraps the strategy's ``save_checkpoint``.
* The optimizer steps with a closure that runs backward. A session refuses that, since it checks the gradients before
  the step. So the callback runs the closure just before the step.
"""

import os
from pathlib import Path
from typing import Any, cast

import torch

from thinwire import Compressor, Method, Rule, Session, ThinwireError
from thinwire.integrations import per_rank_files
from thinwire.integrations.frameworks import attach_within, check_processes, framework, warn_of_clipping
from thinwire.methods.given import method_of
from thinwire.session.checkpoint import OnWorldChange

framework("lightning.pytorch", "lightning", "2.4")
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402


class Compression(Callback):
    """A callback that exchanges the gradients of a Lightning module by ``method`` while ``fit`` trains it with DDP.

    Next to ``<checkpoint>.ckpt`` every rank writes its state into the folder ``<checkpoint>.ckpt.thinwire``, and reads
    it in ``fit(ckpt_path=)``. The session stays attached after ``fit``, for ``trainer.save_checkpoint``.

    Args:
        method: as for ``thinwire.attach``.
        on_world_change: as for ``Session.load_state_dict``, if another number of ranks saved the checkpoint.
        strict: True to refuse a checkpoint without such a folder.
        options: further options of ``thinwire.attach``.

    Raises:
        ThinwireError: when training begins: as ``thinwire.attach``, or the files do not fit, or there are several
            optimizers.

    Example::

        trainer = Trainer(devices=2, strategy="ddp", callbacks=[Compression(thinwire.dgc(0.01))])
        trainer.fit(module, data)
    """

    def __init__(
        self,
        method: Method | Compressor | Rule,
        *,
        on_world_change: OnWorldChange = "error",
        strict: bool = True,
        **options: Any,
    ) -> None:
        self.method, self.strict, self.options = method_of(method), strict, options
        self.on_world_change: OnWorldChange = on_world_change
        self.wire: Session | None = None
        """The session of the latest training, also after it has ended."""
        self._followed: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wire is not None:
            self.wire.detach()
        optimizers = trainer.optimizers
        way_out = "set devices= or num_nodes= to 2 or more, or leave the callback out"
        check_processes("the Trainer", trainer.world_size, way_out)
        if len(optimizers) != 1:
            raise ThinwireError(
                f"the module has {len(optimizers)} optimizers, and one must hold all parameters; join them into one "
                "with several parameter groups"
            )
        if trainer.gradient_clip_val and trainer.is_global_zero:
            setting = f"gradient_clip_val={trainer.gradient_clip_val}"
            warn_of_clipping(self.method, setting, "gradient_clip_val=None")
        before = optimizers[0].register_step_pre_hook(_run_closure)  # so it runs before that of the session
        try:
            scaler, model = getattr(trainer.precision_plugin, "scaler", None), cast(Any, trainer.strategy.model)
            self.wire = attach_within(model, self.method, optimizers[0], scaler, self.options)
        except ThinwireError:
            before.remove()
            raise
        self.wire.cleanup.callback(before.remove)
        self._follow(trainer.strategy)
        if trainer.ckpt_path is not None:
            per_rank_files.load(self.wire, _folder(trainer.ckpt_path), self.on_world_change, self.strict)

    def _follow(self, strategy: Any) -> None:
        """Write and remove each rank's file together with the checkpoint."""
        if self._followed is strategy:
            return
        self._followed, write, remove = strategy, strategy.save_checkpoint, strategy.remove_checkpoint

        def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
            write(checkpoint, filepath, storage_options=storage_options)
            if self.wire is not None and "optimizer_states" in checkpoint:  # skip weights-only checkpoints
                per_rank_files.save(self.wire, _folder(filepath))

        def remove_checkpoint(filepath: str | Path) -> None:
            remove(filepath)
            if self.wire is not None:
                per_rank_files.remove(self.wire, _folder(filepath))

        strategy.save_checkpoint, strategy.remove_checkpoint = save_checkpoint, remove_checkpoint


def _run_closure(_: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    closure = kwargs.get("closure")
    if closure is None:
        return None
    with torch.enable_grad():
        closure()
    return args, {**kwargs, "closure": None}


def _folder(checkpoint: str | Path) -> str:
    """Return the folder next to the checkpoint file; follows a link, as of ``ModelCheckpoint(save_last="link")``."""
    name = str(checkpoint)
    return f"{os.path.realpath(name) if os.path.islink(name) else name}.thinwire"
