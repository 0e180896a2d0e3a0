"""What ``attach`` returns: the step clock, the units and their state, the ledger, and change in mid-run.

A session knows nothing of where gradients come from; engines and the simulator drive it.
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire._version import __version__
from thinwire.core import State, ThinwireError, norm
from thinwire.exchange.collectives import Collective
from thinwire.exchange.routes import Bucket, plan_bucket
from thinwire.link import wire_bytes
from thinwire.optimizers import Handover, log
from thinwire.policy.plan import Method
from thinwire.report.ledger import Ledger, StepRow
from thinwire.units import Probe, Unit, Worker, resolve, set_stage

PROBE_EVERY = 100


class Session:
    """One attached model.

    Args:
        named: the parameters that require a gradient, in the model's order.
        method: how they are exchanged.
        collective: who exchanges them.
        optimizer: needed by methods that own the momentum; with any other it lets the session notice gradients that are
            exchanged twice before a step.
        seed: of all randomness, with the step, the unit and the rank.
        workers: the ranks that live in this process: one, or all of a simulation.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        method: Method,
        collective: Collective,
        optimizer: torch.optim.Optimizer | None,
        seed: int = 0,
        workers: Sequence[Worker] | None = None,
    ) -> None:
        self.named = list(named)
        self.collective = collective
        self.optimizer = optimizer
        self.seed = seed
        self.workers = list(workers or [Worker(collective.rank, seed)])
        self.ledger = Ledger(method.name, collective.world, collective.label)
        self.step = 0
        self.units: list[Unit] = []
        self.cleanup = contextlib.ExitStack()
        """What detach() undoes; engines add to it."""
        self._handover: Handover | None = None
        self.row = StepRow(0)
        self._install(method)

    # -- the method ------------------------------------------------------------------------------------------------

    def _prepare(self, method: Method) -> tuple[list[Unit], Handover | None]:
        """Everything about a method that can fail, before anything is changed."""
        handover = self._handover
        if not method.absorbs:
            handover = None
        elif handover is None:
            handover = Handover(self.optimizer, method.name, dict(self.named))
        return resolve(self.named, method, handover.settings if handover else {}), handover

    def _install(self, method: Method) -> None:
        try:
            units, handover = self._prepare(method)
        except ThinwireError as error:  # the other ranks must hear of it, or they would wait for ever
            self._agree([("error", str(error))])
            raise
        self._agree(self._describe(method, units))
        if self._handover is not None and handover is None:
            self._handover.give_back(self.units, self.workers, self.collective)
        before = {unit.name: unit for unit in self.units}
        for unit in units:
            if unit.name in before:
                unit.shared.update(_kept(before[unit.name].shared, unit.shared))
            for worker in self.workers:
                worker.local[unit.name] = _carry(worker.local.get(unit.name, {}), unit.fresh_state())
        if handover is not None and self._handover is None:
            self._say(handover.take(units, self.workers))
        self.method, self.units, self._handover = method, units, handover
        self.by_param = {id(unit.param): unit for unit in units}
        self._density: float | None = -1.0
        self._set_stage()

    def _set_stage(self) -> None:
        density = self.method.warmup.density(self.step) if self.method.warmup else None
        if density != self._density:
            self._density = density
            self._buckets: dict[tuple[int, ...], Bucket] = {}
            for note in set_stage(self.units, density, self.collective.world):
                self.ledger.note(note)

    def _describe(self, method: Method, units: Sequence[Unit]) -> list[tuple[str, str]]:
        described = [(f"unit {unit.name!r}", unit.describe()) for unit in units]
        rest = (("method", method.to_json()), ("seed", str(self.seed)), ("step", str(self.step)))
        return [("thinwire", __version__), *described, *rest]

    def _agree(self, lines: Sequence[tuple[str, str]]) -> None:
        """Compare the plan over the ranks, and name the first difference.

        Raises:
            ThinwireError: ranks ask for different things.
        """
        mine = hashlib.sha256(repr(lines).encode()).hexdigest()
        if len(set(self.collective.exchange_text(mine))) == 1:
            return
        ranks = [text.split("\n") for text in self.collective.exchange_text("\n".join(f"{k}: {v}" for k, v in lines))]
        for line in range(max(map(len, ranks))):
            said = [rank[line] if line < len(rank) else "nothing" for rank in ranks]
            if other := next((r for r in range(len(said)) if said[r] != said[0]), None):
                raise ThinwireError(
                    f"ranks differ: rank 0 has {said[0]}; rank {other} has {said[other]}; give all ranks the same"
                )

    def set_method(self, method: Method) -> None:
        """Change the method between two steps, on all ranks at once. A collective call.

        What both methods remember is kept. A residual that the new method has no place for is sent with the next
        step, and momentum goes back to the optimizer, or out of it.

        Raises:
            ThinwireError: ranks ask for different methods, or this one does not fit the optimizer; nothing has changed.
        """
        before = self.method
        self._install(method)
        self.ledger.method = method.name
        self.ledger.note(f"step {self.step}: method changed from {before.name} to {method.name}")

    def detach(self) -> None:
        """Leave the model as it was: momentum and weight decay are the optimizer's again. A collective call.

        What was not yet sent is dropped, and the ledger says how much. No thread stays behind.
        """
        if self._handover is not None:
            self._handover.give_back(self.units, self.workers, self.collective)
            self._handover = None
        pending = [
            state["residual"] for worker in self.workers for state in worker.local.values() if "residual" in state
        ]
        if pending:
            self.ledger.note(f"step {self.step}: detached; a residual of norm {float(norm(pending)):.3g} was dropped")
        self.cleanup.close()
        self.collective.close()

    def _say(self, text: str) -> None:
        self.ledger.note(text)
        if self.collective.rank == 0:
            log.log(logging.WARNING, text)  # the level that is shown where nobody has set logging up

    # -- the step --------------------------------------------------------------------------------------------------

    def bucket(self, params: Sequence[Tensor]) -> Bucket:
        """The bucket of these parameters, planned once for each composition and warm-up stage."""
        key = tuple(map(id, params))
        if key not in self._buckets:
            if unknown := [p for p in params if id(p) not in self.by_param]:
                raise ThinwireError(
                    f"a parameter of shape {tuple(unknown[0].shape)} arrived that was not in the model at attach; "
                    "parameters must not be replaced after wrapping (load_state_dict(assign=True) does it): "
                    "wrap and attach again"
                )
            self._buckets[key] = plan_bucket([self.by_param[i] for i in key], self.collective.world)
        return self._buckets[key]

    def begin_step(self) -> None:
        """Before the first bucket of a step."""
        self.row = StepRow(self.step)
        self._sent_before = self.collective.sent
        if self._handover is not None:
            self._handover.check_untouched()
        self._set_stage()
        for worker in self.workers:
            worker.probe = Probe() if self.step % PROBE_EVERY == 0 else None

    def count(self, bucket: Bucket) -> None:
        """Book one bucket; the total comes from the collective itself."""
        world, row = self.collective.world, self.row
        row.compressed_wire_bytes += bucket.wire_bytes(world)[1]
        for i, unit in enumerate(bucket.units):
            plain = wire_bytes("all_reduce", unit.param.numel() * 4, world)
            row.dense_bytes += plain
            row.compressed_dense_bytes += plain if i in bucket.lossy else 0.0

    def clock(self, field: str, row: StepRow | None = None) -> "Stopwatch":
        """Adds the seconds of a ``with`` block to a field of this step's row, or of another's."""
        return Stopwatch(row or self.row, field)

    def end_step(self) -> None:
        """After the last bucket of a step has been started."""
        row = self.row
        row.wire_bytes = self.collective.sent - self._sent_before
        if (probe := self.workers[0].probe) is not None:
            row.error = probe.error
        self.ledger.add(row)
        self.step += 1

    def report(self) -> str:
        """The ledger as a Markdown table."""
        return self.ledger.markdown()


class Stopwatch:
    """Wall-clock seconds of a ``with`` block, added to a row; on CUDA they are the seconds of the host."""

    def __init__(self, row: StepRow, field: str) -> None:
        self.row, self.field = row, field

    def __enter__(self) -> "Stopwatch":
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        setattr(self.row, self.field, getattr(self.row, self.field) + seconds)


def _kept(old: State, new: State) -> State:
    """The tensors of ``old`` that ``new`` has a place for."""
    return {key: old[key] for key in new if key in old and old[key].dtype == new[key].dtype}


def _carry(old: State, new: State) -> State:
    """The new local state with what is kept of the old; a homeless residual is carried to the next step."""
    carried = {"carried": old["residual"]} if "residual" in old and "residual" not in new else {}
    if "carried" in old:
        carried["carried"] = old["carried"]
    return {**new, **_kept(old, new), **carried}
