"""The session that ``attach`` returns: the step clock, the units and their state, the ledger, and method changes.

A session knows neither where gradients come from nor what makes a step final: engines and the simulator drive it, and
hand it the ``Rounds`` that call ``commit`` or ``undo``.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Never

from torch import Tensor

from thinwire.comm.collectives import TIMEOUT, Collective
from thinwire.comm.control import ATTACH, Together
from thinwire.comm.link_speed import measure
from thinwire.comm.simulated import Local
from thinwire.comm.texts import heard
from thinwire.core import Compressor, ThinwireError
from thinwire.core.ambient import undisturbed_methods
from thinwire.core.loops import Kernels
from thinwire.core.tensors import norm
from thinwire.exchange.buckets import Bucket
from thinwire.exchange.fused import warm_up_kernels
from thinwire.exchange.stages import Stages
from thinwire.exchange.units import Unit, resolve
from thinwire.exchange.workers import PROBE_EVERY, Probe, Worker, has_pending, pending_residuals
from thinwire.methods.given import method_of
from thinwire.methods.method import Method, Rule
from thinwire.report.ledger import Ledger, StepRow
from thinwire.session import checkpoint
from thinwire.session.checkpoint import OnWorldChange
from thinwire.session.detached import changing, leave_behind
from thinwire.session.migrate import agree, describe, follow, migrate
from thinwire.session.momentum_transfer import log, remembering, warn_once
from thinwire.session.optimizer_link import OptimizerLink
from thinwire.session.replicas import Replicas
from thinwire.session.rounds import Rounds
from thinwire.session.transaction import Policy, Transaction
from thinwire.session.untrusted import read_folder


@undisturbed_methods
class Session:
    """One attached model.

    Args:
        named: the parameters that require a gradient, in the model's order.
        method: compresses their gradients.
        collective: the ranks that exchange them.
        rounds: tells when a step is final. Methods with stateful memories need its optimizer; with other methods an
            optimizer lets the session notice gradients that are exchanged twice before a step.
        seed: of all randomness, with the step, the unit and the rank.
        workers: the ranks that live in this process: one, or all of a simulation.
        timeout, policy: see ``thinwire.attach``.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        method: Method,
        collective: Collective,
        rounds: Rounds,
        seed: int = 0,
        workers: Sequence[Worker] | None = None,
        timeout: float = TIMEOUT,
        policy: Policy | None = None,
    ) -> None:
        self.named, self.collective, self.rounds, self.seed = list(named), collective, rounds, seed
        self.optimizer, self.loss_scale = rounds.optimizer, 1.0
        self.workers = list(workers or [Worker(collective.rank, seed)])
        self.ledger = Ledger(method.name, collective.world, collective.label)
        self.stages = Stages(collective, self.ledger, self.workers)
        self.transaction = Transaction(self.ledger)
        self.optimizer_link = OptimizerLink(self, rounds.optimizer)
        self.step = self.turn = 0
        """The step of this rank, and the step that all ranks are assumed to be at, equal on all of them."""
        self.units: list[Unit] = []
        self.replicas: Replicas | None = None
        """The check of replicated parameters, or None; the engine sets it."""
        self.timeout, self.policy = timeout, policy
        self.fits: Callable[[Method], None] = lambda method: None
        """Raises an error if a method can't be used with this model; the engine sets it."""
        self.no_sync: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """For a model without a wrapper: gradients of backward passes in ``with wire.no_sync():`` add up, unsent."""
        self.on_commit: list[Callable[[], None]] = []  # when a step is final, an engine commits its own state
        self.cleanup = contextlib.ExitStack()
        """Callbacks of detach(); engines add to it."""
        self.row = StepRow(0, method.name)
        self.sent_before = 0.0, 0.0
        """The bytes sent, in all and within the node, before this step."""
        try:
            with Together(self.collective, *ATTACH) as together:
                self._install(method, together)
        except BaseException:
            self.optimizer_link.give_back(Local.of(1)[0])
            raise
        rounds.start(self, self.cleanup)
        self.optimizer_link.start(self.cleanup)

    # -- the method ------------------------------------------------------------------------------------------------

    def _together(self, what: str) -> Together:
        return Together(self.collective, f"step {self.step}: {what}")

    def _install(self, method: Method | Compressor | Rule, together: Together) -> None:
        with together.alone():
            method = method_of(method)
            self.fits(method)
            if self.transaction.pending and not self.transaction.failed:
                raise ThinwireError(
                    "the gradients of the last backward are waiting for optimizer.step(); call it, then change"
                )
            settings, transfer = self.optimizer_link.prepare(method)
            units = resolve(self.named, method, settings, self.seed)
            rule, link = self.optimizer_link.rule(), self.collective.link
            lines = describe(method, units, {"seed": self.seed, "step": self.step, "optimizer": rule, "link": link})
            warm_up_kernels(units, self.workers[0].kernels)
        agree(self.collective.everyone, lines)
        with changing(self, together.what):
            self.undo()
            self.optimizer_link.leave(transfer)
            before = {unit.name: unit for unit in self.units}
            for unit in units:
                migrate(before.get(unit.name), unit, self.workers, self.collective, self.timeout)
            if said := self.optimizer_link.enter(transfer, units, method):
                self.say(said)
            self.method, self.units = method, units
            if method.route == "auto":
                given, link = link, link or measure(self.collective, self.timeout, units[0].param.device)
                self.ledger.note(f"routes are chosen for a link of {link} ({'given' if given else 'measured'})")
            self.stages.install(units, method, link)
            with together.alone():
                self.optimizer_link.hold(True, units)
                self._installed_at = self.step
                self._resume()

    def _resume(self) -> None:
        """Set the clock, the headers and the stage to a step at which all ranks are."""
        self.stages.density = -1.0
        self.transaction.all_at(self.step)
        self.stages.set_headers()
        self._set_stage()

    def _stage(self, step: int) -> float | None:
        """Return the density of that step; None for the method's own."""
        asked = self.optimizer_link.density(step - self.step)
        warmup = self.method.warmup if asked is None else None
        return warmup.density(max(0, step - self._installed_at)) if warmup else asked

    def _steps(self, what: str = "a comparison of steps") -> list[int]:
        with self._together(what):
            return heard(self.collective.everyone.exchange_text(str(self.step)), int, "step")

    def _set_stage(self) -> None:
        density = self._stage(self.step)
        changed = self.optimizer_link.keep(density, self.units) or density != self.stages.density
        if changed and (idle := self.stages.begin(density)):
            self.say(idle)

    def set_method(self, method: Method | Compressor | Rule) -> None:
        """Change the method between two steps, on all ranks at once. A collective call.

        State that both methods have is kept. A residual that the new method has no slot for is sent with the next
        step. Momentum moves from the optimizer to the memory, or back, as the new method requires.

        Raises:
            ThinwireError: ranks pass different methods, or this one does not fit the optimizer; nothing has changed.
        """
        before = self.method
        with self._together("set_method()") as together:
            with together.alone():
                method = method_of(method)
            self.rounds.before_change(method)
            self._install(method, together)
        self.ledger.method = self.method.name
        self.ledger.note(f"step {self.step}: method changed from {before.name} to {self.method.name}")

    def detach(self) -> None:
        """Remove thinwire from the model, and give momentum and weight decay back to the optimizer. A collective call.

        Gradients that were not sent yet are discarded; the ledger notes their norm. All threads end.
        """
        self.rounds.end()
        self._detach(self.collective)

    def abandon(self) -> None:
        """Detach without the other ranks: the optimizer gets this rank's own momentum, not averaged."""
        self._detach(Local.of(1)[0])

    def _detach(self, collective: Collective) -> None:
        self.undo()
        try:
            with Together(collective, f"step {self.step}: detach()"):
                self.optimizer_link.give_back(collective)
        finally:
            if pending := pending_residuals(self.units, self.workers):
                self.ledger.note(
                    f"step {self.step}: detached; discarded the gradient that was not sent yet (norm "
                    f"{float(norm(pending)):.3g}). Normal at the end of training"
                )
            self.cleanup.close()
            self.collective.close()
            leave_behind(self)

    def use_kernels(self, kernels: Kernels, note: str | None) -> None:
        """Name the kernels in the ledger, and close them at detach; ``note``: see ``choose``."""
        self.ledger.kernels = kernels.name
        self.cleanup.callback(kernels.close)
        if note is not None:
            self.ledger.note(note)
            warn_once(note)

    def say(self, text: str) -> None:
        """Tell the user, in the ledger and on the first rank's log."""
        self.ledger.note(text)
        if self.collective.everyone.rank == 0:
            log.warning(text)  # Python shows warnings even if logging is not configured

    def regroup(self, collective: Collective) -> None:
        """Go on with other workers, all of them at this step; what was not final of the exchange is void."""
        self.undo()
        self.collective = self.stages.collective = collective
        self.workers[0].rank, self.ledger.world = collective.rank, collective.world
        if self.replicas is not None:
            self.replicas.channel = collective.everyone
        self._resume()

    # -- the step --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check the optimizers' settings; engines call it before the forward pass, where an error does no harm."""
        self.optimizer_link.check()

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
        if self.transaction.begin(partly=self.rounds.begin()) == 3:
            self.say("3 exchanges without a step of the attached optimizer: is it the one that steps?")
        if text := self.transaction.skips.warning(self.transaction.complaint):
            self.say(text)
        self.row = StepRow(self.step, self.method.name)
        self.sent_before = self.collective.sent, self.collective.sent_within_node
        self.loss_scale, self.turn = self.rounds.loss_scale, self.transaction.turn
        self.collective.at(self.step)
        if self._stage(self.transaction.confirmed) != self._stage(self.turn):  # message sizes of ranks might differ
            self.transaction.compare(self._steps("a stage of the warm-up"), self.step)
        self._set_stage()
        self.optimizer_link.begin(self.stages.density)
        self.workers[0].probe = Probe() if self.step % PROBE_EVERY == 0 else None

    def end_step(self, nonfinite: bool | None = None) -> None:
        """End a step, after its last bucket; ``nonfinite``: True if the engine's own state was nonfinite."""
        self.row.wire_bytes = self.collective.sent - self.sent_before[0]
        self.row.within_node_bytes = self.collective.sent_within_node - self.sent_before[1]
        if (probe := self.workers[0].probe) is not None:
            self.row.error = probe.error
        self.ledger.add(self.row)
        if nonfinite is not None or self.stages.reads:
            across_shards = partial(self.collective.any_across_shards, timeout=self.timeout)
            self.transaction.end(self.step, across_shards, bool(nonfinite), self._steps, self.collective.apart())
        else:
            self.transaction.end_unread()
        if self.replicas is not None and self.replicas.due():
            with self._together("the check of replicas"):
                self.replicas.check(self.step, self.transaction)
        self.rounds.exchanged()

    def commit(self, units: Sequence[Unit], last: bool = True) -> None:
        """Make the exchange final for these units; with the ``last`` of them, the session's step is."""
        self.transaction.commit(units, self.workers, last)
        if not last:
            return
        self.step += 1
        for call in self.on_commit:
            call()
        self.optimizer_link.tell()
        if self.stages.pending and not has_pending(self.units, self.workers):
            self.stages.set_headers()
        if self.policy is not None:
            with self._together("the policy"):
                self.policy.after_step(self)

    def undo(self) -> None:
        """Make the exchange that is not final void, as if it had never been."""
        if self.transaction.pending and self.transaction.failed:
            self.rounds.clear()
        self.transaction.pending = False

    def expect_unused(self) -> None:
        """Allow from now on that a parameter is unused on some ranks only, which only messages tell."""
        self.stages.optional = True
        self.stages.set_headers()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the session's state as tensors, ints and strings; see ``thinwire.session.checkpoint`` for the format.

        With ``torch.distributed.checkpoint``, save the session with the model: ``dcp.save({"wire": wire, ...})``. With
        ``torch.save``, every rank writes its own file.
        """
        group = self.collective.checkpoint_group
        clock = {"world": group.world, "step": self.step, "installed_at": self._installed_at}
        worker = replace(self.workers[0], rank=group.rank)
        round_state = self.rounds.state()
        return checkpoint.save(self.units, worker, group.rows, clock, self.method.to_json(), group.shared, round_state)

    def load_state_dict(
        self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]], on_world_change: OnWorldChange = "error"
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

    def _load(self, read: Callable[[], Any], on_world_change: OnWorldChange) -> None:
        group = self.collective.checkpoint_group
        with self._together("loading a checkpoint") as together, remembering(self.units) as adopted:
            with together.alone():
                restored = checkpoint.restore(adopted(read()), self.units, group.rank, group.world, on_world_change)
                self.rounds.fits(restored.round)
                clock, fingerprint = restored.clock(), restored.fingerprint()
            agree(self.collective.everyone, [("checkpoint", clock)])
            agree(self.collective, [("checkpoint", fingerprint)])
            with together.alone():
                self.undo()
                self.step, self._installed_at = restored.step, restored.installed_at
                for unit in self.units:
                    self.workers[0].local[unit.name].now = restored.local[unit.name]
                    unit.shared.now = restored.shared[unit.name]
                self.rounds.restore(restored.round)
                self.optimizer_link.restored()
                for note in restored.notes:
                    self.ledger.note(note)
                self._resume()

    def load(self, folder: str | Path, key: str = "wire", on_world_change: OnWorldChange = "error") -> None:
        """Continue from a checkpoint of ``torch.distributed.checkpoint``, saved by any number of workers.

        Args:
            folder, key: the ``checkpoint_id`` of ``dcp.save``, and the session's key in it.
            on_world_change: as for ``load_state_dict``.

        Raises:
            ThinwireError: as ``load_state_dict``, or the folder can't be read.
        """
        self._load(partial(read_folder, folder, key), on_world_change)

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise ThinwireError(
            "a session holds the process group and the hooks of this run, so it can be neither pickled nor copied; "
            'save wire.state_dict(): with torch.save({"wire": wire.state_dict()}, path), a file for each rank, or with '
            'torch.distributed.checkpoint.save({"wire": wire}), which asks for it itself'
        )

    def report(self) -> str:
        """Return the ledger as a Markdown table."""
        return self.ledger.markdown()
