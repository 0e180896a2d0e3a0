"""The rounds of local updates: when each fragment is exchanged, and when its outer step is made.

One exchange is in flight at a time. It is decoded where its outer step is due, or earlier, if a checkpoint is written:
the decoded mean then waits for its time, so a resumed run has the same bits.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.collectives import Collective
from thinwire.comm.texts import known_to_all
from thinwire.core.errors import ThinwireError
from thinwire.core.tensors import norm
from thinwire.engines.outer import flight
from thinwire.engines.outer.flight import Flight
from thinwire.engines.outer.outer_step import fragments_of, move
from thinwire.engines.outer.replica import Replica, averaged
from thinwire.exchange.units import Unit
from thinwire.methods.local_settings import Local
from thinwire.session.rounds import OnNonfinite, Rounds, RoundState
from thinwire.session.session import Session

NUMBERS = ("inner", "count", "exchanged_at", "lr", "moved")
"""The numbers of a round that are equal on all ranks."""


@dataclass
class Late:
    """Decoded updates of one fragment that wait for their outer step."""

    fragment: int
    due: int
    means: list[Tensor] = field(default_factory=list[Tensor])
    """One for each unit; empty if an update was not finite."""
    divisor: float = 1.0


class LocalRounds(Rounds):
    """Rounds that end with an outer step; the session's units are the anchors.

    Args:
        replicas: the workers of this process.
        peers: the collective of each; None for that of the session.
        on_nonfinite: see ``thinwire.attach``.
    """

    needs_optimizer = False
    session: Session

    def __init__(
        self,
        replicas: Sequence[Replica],
        peers: Sequence[Collective] | None = None,
        on_nonfinite: OnNonfinite = "skip",
    ) -> None:
        self.replicas, self.peers, self.on_nonfinite = replicas, peers or (), on_nonfinite
        self.inner = self.count = 0
        """The inner steps made, and the rounds begun; equal on all ranks between rounds."""
        self.momentum: dict[str, Tensor] = {}
        self.flight: Flight | None = None
        self.late: Late | None = None
        self.first = [0.0] * len(replicas)
        """The distance of each worker's first inner step in the round."""
        self.moved = 0.0
        """The distance of the anchor's last outer step."""

    def start(self, session: Session, cleanup: ExitStack) -> None:
        self.session, self.peers = session, self.peers or [session.collective]
        self.sent = session.collective.sent, session.collective.sent_within_node
        """The bytes sent by the end of the last exchange."""
        self.fragments = fragments_of([unit.name for unit in session.units], self.local.fragments)
        self.exchanged_at = [0] * len(self.fragments)
        """The inner step of each fragment's last exchange."""
        self.lr = [1.0] * len(session.units)
        """The inner learning rates at the start of the round."""
        session.ledger.note(f"buffers: {self.local.buffers}; only {session.method.name} moves the anchor")

    def begin(self) -> bool:
        return False

    def exchanged(self) -> None:
        pass

    def clear(self) -> None:
        pass

    @property
    def local(self) -> Local:
        """The settings, which ``set_method`` may change between rounds."""
        local = self.session.method.local
        assert local is not None
        return local

    @property
    def begins(self) -> bool:
        """True if no fragment is in the middle of a round."""
        return self.flight is None and self.late is None and all(at == self.inner for at in self.exchanged_at)

    # -- the clock -------------------------------------------------------------------------------------------------

    def due(self, fragment: int) -> bool:
        """Return True if the exchange of this fragment starts after the present inner step."""
        local = self.local
        if self.inner <= local.start:
            return True
        offset = -(-local.every * (fragment + 1) // local.fragments)
        since = self.inner - local.start - offset + local.steps_late
        return since >= 0 and since % local.every == 0

    @torch.no_grad()
    def stepped(self) -> None:
        """Act on an inner step that all workers of this process have just made."""
        if self.inner == self.exchanged_at[0]:
            self._begin_round()
        self.inner += 1
        waiting = self.flight or self.late
        if waiting is not None and not self.local.late and waiting.due == self.inner:
            self.finish()
        for fragment in range(len(self.fragments)):
            if self.due(fragment):
                self._exchange(fragment)

    def _begin_round(self) -> None:
        if self.local.per_lr:
            self.lr = [rate or 1.0 for rate in self.replicas[0].learning_rates()]
        if self.local.penalty is not None:
            everything = range(len(self.session.units))
            self.first = [self._norm(self.deltas(replica, everything)) for replica in self.replicas]

    def _norm(self, tensors: Sequence[Tensor]) -> float:
        return float(self.session.collective.norm_across_shards(norm(tensors), self.session.timeout))

    @torch.no_grad()
    def end(self) -> None:
        """End the last round, which may be short, so that all workers hold the anchor. All ranks call it together."""
        self.finish()
        for fragment, at in enumerate(self.exchanged_at):
            if at < self.inner:
                self._exchange(fragment)
                self.finish()
        self._give(range(len(self.session.units)), 0.0)

    # -- the exchange ----------------------------------------------------------------------------------------------

    def deltas(self, replica: Replica, chosen: Sequence[int]) -> list[Tensor]:
        """Return ``anchor - parameters``; the anchor in the parameter's dtype, as the worker began with it."""
        pairs = [(self.session.units[i].own, replica.params[i]) for i in chosen]
        found = [anchor.to(param.dtype).to(anchor.dtype) - param for anchor, param in pairs]
        return [delta.div_(self.lr[i]) for delta, i in zip(found, chosen, strict=True)] if self.local.per_lr else found

    def _exchange(self, fragment: int) -> None:
        session, local, chosen = self.session, self.local, self.fragments[fragment]
        deltas = [self.deltas(replica, chosen) for replica in self.replicas]
        if local.late:
            self.finish(reset=False)
        session.begin_step()
        session.sent_before = self.sent  # with what an optimizer has sent since
        if fragment == 0:
            self._average()
        due = self.inner + (local.every if local.late else local.steps_late)
        steps, self.exchanged_at[fragment] = self.inner - self.exchanged_at[fragment], self.inner
        distances = None if local.penalty is None else self.first
        self.flight = flight.start(session, self.peers, fragment, due, chosen, deltas, steps, distances)
        if local.late:
            self._give(chosen, 0.0)
        elif due == self.inner or self.inner <= local.start:
            self.finish()

    def _average(self) -> None:
        """Average buffers and the optimizers' moments, if the method says so."""
        local, timeout = self.local, self.session.timeout
        self.count += 1
        if local.buffers == "average":
            averaged(self.peers, [replica.buffers for replica in self.replicas], timeout)
        if local.sync_moments is not None and self.count % local.sync_moments == 0:
            averaged(self.peers, [replica.moments() for replica in self.replicas], timeout)

    def land(self) -> None:
        """Wait for the exchange in flight, decode it, and commit the compressor's state. All ranks call it together."""
        session, sent = self.session, self.flight
        if sent is None:
            return
        means, first = flight.land(session, self.peers, sent)
        self.flight = None
        session.row.noise_scale = self.replicas[0].noise_scale()
        session.end_step()
        self.sent = session.collective.sent, session.collective.sent_within_node
        self.late = Late(sent.fragment, sent.due, means, self.local.divisor(self.moved, first))
        if session.transaction.failed or not all(bool(mean.isfinite().all()) for mean in means):
            self.late.means = []
            self._refuse()
        else:
            session.commit(sent.bucket.units)

    def _refuse(self) -> None:
        """Make the exchange of a nonfinite update void; all workers have received it."""
        session, complaint = self.session, f"inner step {self.inner}: the update of a worker is not finite"
        if not session.transaction.failed:  # dense messages have no header
            session.ledger.skipped += 1
            session.ledger.note(f"{complaint}; all workers begin again from the anchor")
        session.undo()
        if self.on_nonfinite == "raise":
            raise known_to_all(ThinwireError(f"{complaint}; the anchor is that of the round before"))

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state(self) -> RoundState:
        """Return the round's state; an exchange in flight is decoded first, and waits for its time."""
        self.land()
        [replica], units, late = self.replicas, self.session.units, self.late
        local = {unit.name: replica.state(i) for i, unit in enumerate(units)}
        shared = {unit.name: {"anchor": unit.own} for unit in units}
        for name, momentum in self.momentum.items():
            shared[name]["momentum"] = momentum
        for i, mean in zip(self.fragments[late.fragment], late.means, strict=True) if late and late.means else ():
            shared[units[i].name]["late"] = mean
        waiting = None if late is None else {"fragment": late.fragment, "due": late.due, "divisor": late.divisor}
        numbers = {key: getattr(self, key) for key in NUMBERS} | {"late": waiting}
        return RoundState(json.dumps(numbers), local, shared, self.first[0])

    @torch.no_grad()
    def restore(self, state: RoundState | None) -> None:
        [replica], units = self.replicas, self.session.units
        self.flight = self.late = None
        self.momentum.clear()
        if state is None:  # of a run that exchanged gradients
            self.inner, self.exchanged_at = 0, [0] * len(self.fragments)
            for unit, param in zip(units, replica.params, strict=True):
                unit.own.copy_(param)
            return
        try:
            numbers: dict[str, Any] = json.loads(state.numbers)
            for key in NUMBERS:
                setattr(self, key, numbers[key])
            waiting = numbers["late"]
        except (ValueError, KeyError, TypeError) as error:
            raise ThinwireError(f"the checkpoint's round can't be read: {error!r:.100}") from error
        if len(self.exchanged_at) != len(self.fragments):
            raise ThinwireError(
                f"the checkpoint has {len(self.exchanged_at)} fragments, and this run {len(self.fragments)}; load it "
                "with the same fragments="
            )
        self.first = [state.distance]
        for i, unit in enumerate(units):
            shared = state.shared[unit.name]
            unit.own.copy_(shared["anchor"])
            replica.restore(i, state.local[unit.name])
            if "momentum" in shared:
                self.momentum[unit.name] = shared["momentum"]
        if waiting is not None:
            chosen: list[int] = self.fragments[int(waiting["fragment"])]
            found = [state.shared[units[i].name].get("late") for i in chosen]
            means = [mean for mean in found if mean is not None]
            self.late = Late(waiting["fragment"], waiting["due"], means, waiting["divisor"])

    # -- the outer step --------------------------------------------------------------------------------------------

    def finish(self, reset: bool = True) -> None:
        """Make the outer step of the exchange in flight, if there is one. All ranks call it together.

        Args:
            reset: give the workers the new anchor.
        """
        self.land()
        late, self.late = self.late, None
        if late is None:
            return
        chosen, local = self.fragments[late.fragment], self.local
        if not late.means:
            self._begin_again(chosen)
            return
        moves: list[Tensor] = []
        for i, mean in zip(chosen, late.means, strict=True):
            unit = self.session.units[i]
            step = move(mean.div_(late.divisor) if late.divisor != 1.0 else mean, self._momentum(unit), local)
            unit.own.sub_(step, alpha=self.lr[i] if local.per_lr else 1.0)
            moves.append(step)
        if local.penalty is not None:
            self.moved = self._norm(moves)
        if reset:
            self._give(chosen, local.mix)

    def _momentum(self, unit: Unit) -> Tensor | None:
        if self.local.momentum == 0.0:
            return None
        if unit.name not in self.momentum:
            self.momentum[unit.name] = torch.zeros_like(unit.own)
        return self.momentum[unit.name]

    def _give(self, chosen: Sequence[int], mix: float) -> None:
        """Set the workers' parameters to the anchor, but for the share ``mix`` of their own."""
        for replica in self.replicas:
            for i in chosen:
                anchor = self.session.units[i].own
                if mix == 0.0:
                    replica.params[i].copy_(anchor)
                else:
                    replica.params[i].lerp_(anchor.to(replica.params[i].dtype), 1.0 - mix)

    def _begin_again(self, chosen: Sequence[int]) -> None:
        """Let all workers begin again from the anchor, with sound optimizers."""
        for worker, replica in zip(self.session.workers, self.replicas, strict=True):
            if cleared := replica.clear_nonfinite():
                what = f"cleared {cleared} nonfinite tensors of the optimizer of rank {worker.rank}"
                self.session.ledger.note(f"inner step {self.inner}: {what}")
        self._give(chosen, 0.0)
