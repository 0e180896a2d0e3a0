"""MeZO's step: two forward passes at ``theta +- eps z``, one scalar between the ranks, and ``z`` made again."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from thinwire._version import __version__
from thinwire.comm.collectives import TIMEOUT
from thinwire.comm.control import Together
from thinwire.comm.link import wire_bytes
from thinwire.core import checks
from thinwire.core.errors import ThinwireError
from thinwire.engines.zeroth.directions import Resident, Update, trained
from thinwire.engines.zeroth.offload import Node, Offload
from thinwire.engines.zeroth.replay_file import History, save
from thinwire.engines.zeroth.scalars import ScalarExchange, layout_of
from thinwire.engines.zeroth.zeroth_checks import (
    check_ranks,
    check_statistics,
    device_of,
    keeps_statistics,
    model_of,
    number,
)
from thinwire.kernels.normal import normals
from thinwire.report.ledger import Ledger, StepRow, Stopwatch
from thinwire.session.migrate import agree
from thinwire.session.replicas import EVERY, Replicas
from thinwire.session.transaction import Transaction

CALL = ("ZerothOrder()", "it is made by all ranks, alike")
WAY_OUT = "Restart from the last checkpoint"
RATE = checks.real(0.0, hint=", e.g. 1e-6 for all parameters of a language model, 1e-4 for LoRA")
DECAY = checks.real(0.0, hint=", e.g. 0.0")
OPTIONS: dict[str, checks.Check] = {
    "eps": checks.real(0.0, above=True, hint=", e.g. 1e-3"),
    "seed": checks.whole(0, 2**63 - 1, hint=", equal on all ranks"),
    "directions": checks.one_of("shared", "own"),
    "timeout": checks.seconds,
    "check_every": checks.whole(0),
}


class ZerothOrder:
    """Train without gradients: MeZO's step, with one scalar between the ranks. A collective call.

    For a direction ``z ~ N(0, I)`` that a counter makes of (seed, step, parameter, element), on each device the same::

        g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
        theta <- (1 - lr weight_decay) theta - lr g z

    Parameters are perturbed into scratch memory, never in place, so they do not drift, and replicas stay bit-equal.

    Args:
        model: the model, without a wrapper; parameters that require a gradient are trained (all, or LoRA's).
        lr: learning rate; may be set anew between two steps (``zo.lr``), on all ranks alike.
        eps: distance of the two passes from ``theta``.
        weight_decay: of parameters with two dimensions or more.
        seed: seed of the directions; equal on all ranks.
        process_group: the ranks that train the model, each on a shard of the batch of its own (DDP-ZO). The gradient
            is that of the mean of their losses.
        mesh: instead, a ``DeviceMesh`` of the dimensions ``("pert",)`` or ``("pert", "data")``; ``pert`` is 2. The two
            ranks of a shard make one pass each (PertP), on the same batch.
        directions: "shared" is one direction a step. "own" is one for each rank of ``process_group``, of which the
            mean is taken: less variance, but every rank makes all of them.
        blocks: modules of the model that run one after the other, e.g. ``model.transformer.h``. Their parameters are
            kept in CPU memory and are on ``device`` only while they compute; between steps they lack the last
            update until ``flush()``. The rest of the model is moved to ``device``.
        device: (with ``blocks``) where the model computes, e.g. ``"cuda"``.
        node: (with ``blocks``) the ranks of one node. Each keeps a slice of the blocks' parameters in CPU memory, and
            they gather them block by block.
        timeout: seconds, or a ``timedelta``, after which an exchange that a rank does not join is an error.
        check_every: the ranks compare hashes of their parameters at first and after so many steps; 0: at first only.

    Raises:
        ThinwireError: an argument is out of range, or the ranks differ in one of them or in their parameters.

    **Wire**: 4 bytes a step and rank in one all-reduce, for any model; with ``directions="own"`` an all-gather of 12.

    Example::

        zo = thinwire.ZerothOrder(model, lr=1e-6, process_group=dist.group.WORLD)
        for batch in batches:
            loss = zo.step(lambda: loss_of(model, batch))
        zo.save_replay("tuned.zo")  # kilobytes; thinwire.zeroth.replay(base_model, "tuned.zo") rebuilds the model

    Source: S. Malladi et al., "Fine-tuning language models with just forward passes", NeurIPS 2023, arXiv 2305.17333,
    algorithm 1; DDP-ZO and PertP: L. Wang et al., "DistZO2", 2025, arXiv 2507.03211.

    Departures: scratch memory instead of three changes in place, which lose bits; the sum of signed losses is
    exchanged, and divided after; the direction is a function of a counter, not of a generator's state.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        directions: str = "shared",
        blocks: Sequence[nn.Module] | None = None,
        device: torch.device | str | None = None,
        node: dist.ProcessGroup | None = None,
        timeout: float | timedelta = TIMEOUT,
        check_every: int = EVERY,
    ) -> None:
        wait = checks.seconds("timeout", timeout)
        check_ranks(process_group, mesh)
        self.layout = layout_of(process_group, mesh, wait)
        self.collective = self.layout.collective
        with Together(self.collective, *CALL) as together:
            with together.alone():
                given = {"eps": eps, "seed": seed, "directions": directions, "check_every": check_every}
                options = {name: OPTIONS[name](name, value) for name, value in given.items()}
                self.lr, self.weight_decay = lr, weight_decay
                self.eps: float = options["eps"]
                self.seed: int = options["seed"]
                self.directions: str = options["directions"]
                self.parts = trained(model_of(model, process_group is not None or mesh is not None))
                if self.directions == "own" and len(self.layout.signs) == 1:
                    raise ThinwireError(
                        'directions="own" needs both passes on each rank, and with mesh= a rank makes one; pass '
                        'process_group= instead, or leave directions="shared"'
                    )
                self.place = device_of(self.parts[0].param, blocks, device, node)
                where = Node(self.place, node, wait)
                self._watched = [one for one in model.modules() if keeps_statistics(one)]
                self._numel = sum(one.param.numel() for one in self.parts)
                self.history = History.of(self.parts, self.seed)
            said = {
                "thinwire": __version__, "lr": self.lr, "weight_decay": self.weight_decay, **options,
                "ranks": self.layout.describe(), "blocks": 0 if blocks is None else len(blocks),
                "ranks of a node": where.world,
            }  # fmt: skip
            lines = [*((key, str(value)) for key, value in said.items()), *(one.describe() for one in self.parts)]
            agree(self.collective.everyone, lines)
            named = [(one.name, one.param) for one in self.parts]
            self._replicas = Replicas(named, self.collective.everyone, every=options["check_every"])
            self._replicas.begin()
            with together.alone():
                self.offload = None if blocks is None else Offload(model, list(blocks), self.parts, self.seed, where)
        self._resident = Resident(self.parts if self.offload is None else self.offload.resident, self.seed)
        self._exchange = ScalarExchange(self.layout, self.eps, self.place, wait)
        link = self.collective.label if self.collective.world > 1 else "no network"
        self.ledger = Ledger("zeroth order", self.collective.world, link)
        self._transaction = Transaction(self.ledger)
        self.ledger.kernels = normals(self.place.type).name
        self._detached = False
        self.attempts = 0
        """Steps that were begun; a direction's number follows from it."""

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr: float = RATE("lr", value)

    @property
    def weight_decay(self) -> float:
        """The weight decay."""
        return self._decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._decay: float = DECAY("weight_decay", value)

    @property
    def steps(self) -> int:
        """Number of updates."""
        return len(self.history.updates)

    def step(self, closure: Callable[[], Tensor | float]) -> float:
        """Make one step. A collective call.

        Args:
            closure: computes the loss of this rank's batch; it is called twice (with PertP once), without gradients
                and with the same random numbers, so that dropout draws alike.

        Returns:
            The mean loss of this rank's passes. If it is nonfinite on any rank, all ranks leave the parameters as they
            are, and the ledger counts a skipped step.

        Raises:
            ThinwireError: the closure returns no number, a rank did not join or raised an error, or replicas differ.
        """
        checks.called("closure", closure, "pass a function that computes the loss: step(lambda: loss_of(model, batch))")
        if self._detached:
            raise ThinwireError("this ZerothOrder was detached from its model; make a new one to train on")
        check_statistics(self._watched)
        row = StepRow(self.attempts, "zeroth order")
        before, within = self.collective.sent, 0.0 if self.offload is None else self.offload.node.sent
        with Together(self.collective, f"step {self.attempts}", WAY_OUT):
            if self._replicas.due():
                self.flush()
                self._replicas.check(self.attempts, self._transaction)
            direction, own = self.attempts, self.directions == "own"
            if own:
                direction = self.attempts * self.collective.world + self.collective.rank
            losses = [self._loss(closure, sign, direction) for sign in self.layout.signs]
            with Stopwatch(row, "exchange_seconds"):
                if own:
                    pairs = self._exchange.pairs(direction, losses)
                else:
                    pairs = ((direction, self._exchange.projected(losses)),)
        with Stopwatch(row, "receive_seconds"):
            self._finish(Update(self.lr, self.weight_decay, pairs))
        self.attempts += 1
        row.wire_bytes = self.collective.sent - before
        row.within_node_bytes = 0.0 if self.offload is None else self.offload.node.sent - within
        row.dense_bytes = wire_bytes("all_reduce", 4 * self._numel, self.collective.world)
        self.ledger.add(row)
        return sum(losses) / len(losses)

    def _finish(self, update: Update) -> None:
        if not all(abs(scalar) < float("inf") for _, scalar in update.pairs):  # False for NaN too
            self.ledger.skipped += 1
            return
        self._resident.update(update)
        if self.offload is not None:
            self.offload.update(update)
        self.history.updates.append(update)

    def _loss(self, closure: Callable[[], Tensor | float], sign: float, direction: int) -> float:
        """Return the loss at ``theta + sign eps z``."""
        # both passes, and both ranks of a shard, draw alike; shards do not
        seed = crc32(f"{self.seed}/{self.attempts}/{self.layout.shard}".encode())
        devices = [self.place] if self.place.type == "cuda" else []
        aim = (sign * self.eps, direction)
        self._resident.enter(*aim)
        if self.offload is not None:
            self.offload.aim = aim
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                return number(closure())
        finally:
            self._resident.leave()
            if self.offload is not None:
                self.offload.aim = None

    def flush(self) -> None:
        """Complete the model's parameters: apply the last update to offloaded blocks.

        Without ``blocks`` it does nothing. With ``node=`` it is a collective call of the node.
        """
        if self.offload is not None and not self._detached:
            self.offload.flush()

    def detach(self) -> None:
        """Flush, and let go of the model; its blocks stay in CPU memory. No step can be made afterwards."""
        if self.offload is not None:
            self.offload.close()
        self._detached = True

    def report(self) -> str:
        """Return the ledger as a table."""
        return self.ledger.markdown()

    def save_replay(self, path: str | Path) -> None:
        """Write the directions and scalars of all steps: 12 bytes for each, and the names of the parameters.

        ``thinwire.zeroth.replay`` rebuilds the model of them and the parameters that the training began with.

        Raises:
            ThinwireError: the file can't be written.
        """
        save(path, self.history)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, beside the model's own parameters, after a flush: equal on all ranks."""
        self.flush()
        data = torch.frombuffer(bytearray(self.history.encode()), dtype=torch.uint8)
        return {"version": 1, "attempts": self.attempts, "history": data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; load the model's parameters before the ``ZerothOrder`` is made. A collective call.

        Raises:
            ThinwireError: it is no state, it has another seed or other parameters, or the ranks load different ones.
        """
        with Together(self.collective, "load_state_dict()", WAY_OUT) as together:
            with together.alone():
                if {"version", "attempts", "history"} - set(state):
                    raise ThinwireError(
                        f"the state has the keys {sorted(state)}; pass what ZerothOrder.state_dict() returned"
                    )
                data = cast(Tensor, state["history"]).cpu().numpy().tobytes()
                history, attempts = History.decode(data), int(state["attempts"])
                for name, its, mine in (
                    ("seed", history.seed, self.seed),
                    ("parameters", history.tensors, self.history.tensors),
                ):
                    if its != mine:
                        raise ThinwireError(
                            f"the state has {name} {checks.shown(its)}, and this run {checks.shown(mine)}; "
                            "make ZerothOrder with the same"
                        )
            agree(self.collective.everyone, [("state", f"{crc32(data):08x} after {attempts} steps")])
            self.history, self.attempts = history, attempts
