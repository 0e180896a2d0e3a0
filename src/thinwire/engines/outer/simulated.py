"""Local updates of N workers in one process: each has its own parameters, optimizer state and buffers."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from thinwire.engines.outer.engine import check_local
from thinwire.engines.outer.replica import Replica, floating
from thinwire.engines.outer.rounds import LocalRounds
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

    @property
    def params(self) -> list[Tensor]:
        return self._params

    def states(self) -> list[Mapping[str, Any]]:
        found = {id(param): state for each in self._states for param, state in each.items()}
        return [found.get(id(param), {}) for param in self.live]

    def enter(self) -> None:
        """Put this worker's tensors into the model and the optimizer."""
        for param, held in zip(self.live, self._params, strict=True):
            param.data = held
        for buffer, held in zip(self._model.buffers(), self._all_buffers, strict=True):
            buffer.copy_(held)
        for one, state in zip(each_of(self.optimizer), self._states, strict=True):
            one.state = state

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
        total = 0.0
        for rank, replica in enumerate(self.replicas):
            replica.enter()
            for param in replica.live:
                param.grad = None
            value = loss(rank)
            value.backward()  # pyright: ignore[reportUnknownMemberType]
            total += value.item()
            replica.optimizer.step()
            replica.leave()
        self.rounds.stepped()
        self.replicas[0].enter()
        return total / len(self.replicas)
