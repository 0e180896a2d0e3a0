"""The simulator: N workers in one process, through the same ``send`` and ``receive`` as the real run.

One model stands for all replicas, since they are bit-equal. Workers differ only in their data and their local state.
So one machine shows, for instance, what compression would cost a model with 32 workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.comm.collectives import InFlight
from thinwire.comm.simulated import Local
from thinwire.core.checks import called, of_type, whole
from thinwire.core.interfaces import Compressor
from thinwire.core.sharding import own, wrapped
from thinwire.engines.names import check_some
from thinwire.engines.outer.local_rounds import LocalRounds
from thinwire.engines.outer.outer_engine import anchor_of, check_for_gradients
from thinwire.engines.outer.simulated_steps import LocalSteps, SimulatedReplica
from thinwire.engines.unchanged import Layouts
from thinwire.exchange import pipeline
from thinwire.exchange.workers import Worker
from thinwire.kernels.select import Choice, choose
from thinwire.methods.given import method_of
from thinwire.methods.method import Method, Rule
from thinwire.report.ledger import Ledger, Stopwatch
from thinwire.session.arguments import ORDER, check_held, options
from thinwire.session.clipping import clip
from thinwire.session.optimizers import Optimizers, Several, joined
from thinwire.session.rounds import OnNonfinite, OptimizerSteps, Rounds
from thinwire.session.session import Session
from thinwire.session.transaction import Policy


@dataclass(frozen=True)
class Simulation:
    """The result of a simulated training: the mean loss over workers of each step, and the ledger of one worker."""

    losses: list[float]
    ledger: Ledger


class SimulatedWorkers:
    """N workers that train one model; ``step`` is one optimizer step of all of them. Arguments as for ``simulate``."""

    def __init__(
        self,
        model: nn.Module,
        method: Method | Compressor | Rule,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        workers: int,
        seed: int = 0,
        kernels: Choice = "auto",
        policy: Policy | None = None,
        on_nonfinite: OnNonfinite = "skip",
    ) -> None:
        method, workers = method_of(method), whole(1)("workers", workers)
        asked = options(seed=seed, kernels=kernels, policy=policy, on_nonfinite=on_nonfinite)
        self.model = of_type(nn.Module, ORDER)("model", model)
        kinds = (torch.optim.Optimizer, Several)
        self.optimizer: Optimizers = of_type(kinds, "pass the one of the model")("optimizer", joined(optimizer))
        self.peers = Local.of(workers)
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        check_some(named)
        check_held(named, self.optimizer)
        chosen, note = choose(asked["kernels"], named[0][1].device)
        ranks = [Worker(rank, asked["seed"], kernels=chosen) for rank in range(workers)]
        live = [param for _, param in named]
        rounds: Rounds = OptimizerSteps(self.optimizer, None, on_nonfinite)
        replicas: list[SimulatedReplica] = []
        if method.local is not None:
            replicas = [SimulatedReplica(self.model, live, self.optimizer) for _ in self.peers]
            rounds = LocalRounds(replicas, self.peers, on_nonfinite)
            named = [(name, anchor_of(param)) for name, param in named]
        else:
            check_for_gradients(on_nonfinite, "error")
        self.session = Session(named, method, self.peers[0], rounds, asked["seed"], ranks, policy=policy)
        self.session.use_kernels(chosen, note)
        self.layouts = Layouts(dict(named), "simulate again")
        self.local = LocalSteps(rounds, replicas) if isinstance(rounds, LocalRounds) else None

    def step(self, loss: Callable[[int], Tensor]) -> float:
        """Make one optimizer step and return the mean loss; ``loss(worker)`` runs the model on that worker's batch."""
        if self.local is not None:
            return self.local.step(loss)
        session = self.session
        session.check()
        self.layouts.check(session)
        session.begin_step()
        total, inboxes = 0.0, list[list[InFlight]]()
        params = [unit.param for unit in session.units]
        before = kept = [buffer.clone() for buffer in self.model.buffers()]
        bucket = session.bucket(params)
        bucket.book(session.row, session.collective)
        reached = [False] * len(params)
        for worker, peer in zip(session.workers, self.peers, strict=True):
            if worker.rank == 1:  # all workers continue with the first worker's buffers, as in DDP
                kept = [buffer.clone() for buffer in self.model.buffers()]
            self._restore(before)
            for param in params:
                param.grad = None
            value = loss(worker.rank)
            value.backward()  # pyright: ignore[reportUnknownMemberType]
            total += value.item()
            grads = [torch.zeros_like(own(p)) if p.grad is None else own(p.grad.resolve_neg()) for p in params]
            if session.method.clip is not None:
                clip(grads, session.method.clip, peer.world)
            used = [p.grad is not None for p in params]
            reached = [before or now for before, now in zip(reached, used, strict=True)]
            with Stopwatch(session.row, "send_seconds"):
                outbox = pipeline.send(bucket, grads, worker, session.step, used, turn=session.turn)
            inboxes += pipeline.route([bucket], [outbox.messages], peer, session.turn)
        if len(self.peers) > 1:
            self._restore(kept)
        if bucket.relays:
            journeys = zip(session.workers, self.peers, inboxes, strict=True)
            inboxes = [pipeline.relay(bucket, inbox, worker, session.step, peer) for worker, peer, inbox in journeys]
        outs = [torch.empty_like(own(p)) for p in params]
        with Stopwatch(session.row, "receive_seconds"):
            kernels = session.workers[0].kernels
            session.transaction.statuses = pipeline.receive(
                bucket, inboxes[0], outs, session.seed, session.step, kernels=kernels, turn=session.turn
            )
        for param, out, used in zip(params, outs, reached, strict=True):
            param.grad = wrapped(out, param) if used else None  # as in DDP, no gradient if no worker used it
        session.end_step()
        self.optimizer.step()
        return total / len(self.peers)

    def _restore(self, buffers: Sequence[Tensor]) -> None:
        for buffer, value in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(value)


def simulate(
    model: nn.Module,
    method: Method | Compressor | Rule,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    batches: Callable[[int, int], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    workers: int,
    steps: int,
    seed: int = 0,
    kernels: Choice = "auto",
    policy: Policy | None = None,
    on_nonfinite: OnNonfinite = "skip",
    after_step: Callable[[int, float], object] | None = None,
) -> Simulation:
    """Train ``model`` as ``workers`` data-parallel workers would, in one process.

    The final parameters are those of a real run with the same number of processes, and threads in each: bit-equal if
    payloads are gathered; within float tolerance if an all-reduce over more than two ranks sums in its own order.

    Args:
        model: trained in place.
        method: compresses the gradients.
        optimizer: of the model's parameters, or several; it ends as after ``detach()``.
        batches: ``batches(worker, step)`` returns the batch of that worker at that step.
        loss: ``loss(model, batch)`` returns a scalar.
        workers: the number of workers, at least 1.
        steps: the number of optimizer steps.
        seed, kernels, policy, on_nonfinite: as for ``attach``.
        after_step: called with the step and the mean loss.

    Raises:
        ThinwireError: as ``attach``.

    Example:
        >>> model = torch.nn.Linear(64, 8)
        >>> result = simulate(model, dgc(0.05), optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        ...     batches=lambda worker, step: torch.randn(4, 64), loss=lambda model, batch: model(batch).square().mean(),
        ...     workers=8, steps=3)
        >>> result.ledger.ratio > 1
        True
    """
    steps = whole(0)("steps", steps)
    called("batches", batches, "pass a function of worker and step, batches(worker, step)")
    called("loss", loss, "pass a function of model and batch, loss(model, batch)")
    sim = SimulatedWorkers(model, method, optimizer, workers, seed, kernels, policy, on_nonfinite)
    losses: list[float] = []
    try:
        for step in range(steps):
            losses.append(sim.step(lambda worker, step=step: loss(model, batches(worker, step))))
            if after_step is not None:
                after_step(step, losses[-1])
    finally:
        sim.session.detach()
    return Simulation(losses, sim.session.ledger)
