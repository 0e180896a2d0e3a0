"""Local updates of N workers in one process: each has its own parameters, optimizer state and buffers."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from thinwire.comm.collectives import InFlight
from thinwire.engines.outer.local_rounds import LocalRounds
from thinwire.engines.outer.outer_engine import check_local
from thinwire.engines.outer.replica import Replica, floating, sketching
from thinwire.session.optimizers import Optimizers, each_of


class SimulatedReplica(Replica):
    """One of N workers; its tensors are in the model and the optimizer while it steps.

    Args:
        model: shared by all workers.
        live, optimizer: as for ``Replica``.
    """

    def __init__(self, model: nn.Module, live: Sequence[Tensor], optimizer: Optimizers) -> None:
        self._all_buffers = [buffer.clone() for buffer in model.buffers()]
        super().__init__(live, optimizer, floating(self._all_buffers))
        self._params = [param.detach().clone() for param in live]
        self._model = model
        self._states: list[Any] = [defaultdict(dict) for _ in each_of(optimizer)]
        self._counts: list[dict[str, Any]] = [
            {key: value for key, value in group.items() if type(value) is int} for group in optimizer.param_groups
        ]
        """What the optimizer itself changes in its groups, such as a number of steps."""
        self.grads: list[Tensor | None] = []

    @property
    def params(self) -> list[Tensor]:
        return self._params

    def states(self) -> list[Mapping[str, Any]]:
        found = {id(param): state for each in self._states for param, state in each.items()}
        return [found.get(id(param), {}) for param in self.live]

    def _forget(self, param: Tensor) -> None:
        for state in self._states:
            state.pop(param, None)

    def enter(self) -> None:
        """Put this worker's tensors into the model and the optimizer."""
        for param, held in zip(self.live, self._params, strict=True):
            param.data = held
        for buffer, held in zip(self._model.buffers(), self._all_buffers, strict=True):
            buffer.copy_(held)
        for one, state in zip(each_of(self.optimizer), self._states, strict=True):
            one.state = state
        for group, counts in zip(self.optimizer.param_groups, self._counts, strict=True):
            group.update(counts)

    def step(self) -> None:
        """Step the optimizer with this worker's gradients."""
        self.optimizer.step()
        for group, counts in zip(self.optimizer.param_groups, self._counts, strict=True):
            counts |= {key: group[key] for key in counts}

    def leave(self) -> None:
        """Keep the buffers; parameters and state were stepped in place."""
        for buffer, held in zip(self._model.buffers(), self._all_buffers, strict=True):
            held.copy_(buffer)


class LocalSteps:
    """The inner steps of N workers, whose rounds these are."""

    def __init__(self, rounds: LocalRounds, replicas: Sequence[SimulatedReplica]) -> None:
        self.rounds, self.replicas = rounds, replicas
        rounds.session.fits = lambda method: check_local(method, len(rounds.session.units), rounds)

    def step(self, loss: Callable[[int], Tensor]) -> float:
        """Make one inner step of all workers and return the mean loss."""
        total, summed = 0.0, list[InFlight]()
        for rank, replica in enumerate(self.replicas):
            replica.enter()
            for param in replica.live:
                param.grad = None
            value = loss(rank)
            value.backward()  # pyright: ignore[reportUnknownMemberType]
            total += value.item()
            if due := sketching(replica.optimizer):  # all sketches are summed before any worker steps
                summed = [self.rounds.peers[rank].all_reduce(one.sketch()) for one in due]
                replica.grads = [param.grad for param in replica.live]
            else:
                replica.step()
            replica.leave()
        for replica in self.replicas if summed else ():
            replica.enter()
            for param, grad in zip(replica.live, replica.grads, strict=True):
                param.grad = grad
            for one, arrived in zip(sketching(replica.optimizer), summed, strict=True):
                one.take(arrived.answer(), len(self.replicas))
            replica.step()
            replica.leave()
        self.rounds.stepped()
        self.replicas[0].enter()
        return total / len(self.replicas)
