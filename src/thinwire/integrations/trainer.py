"""Hugging Face Trainer: a callback that attaches when training begins, and follows the checkpoints.

Facts about the Trainer that shaped this file:

* A callback gets the model without its DDP wrapper and no checkpoint path. So this callback takes the Trainer.
* The Trainer wraps the model when ``train()`` begins, and loads the optimizer before ``on_train_begin``.
* ``max_grad_norm`` defaults to 1 and ``find_unused_parameters`` to True.
"""

import warnings
from pathlib import Path
from typing import Any, cast

from thinwire import Compressor, Method, Rule, Session, ThinwireError
from thinwire.core.checks import of_type
from thinwire.integrations import per_rank_files
from thinwire.integrations.frameworks import attach_within, check_processes, ddp_within, framework, warn_of_clipping
from thinwire.methods.given import method_of
from thinwire.session.checkpoint import OnWorldChange

framework("transformers", "transformers", "5.0")
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments  # noqa: E402


class Compression(TrainerCallback):
    """A callback that exchanges the gradients of a Trainer's model by ``method`` while it trains.

    It adds itself to the Trainer, attaches when training begins and detaches when it ends. Every rank writes its state
    into each ``checkpoint-<step>``, and reads it when training resumes there.

    Args:
        trainer: the Trainer that this callback adds itself to.
        method: as for ``thinwire.attach``. The Trainer's default optimizer is AdamW; with it take a method that leaves
            momentum to the optimizer, e.g. ``thinwire.topk(0.01)``.
        resume_from: the checkpoint given to ``train(resume_from_checkpoint=)``, if it is not in ``output_dir``.
        on_world_change: as for ``Session.load_state_dict``, if another number of ranks saved the checkpoint.
        strict: True to refuse a checkpoint without such files.
        options: further options of ``thinwire.attach``.

    Raises:
        ThinwireError: ``trainer`` is not a Trainer, or ``method`` not a method. When training begins: as
            ``thinwire.attach``, or the files do not fit.

    Example::

        trainer = Trainer(model, arguments, train_dataset=data)
        wired = Compression(trainer, thinwire.topk(0.01))
        trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        method: Method | Compressor | Rule,
        *,
        resume_from: str | Path | None = None,
        on_world_change: OnWorldChange = "error",
        strict: bool = True,
        **options: Any,
    ) -> None:
        says = "Compression(trainer, method): the Trainer that it adds itself to comes first"
        self.trainer: Any = of_type(Trainer, says)("trainer", trainer)
        self.method, self.options = method_of(method), options
        self.resume_from, self.strict = resume_from, strict
        self.on_world_change: OnWorldChange = on_world_change
        self.wire: Session | None = None
        """The session of the latest training, also after it has ended."""
        self._attached = False
        self._began: TrainerState | None = None
        trainer.add_callback(self)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self._began is state:  # if the user also adds it, each training calls it twice
            return
        if state.is_hyper_param_search:
            raise ThinwireError(
                "a hyper-parameter search saves each trial in a folder that a callback is not told; search without "
                "thinwire, then train with it"
            )
        way_out = "start the script with torchrun on 2 or more (on CPUs with TrainingArguments(use_cpu=True))"
        check_processes("the Trainer", cast(int, args.world_size), f"{way_out}, or leave the callback out")
        self._leave()
        wrapped = ddp_within(self.trainer.model_wrapped)
        if args.process_index == 0:
            self._warn(args, wrapped)
        scaler = self.trainer.accelerator.scaler
        self.wire = attach_within(wrapped, self.method, self.trainer.optimizer, scaler, self.options)
        self._attached, self._began = True, state
        if state.global_step > 0:
            per_rank_files.load(self.wire, self._resumed_from(args, state), self.on_world_change, self.strict)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self.wire is not None and self._attached:
            per_rank_files.save(self.wire, _folder(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        self._began = None
        self._leave()

    def _leave(self) -> None:
        if self.wire is not None and self._attached:
            self._attached = False
            self.wire.detach()

    def _warn(self, args: TrainingArguments, wrapped: Any) -> None:
        if args.ddp_find_unused_parameters is None and getattr(wrapped, "find_unused_parameters", False):
            warnings.warn(
                "the Trainer sets find_unused_parameters=True, with which DDP walks the graph at every step and never "
                "orders its buckets as gradients come; if the model uses all of its parameters, set "
                "TrainingArguments(ddp_find_unused_parameters=False)",
                stacklevel=2,
            )
        if args.max_grad_norm:
            warn_of_clipping(self.method, f"max_grad_norm={args.max_grad_norm}", "max_grad_norm=0")

    def _resumed_from(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Find the checkpoint that the Trainer has loaded; the Trainer does not expose its path."""
        if self.resume_from is not None:
            return Path(self.resume_from)
        folder = _folder(args, state)
        written = folder / "trainer_state.json"
        if not written.exists() or TrainerState.load_from_json(str(written)).log_history != state.log_history:
            raise ThinwireError(
                f"training resumes at step {state.global_step}, and not from {folder}; say from where: "
                "Compression(resume_from=), the same as train(resume_from_checkpoint=)"
            )
        return folder


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(cast(str, args.output_dir)) / f"checkpoint-{state.global_step}"
