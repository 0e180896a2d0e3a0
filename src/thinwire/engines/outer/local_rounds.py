"""The rounds of local updates: when each fragment is exchanged, and when its outer step is made.

One exchange is in flight at a time. It is decoded where its outer step is due, or earlier, if a checkpoint is written:
the decoded mean then waits for its time, so a resumed run has the same bits.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from thinwire.comm.collectives import Collective, ControlChannel, NoAnswer, failed
from thinwire.comm.control import Together
from thinwire.comm.texts import known_to_all
from thinwire.core.errors import ThinwireError
from thinwire.core.tensors import all_finite, norm
from thinwire.engines.outer import flight
from thinwire.engines.outer.flight import Flight
from thinwire.engines.outer.lost_worker import ARRIVED, CHECKING, SENDING, Regroup, different_steps, go_on
from thinwire.engines.outer.outer_step import fragments_of, move
from thinwire.engines.outer.replica import Replica, averaged
from thinwire.engines.outer.round_state import Late, checked, restored, saved
from thinwire.engines.outer.schedule_watch import ScheduleWatch
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker
from thinwire.methods.local_settings import Local
from thinwire.methods.method import Method
from thinwire.session.rounds import OnNonfinite, Rounds, RoundState
from thinwire.session.session import Session

WAY_OUT = "Restart from the last checkpoint"


class LocalRounds(Rounds):
    """Rounds that end with an outer step; the session's units are the anchors.

    Args:
        replicas: the workers of this process.
        peers: the collective of each; None for that of the session.
        on_nonfinite: see ``thinwire.attach``.
        regroup: function from the ranks of this process group that are gone, and a word, to the collective of those
            that are left, and their words; None if a lost worker is an error.
        control: the channel on which inner steps are compared, past an exchange that some ranks may have begun: gloo
            ends a process whose message meets one of another size. None for the session's.
    """

    needs_optimizer = False
    session: Session

    def __init__(
        self,
        replicas: Sequence[Replica],
        peers: Sequence[Collective] | None = None,
        on_nonfinite: OnNonfinite = "skip",
        regroup: Regroup | None = None,
        control: ControlChannel | None = None,
    ) -> None:
        self.replicas, self.peers, self.on_nonfinite, self.regroup = replicas, peers or (), on_nonfinite, regroup
        self.control = control
        self.others: Sequence[Collective] = ()
        """Further collectives whose bytes count: those of an optimizer."""
        self.inner = self.count = 0
        """The inner steps made, and the rounds begun; equal on all ranks between rounds."""
        self.schedule = ScheduleWatch()
        self.momentum: dict[str, Tensor] = {}
        self.flight: Flight | None = None
        self.late: Late | None = None
        self.first = [0.0] * len(replicas)
        """The distance of each worker's first inner step in the round."""
        self.moved = 0.0
        """The distance of the anchor's last outer step."""

    def start(self, session: Session, cleanup: ExitStack) -> None:
        self.session, self.peers = session, self.peers or [session.collective]
        self.mark_sent()
        self.fragments = fragments_of([unit.name for unit in session.units], self.local.fragments)
        self.exchanged_at = [0] * len(self.fragments)
        """The inner step of each fragment's last exchange."""
        self.lr, self.lr_sum = [1.0] * len(session.units), [0.0] * len(session.units)
        """The mean inner learning rates of the round that was exchanged last, and their sums since then."""
        session.ledger.note(f"buffers: {self.local.buffers}; only {session.method.name} moves the anchor")

    def mark_sent(self) -> None:
        """Count only what is sent from now on."""
        collective = self.session.collective
        self.sent = collective.sent, collective.sent_within_node, sum(other.sent for other in self.others)
        """The bytes sent by the end of the last exchange."""

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
        begins = self.inner == self.exchanged_at[0]
        if not self.schedule.done and self.local.every > 1 and self.inner > self.local.start:
            rates = (group["lr"] for group in self.replicas[0].optimizer.param_groups)
            if said := self.schedule.look(rates, begins):
                self.session.say(said)
        if self.local.per_lr:
            rates = self.replicas[0].learning_rates()
            self.lr_sum = [total + rate for total, rate in zip(self.lr_sum, rates, strict=True)]
        if begins and self.local.penalty is not None:
            everything = range(len(self.session.units))
            self.first = [self._norm(self.deltas(replica, everything)) for replica in self.replicas]
        self.inner += 1
        self.session.collective.everyone.status = str(self.inner)
        waiting = self.flight or self.late
        if waiting is not None and not self.local.late and waiting.due == self.inner:
            self.finish()
        for fragment in range(len(self.fragments)):
            if self.due(fragment):
                self._exchange(fragment)

    def _check_same_step(self, what: str) -> None:
        """Raise a ``ThinwireError`` if ranks have made different numbers of inner steps since they began."""
        channel, everyone = self.control, self.session.collective.everyone
        try:
            said = (channel or everyone).exchange_text(str(self.inner))
        except NoAnswer as error:  # those that are left compare their steps when they find each other
            everyone.here()  # before the look at the other channel, which takes a while
            failure = failed(channel or everyone, what, error, WAY_OUT)
            if channel is not None:  # release those that wait in an exchange, and hear their steps
                failure.lost = failure.lost._replace(said=everyone.lost().said)
            self._go_on(failure, CHECKING)
            if self.flight is not None:
                self._send_again(self.flight)
            return
        if len({*said}) > 1:
            raise known_to_all(different_steps(what, list(enumerate(said))))

    def _norm(self, tensors: Sequence[Tensor]) -> float:
        return float(self.session.collective.norm_across_shards(norm(tensors), self.session.timeout))

    @torch.no_grad()
    def end(self) -> None:
        """End the last round, which may be short, so that all workers hold the anchor. All ranks call it together."""
        self._check_same_step("detach()")
        if not self.local.late:
            self.finish()
        for fragment, at in enumerate(self.exchanged_at):
            if at < self.inner:
                self._exchange(fragment)
                self.finish()
        self.finish()
        self._give(range(len(self.session.units)), 0.0)
        replicas = self.session.replicas
        if replicas is not None and replicas.every and replicas.channel.world > 1:  # no exchange follows that would
            with Together(self.session.collective, "detach()"):
                replicas.check(self.session.step, self.session.transaction)

    def before_change(self, method: Method) -> None:
        self.land()
        if method.local != self.local and all(at == self.inner for at in self.exchanged_at):
            self.finish()

    # -- the exchange ----------------------------------------------------------------------------------------------

    def deltas(self, replica: Replica, chosen: Sequence[int]) -> list[Tensor]:
        """Return ``anchor - parameters``; the anchor in the parameter's dtype, as the worker began with it."""
        pairs = [(self.session.units[i].own, replica.params[i]) for i in chosen]
        return [anchor.to(param.dtype).to(anchor.dtype) - param for anchor, param in pairs]

    def _exchange(self, fragment: int) -> None:
        local, chosen = self.local, self.fragments[fragment]
        deltas = [self.deltas(replica, chosen) for replica in self.replicas]
        for worker, replica, found in zip(self.session.workers, self.replicas, deltas, strict=True):
            if not all_finite(found):
                self._mend(worker, replica, found)
        if local.late:
            self.finish(reset=False)
        due = self.inner + (local.every if local.late else local.steps_late)
        steps, self.exchanged_at[fragment] = self.inner - self.exchanged_at[fragment], self.inner
        self.count += fragment == 0
        if local.per_lr:
            for i in chosen:
                self.lr[i], self.lr_sum[i] = self.lr_sum[i] / steps or 1.0, 0.0
                for found in deltas:
                    found[chosen.index(i)].div_(self.lr[i])
        self._send(fragment, due, deltas, steps)
        if local.late:
            self._give(chosen, 0.0)
        elif due == self.inner or self.inner <= local.start:
            self.finish()

    def _send(self, fragment: int, due: int, deltas: list[list[Tensor]], steps: int) -> None:
        """Start an exchange, between those workers that are left."""
        session, chosen = self.session, self.fragments[fragment]
        kept = None if self.regroup is None else [[delta.clone() for delta in its] for its in deltas]
        while True:
            session.begin_step()
            sent, within, others = self.sent  # with what an optimizer has sent since
            session.sent_before = sent + others - sum(other.sent for other in self.others), within
            distances = None if self.local.penalty is None else self.first
            try:
                if fragment == 0:
                    with flight.exchanging(session, ["buffers and moments"]):
                        self._average()
                self.flight = flight.start(session, self.peers, fragment, due, chosen, deltas, steps, distances)
                self.flight.kept = kept
                return
            except ThinwireError as error:
                self._go_on(error, SENDING)
                assert kept is not None
                deltas = [[delta.clone() for delta in its] for its in kept]

    def _send_again(self, sent: Flight) -> None:
        assert sent.kept is not None
        self._send(sent.fragment, sent.due, sent.kept, sent.steps)

    def _go_on(self, error: ThinwireError, phase: str) -> bool:
        """Go on with the workers that are left, or raise the error; returns True if the exchange is final."""
        collective, final = go_on(self.session, self.regroup, error, self.inner, phase)
        self.peers, self.control = [collective], None  # the channel before has lost a rank too
        self.mark_sent()
        return final

    def _average(self) -> None:
        """Average buffers and the optimizers' moments, if the method says so."""
        local, timeout = self.local, self.session.timeout
        if local.buffers == "average":
            averaged(self.peers, [replica.buffers for replica in self.replicas], timeout)
        if local.sync_moments is not None and self.count % local.sync_moments == 0:
            keys = self.replicas[0].moment_keys()
            names = json.dumps(keys)
            if any(other != names for other in self.session.collective.everyone.exchange_text(names)):
                raise known_to_all(
                    ThinwireError(
                        f"sync_moments: the optimizers of the ranks keep different tensors, here {names}; give all "
                        "ranks the same optimizer, and a gradient in the first round"
                    )
                )
            averaged(self.peers, [replica.moments(keys) for replica in self.replicas], timeout)

    def land(self) -> None:
        """Wait for the exchange in flight, decode it, and commit the compressor's state. All ranks call it together."""
        session, means, first = self.session, list[Tensor](), 0.0
        if self.flight is None:
            return
        arrived = False
        while True:
            sent = self.flight
            try:
                means, first = flight.land(session, self.peers, sent)
                arrived = True
                session.row.noise_scale = self.replicas[0].noise_scale()
                session.end_step()
            except ThinwireError as error:
                if not self._go_on(error, ARRIVED if arrived else SENDING):
                    self._send_again(sent)
                    arrived = False
                    continue
            break
        self.flight = None
        self.mark_sent()
        self.late = Late(sent.fragment, sent.due)
        if session.transaction.failed or not all_finite(means):
            self._refuse()
        else:
            self.late.means, self.late.divisor = means, self.local.divisor(self.moved, first)
            session.commit(sent.bucket.units)

    def _mend(self, worker: Worker, replica: Replica, deltas: list[Tensor]) -> None:
        """Make a worker whose update is not finite sound again; with "zero" it sends zeros in place of its update."""
        if self.on_nonfinite != "zero":  # all begin again when the exchange has arrived
            self._forget_nonfinite(worker, replica)
            return
        for delta in deltas:
            delta.zero_()
        self._begin_again(range(len(self.session.units)), worker, replica)
        self.session.ledger.note(
            f"inner step {self.inner}: the update of rank {worker.rank} is not finite; it sends zeros in its place, "
            "and begins again from the anchor"
        )

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
        self._check_same_step("a checkpoint")
        self.land()  # an exchange in flight is decoded now, and waits for its time
        return saved(self)

    def fits(self, state: RoundState | None) -> None:
        checked(self, state)

    @torch.no_grad()
    def restore(self, state: RoundState | None) -> None:
        self.flight = self.late = None
        self.momentum.clear()
        restored(self, state)

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
            for worker, replica in zip(self.session.workers, self.replicas, strict=True):
                self._begin_again(chosen, worker, replica)
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

    def _give(self, chosen: Sequence[int], mix: float, replicas: Sequence[Replica] | None = None) -> None:
        """Set the workers' parameters to the anchor, but for the share ``mix`` of their own."""
        for replica in replicas or self.replicas:
            for i in chosen:
                anchor = self.session.units[i].own
                if mix == 0.0:
                    replica.params[i].copy_(anchor)
                else:
                    replica.params[i].lerp_(anchor.to(replica.params[i].dtype), 1.0 - mix)

    def _begin_again(self, chosen: Sequence[int], worker: Worker, replica: Replica) -> None:
        """Let a worker begin again from the anchor, with a sound optimizer."""
        self._forget_nonfinite(worker, replica)
        self._give(chosen, 0.0, [replica])

    def _forget_nonfinite(self, worker: Worker, replica: Replica) -> None:
        if cleared := replica.clear_nonfinite():
            what = f"reset the optimizer's state of {cleared} parameters of rank {worker.rank}, which was not finite"
            self.session.ledger.note(f"inner step {self.inner}: {what}")
