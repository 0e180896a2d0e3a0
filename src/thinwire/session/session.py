"""The session that ``attach`` returns: the step clock, the units and their state, the ledger, and method changes.

A session does not know where gradients come from; engines and the simulator drive it.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.collectives import TIMEOUT, Collective
from thinwire.comm.control import ATTACH, Together
from thinwire.comm.link_speed import measure
from thinwire.comm.simulated import Local
from thinwire.comm.texts import heard
from thinwire.core.ambient import undisturbed_methods
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor
from thinwire.core.loops import Kernels
from thinwire.core.tensors import norm
from thinwire.exchange.buckets import Bucket
from thinwire.exchange.fused import warm_up_kernels
from thinwire.exchange.stages import Stages
from thinwire.exchange.units import TURN_BYTES, Unit, all_dense, resolve
from thinwire.exchange.workers import PROBE_EVERY, Probe, Worker, has_pending, pending_residuals
from thinwire.methods.given import method_of
from thinwire.methods.method import Method, Rule
from thinwire.report.ledger import Ledger, StepRow
from thinwire.session import checkpoint
from thinwire.session.copies import OfThisRun
from thinwire.session.detached import changing, leave_behind
from thinwire.session.migrate import agree, describe, migrate_all, restore_alike
from thinwire.session.momentum_transfer import MomentumTransfer, log, remembering, warn_once
from thinwire.session.optimizers import Optimizers, check_optimizer, holders, release_optimizer
from thinwire.session.relayout import follow
from thinwire.session.replicas import Replicas
from thinwire.session.stepping import Stepping
from thinwire.session.transaction import OnNonfinite, Policy, Scaler, Transaction


@undisturbed_methods
class Session(OfThisRun):
    """One attached model.

    Args:
        named: the parameters that require a gradient, in the model's order.
        method: compresses their gradients.
        collective: the ranks that exchange them.
        optimizer: needed by methods with stateful memories; with other methods it lets the session notice gradients
            that are exchanged twice before a step. Several optimizers are passed as one ``Several``.
        seed: of all randomness, with the step, the unit and the rank.
        workers: the ranks that live in this process: one, or all of a simulation.
        scaler, on_nonfinite, timeout, policy: see ``thinwire.attach``.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        method: Method,
        collective: Collective,
        optimizer: Optimizers | None,
        seed: int = 0,
        workers: Sequence[Worker] | None = None,
        scaler: Scaler | None = None,
        on_nonfinite: OnNonfinite = "skip",
        timeout: float = TIMEOUT,
        policy: Policy | None = None,
        commits: bool = False,
    ) -> None:
        self.named, self.collective, self.optimizer, self.seed = list(named), collective, optimizer, seed
        self.workers = list(workers or [Worker(collective.rank, seed)])
        self.ledger = Ledger(method.name, collective.world, collective.label)
        self.stages = Stages(collective, self.ledger)
        self.transaction = Transaction(optimizer, self.ledger, on_nonfinite)
        self.step = self.turn = 0
        """The step of this rank, and the step that all ranks are assumed to be at, equal on all of them."""
        self.units: list[Unit] = []
        self.optional = False
        """True if a parameter may be unused on some ranks only, which only messages tell; the engine sets it."""
        self.replicas: Replicas | None = None
        """The check of replicated parameters, or None; the engine sets it."""
        self.scaler, self.timeout, self.policy, self.commits = scaler, timeout, policy, commits
        self.before_detach: Callable[[], None] = lambda: None
        self.fits: Callable[[Method], None] = lambda method: None
        """Raises an error if a method can't be used with this model; the engine sets it."""
        self.no_sync: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """For a model without a wrapper: gradients of backward passes in ``with wire.no_sync():`` add up, unsent."""
        self.loss_scale, self.stepping = 1.0, Stepping(self, optimizer, scaler)
        self.optimizer_link = self.stepping.optimizer_link
        self.on_commit: list[Callable[[], None]] = []  # when a step is final, an engine commits its own state
        self.cleanup = contextlib.ExitStack()
        """Callbacks of detach(); engines add to it."""
        self.row = StepRow(0, method.name)
        try:
            with Together(self.collective, *ATTACH) as together:
                self._install(method, together)
        except BaseException:
            self._give_back(Local.of(1)[0])
            raise
        self.stepping.start(self.cleanup)

    # -- the method ------------------------------------------------------------------------------------------------

    def _prepare(self, method: Method) -> tuple[list[Unit], MomentumTransfer | None]:
        """Do everything about a method change that can fail, before anything is changed."""
        self.fits(method)
        if self.transaction.pending and not self.transaction.failed:
            raise ThinwireError(
                "the gradients of the last backward are waiting for optimizer.step(); call it, then change"
            )
        if any(rule.memory.stateful for rule in method.rules) and not self.commits:
            check_optimizer(self.optimizer, self.named, self, method.name)
        holders(self.optimizer, self.named)
        transfer = self.stepping.prepare(method)
        settings = self.optimizer_link.agree(method, self.named) | (transfer.settings if transfer else {})
        return resolve(self.named, method, settings, self.seed), transfer

    def _together(self, what: str) -> Together:
        return Together(self.collective, f"step {self.step}: {what}")

    def _install(self, method: Method | Compressor | Rule, together: Together) -> None:
        with together.alone():
            method = method_of(method)
            units, transfer = self._prepare(method)
            rest = {
                "seed": self.seed,
                "step": self.step,
                "optimizer": self.optimizer_link.rule(),
                "link": self.collective.link,
            }
            described = describe(method, units, rest | {"link": self.collective.link})
            warm_up_kernels(units, self.workers[0].kernels)
        agree(self.collective.everyone, described)
        with changing(self, together.what):
            self.transaction.void()
            self.stepping.leave(transfer)
            migrate_all(self.units, units, self.workers, self.collective, self.timeout)
            if said := self.stepping.enter(transfer, units, method):
                self._say(said)
            self.method, self.units = method, units
            self._take_link()
            with together.alone():
                self.optimizer_link.hold(True, units)
                self._installed_at, self._density = self.step, -1.0
                self.transaction.clock.all_at(self.step)
                self._set_headers()
                self._set_stage()

    def _take_link(self) -> None:
        """Set the link that routes are chosen for: emulated, or measured for ``route="auto"``. A collective call."""
        self._link = link = self.collective.link
        if self.method.route == "auto":
            self._link = link or measure(self.collective, self.timeout, self.units[0].param.device)
            self.ledger.note(f"routes are chosen for a link of {self._link} ({'given' if link else 'measured'})")
        self.turn_bytes = TURN_BYTES if self._link is None else self._link.latency * self._link.bandwidth / 8

    def _stage(self, step: int) -> float | None:
        """Return the density of that step; None for the method's own."""
        asked = self.optimizer_link.density(step - self.step)
        warmup = self.method.warmup if asked is None else None
        return warmup.density(max(0, step - self._installed_at)) if warmup else asked

    def _check_clocks(self) -> None:
        """Compare all ranks' steps if they may be at different stages, whose messages differ in size.

        Raises:
            ThinwireError: ranks are at different steps.
        """
        if len({self._stage(step) for step in self.transaction.clock.possible()}) > 1:
            self.transaction.compare(self._steps("a stage of the warm-up"), self.step)

    def _steps(self, what: str = "a comparison of steps") -> list[int]:
        with self._together(what):
            return heard(self.collective.everyone.exchange_text(str(self.step)), int, "step")

    def _set_stage(self) -> None:
        density = self._stage(self.step)
        if self.optimizer_link.keep(density, self.units) or density != self._density:
            self._density = density
            self.stages.begin(self.units, self.method, density, self._link, self.turn_bytes)
            if (idle := all_dense(self.units, self.method, density)) is not None:
                self._say(idle)

    def set_method(self, method: Method | Compressor | Rule) -> None:
        """Change the method between two steps, on all ranks at once. A collective call.

        State that both methods have is kept. A residual that the new method has no slot for is sent with the next
        step. Momentum moves from the optimizer to the memory, or back, as the new method requires.

        Raises:
            ThinwireError: ranks pass different methods, or this one does not fit the optimizer; nothing has changed.
        """
        before = self.method
        with self._together("set_method()") as together:
            self._install(method, together)
        self.ledger.method = self.method.name
        self.ledger.note(f"step {self.step}: method changed from {before.name} to {self.method.name}")

    def detach(self) -> None:
        """Remove thinwire from the model, and give momentum and weight decay back to the optimizer. A collective call.

        Gradients that were not sent yet are discarded; the ledger notes their norm. All threads end.
        """
        self.before_detach()
        self._detach(self.collective)

    def abandon(self) -> None:
        """Detach without the other ranks: the optimizer gets this rank's own momentum, not averaged."""
        self._detach(Local.of(1)[0])

    def _detach(self, collective: Collective) -> None:
        self.transaction.void()
        try:
            with Together(collective, f"step {self.step}: detach()"):
                self._give_back(collective)
        finally:
            self._leave()

    def _give_back(self, collective: Collective) -> None:
        self.optimizer_link.hold(False, self.units)
        release_optimizer(self.optimizer, self)
        self.stepping.give_back(collective)

    def use_kernels(self, kernels: Kernels, note: str | None) -> None:
        """Name the kernels in the ledger, and close them at detach; ``note``: see ``choose``."""
        self.ledger.kernels = kernels.name
        self.cleanup.callback(kernels.close)
        if note is not None:
            self.ledger.note(note)
            warn_once(note)

    def _leave(self) -> None:
        if pending := pending_residuals(self.units, self.workers):
            self.ledger.note(
                f"step {self.step}: detached; discarded the gradient that was not sent yet (norm "
                f"{float(norm(pending)):.3g}). Normal at the end of training"
            )
        self.cleanup.close()
        self.collective.close()
        leave_behind(self)

    def _say(self, text: str) -> None:
        self.ledger.note(text)
        if self.collective.everyone.rank == 0:
            log.warning(text)  # Python shows warnings even if logging is not configured

    def undo(self) -> None:
        """Make the exchange that is not final void."""
        self.transaction.void()

    # -- the step --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check the optimizers before a step; engines call it before the forward pass, where an error does no harm.

        Raises:
            ThinwireError: the memory can't follow the optimizer's settings.
        """
        self.stepping.check()

    def follow(self, strides: Mapping[str, tuple[int, ...]]) -> None:
        """Follow parameters to a new memory layout; ``strides``: their old ones, by name. A collective call."""
        units = [unit for unit in self.units if unit.name in strides]
        agree(self.collective.everyone, [(f"unit {unit.name!r}", unit.describe()) for unit in units])
        follow(units, self.workers, strides, self.optimizer_link.moves)
        self.stages.buckets.clear()
        self.ledger.note(f"step {self.step}: {units[0].name} and {len(units) - 1} more lie otherwise in memory")

    def bucket(self, params: Sequence[Tensor]) -> Bucket:
        """Return the bucket of these parameters, planned once for each composition and warm-up stage."""
        return self.stages.bucket(params, self.turn)

    def begin_step(self) -> None:
        """Begin a step, before its first bucket. An earlier exchange that no optimizer step committed is void."""
        if self.transaction.begin() == 3:
            self._say("3 exchanges without a step of the attached optimizer: is it the one that steps?")
        if text := self.transaction.complaint():
            self._say(text)
        self.row = StepRow(self.step, self.method.name)
        self._sent_before = self.collective.sent, self.collective.sent_within_node
        self.loss_scale = self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else 1.0
        self.turn = self.transaction.clock.turn()
        self.collective.at(self.step)
        self._check_clocks()
        self._set_stage()
        self.stepping.begin()
        self.optimizer_link.begin(self._density, self.units, self.workers)
        self.workers[0].probe = Probe() if self.step % PROBE_EVERY == 0 else None

    def end_step(self, bad: bool | None = None) -> None:
        """End a step, after the last bucket has arrived; ``bad``: True if the engine's own state was nonfinite."""
        row = self.row
        row.wire_bytes = self.collective.sent - self._sent_before[0]
        row.within_node_bytes = self.collective.sent_within_node - self._sent_before[1]
        if (probe := self.workers[0].probe) is not None:
            row.error = probe.error
        self.ledger.add(row)
        if bad is not None or self.stages.reads:
            beside = partial(self.collective.any_across_shards, timeout=self.timeout)
            self.transaction.end(self.step, beside, bool(bad), self._steps, self.collective.apart())
        else:
            self.transaction.end_unread()
        if self.replicas is not None and self.replicas.due():
            with self._together("the check of replicas"):
                self.replicas.check(self.step, self.transaction.refuse)
        self.stepping.exchanged()
        if self.optimizer is None and not self.commits:
            self.commit(self.units)

    def commit(self, units: Sequence[Unit], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Commit the units that this optimizer has stepped; when all optimizers have, the session's step is final."""
        if not self.transaction.commit(units, self.workers, optimizer):
            return
        self.step += 1
        for call in self.on_commit:
            call()
        self.optimizer_link.tell(self.ledger, self.step)
        if self._has_pending and not has_pending(self.units, self.workers):
            self._set_headers()
        if self.policy is not None:
            with self._together("the policy"):
                self.policy.after_step(self)

    def expect_unused(self) -> None:
        """Allow from now on that a parameter is unused on some ranks only, which only messages tell."""
        self.optional = True
        self._set_headers()

    def _set_headers(self) -> None:
        self._has_pending = has_pending(self.units, self.workers)
        self.stages.set_headers(self.units, self.method, self.optional, self._has_pending)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the session's state as tensors, ints and strings; see ``thinwire.session.checkpoint`` for the format.

        With ``torch.distributed.checkpoint``, save the session with the model: ``dcp.save({"wire": wire, ...})``. With
        ``torch.save``, every rank writes its own file.
        """
        group = self.collective.checkpoint_group
        clock = {"world": group.world, "step": self.step, "installed_at": self._installed_at}
        worker = replace(self.workers[0], rank=group.rank)
        return checkpoint.save(self.units, worker, group.rows, clock, self.method.to_json(), group.shared)

    def load_state_dict(
        self,
        state: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        on_world_change: checkpoint.OnWorldChange = "error",
    ) -> None:
        """Continue from a checkpoint; if it is damaged or does not fit, nothing is changed.

        Args:
            state: the result of ``state_dict`` on this rank; or a list of all ranks' states, for another world size.
            on_world_change: if the world size differs from the saved one: ``"error"``; ``"fold"``, every rank gets the
                mean of the pending residuals, so that their mean stays the same; or ``"reset"`` discards them.

        Raises:
            ThinwireError: the checkpoint is damaged, of another model, rank or world size, or differs between ranks.
        """
        self._load(lambda: state, on_world_change)

    def _load(self, read: Callable[[], Any], on_world_change: checkpoint.OnWorldChange) -> None:
        group = self.collective.checkpoint_group
        with self._together("loading a checkpoint") as together, remembering(self.units) as adopted:
            restored = restore_alike(
                together,
                self.collective,
                lambda: checkpoint.restore(adopted(read()), self.units, group.rank, group.world, on_world_change),
            )
            with together.alone():
                self._put(restored)

    def _put(self, restored: checkpoint.Restored) -> None:
        self.transaction.void()
        self.step, self._installed_at = restored.step, restored.installed_at
        for unit in self.units:
            self.workers[0].local[unit.name].now = restored.local[unit.name]
            unit.shared.now = restored.shared[unit.name]
        self.stepping.restored()
        for note in restored.notes:
            self.ledger.note(note)
        self._set_headers()
        self.transaction.clock.all_at(self.step)
        self._density = -1.0
        self._set_stage()

    def load(self, folder: str | Path, key: str = "wire", on_world_change: checkpoint.OnWorldChange = "error") -> None:
        """Continue from a checkpoint of ``torch.distributed.checkpoint``, saved by any number of workers.

        Args:
            folder, key: the ``checkpoint_id`` of ``dcp.save``, and the session's key in it.
            on_world_change: as for ``load_state_dict``.

        Raises:
            ThinwireError: as ``load_state_dict``, or the folder can't be read.
        """
        self._load(partial(checkpoint.read_folder, folder, key), on_world_change)

    def report(self) -> str:
        """Return the ledger as a Markdown table."""
        return self.ledger.markdown()
