"""Checks and setup for local updates; ``local_rounds.py`` has the rounds.

The model has no wrapper, or is sharded by ``fully_shard`` and replicated over a mesh. Its engine for gradients finds
the parameters and makes the collective; only its hooks on gradients are not installed.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.comm.collectives import Collective, ControlChannel
from thinwire.comm.control import Together
from thinwire.comm.hierarchical import levels
from thinwire.comm.link import Link
from thinwire.comm.process_group import ProcessGroup, twin_of
from thinwire.comm.survivors import survivors
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import replicated
from thinwire.core.tensors import float_at_least_32
from thinwire.engines.bare import Plain
from thinwire.engines.ddp import Ddp
from thinwire.engines.fsdp2.engine import Fsdp2
from thinwire.engines.outer.local_rounds import LocalRounds
from thinwire.engines.outer.replica import Replica, floating
from thinwire.engines.source import Source
from thinwire.methods.method import Method
from thinwire.optim.mean_adamw import MeanAdamW
from thinwire.session.optimizers import Optimizers, each_of, holders
from thinwire.session.replicas import Replicas
from thinwire.session.rounds import OnLost, OnNonfinite, Rounds, Scaler
from thinwire.session.session import Session


def anchor_of(param: Tensor) -> Tensor:
    """Return a copy of a parameter, in float32 at least."""
    return param.detach().clone().to(float_at_least_32(param.dtype))


def check_local(method: Method, parameters: int, rounds: LocalRounds | None) -> None:
    """Raise a ``ThinwireError`` if the method does not fit the model or the present round."""
    if (local := method.local) is None:
        raise ThinwireError(
            f"{method.name} exchanges gradients, and this model was attached for local updates; detach() and attach "
            "again, or use thinwire.updates(...)"
        )
    if local.fragments > parameters:
        raise ThinwireError(
            f"fragments is {local.fragments}, and the model has {parameters} parameters; use at most as many"
        )
    if rounds is not None and hasattr(rounds, "session") and rounds.local != local:
        if not rounds.begins:
            way = "change them after a round" if rounds.local.fragments == 1 else "detach() and attach again"
            raise ThinwireError(
                f"inner step {rounds.inner} is in the middle of a round of {rounds.local.every}, which began with "
                f"other settings of local(...); {way}, or give the same ones here"
            )
        if rounds.local.fragments != local.fragments:
            raise ThinwireError(
                f"fragments changes from {rounds.local.fragments} to {local.fragments}; detach() and attach again"
            )


class Outer(Source[ControlChannel]):
    """A model for local updates, before it is attached.

    Args:
        model: its buffers are averaged if the method says so.
        exchanger: the engine that would exchange its gradients.
        optimizer: the inner optimizer.
        on_lost: see ``thinwire.attach``.
    """

    no_sync = contextlib.nullcontext

    def __init__(
        self, model: nn.Module, exchanger: Plain | Fsdp2, optimizer: Optimizers | None, on_lost: OnLost
    ) -> None:
        if optimizer is None:
            raise ThinwireError(
                "a round ends after so many steps of the inner optimizer, which must be seen: call "
                "attach(..., optimizer=optimizer)"
            )
        self.model, self.exchanger, self.optimizer = model, exchanger, optimizer
        self.channel, self.shares = exchanger.channel, exchanger.shares
        self.on_lost: OnLost = on_lost
        self.clock: LocalRounds | None = None

    def exchanged(self) -> list[tuple[str, Tensor]]:
        self.live = self.exchanger.exchanged()
        held = holders(self.optimizer, self.live)
        if missing := [name for name, _ in self.live if name not in held]:
            raise ThinwireError(
                f"parameter {missing[0]!r} is not in the inner optimizer ({len(missing)} are missing), so no worker "
                "would change it; give it to the optimizer, or freeze it: requires_grad_(False)"
            )
        self.sketching = [one for one in each_of(self.optimizer) if isinstance(one, MeanAdamW)]
        self.anchors = [(name, anchor_of(param)) for name, param in self.live]
        return self.anchors

    def stepped(self, named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        return self.live

    def rounds(self, optimizer: Optimizers | None, scaler: Scaler | None, on_nonfinite: OnNonfinite) -> Rounds:
        replica = Replica([param for _, param in self.live], self.optimizer, floating(self.model.buffers()))
        regroup = self._regroup if self.on_lost == "continue" else None
        self.clock = LocalRounds([replica], on_nonfinite=on_nonfinite, regroup=regroup, control=self.channel)
        return self.clock

    def fits(self, method: Method) -> None:
        check_local(method, len(self.live), self.clock)
        if self.on_lost == "continue" and (kept := [r for r in method.rules if replicated(r.memory)]):
            raise ThinwireError(
                f'on_lost="continue" and {type(kept[0].memory).__name__}, whose state is the mean over all workers, '
                "which those that are left can't make without the lost one; use ErrorFeedback, as thinwire.topk() does"
            )

    def compared(self, every: int) -> Replicas:
        held = self.exchanger.compared(every)
        continues = self.on_lost == "continue"  # then the check also tells that the exchange has arrived everywhere
        names = {name for name, _ in self.live}
        kept = [(name, param) for name, param in held.named if name not in names]  # frozen: compared once, at the start
        self.replicas = Replicas([*self.anchors, *kept], held.channel, held.parts, 1 if continues else min(every, 1))
        return self.replicas

    def collective(self, link: Link | None, together: Together) -> Collective:
        self.link = link
        if (group := self.exchanger.group) is not None:
            with together.alone():
                self.exchanger.travel_over(twin_of(group))
        made = self.exchanger.collective(link, together)
        self.replicas.channel = made.everyone
        return made

    def _regroup(self, gone: Sequence[int], word: str, timeout: float) -> tuple[Collective, list[str]]:
        assert self.exchanger.group is not None
        group, words = survivors(self.exchanger.group, gone, word, timeout)
        self.exchanger.travel_over(group)
        return levels(ProcessGroup(group, timeout), None, self.link), words

    @torch.no_grad()
    def share(self, session: Session) -> None:
        self.exchanger.share(session)
        for (_, anchor), (_, param) in zip(self.anchors, self.live, strict=True):
            anchor.copy_(param)

    def install(self, session: Session) -> None:
        rounds, anchors = self.clock, {name for name, _ in self.anchors}
        assert rounds is not None
        self.replicas.named = [(name, param) for name, param in self.replicas.named if name in anchors]
        for one in self.sketching:  # over the group that was given, past an exchange in flight
            carrier = levels(cast(ProcessGroup, self.channel), None, self.link)
            one.carrier, rounds.others = carrier, [*rounds.others, carrier]
            session.cleanup.callback(carrier.close)
            session.cleanup.callback(setattr, one, "carrier", None)
        rounds.mark_sent()  # without what ``share`` has sent

        def after(*_: object) -> None:
            rounds.stepped()

        session.cleanup.callback(self.optimizer.register_step_post_hook(after).remove)


def over(
    model: nn.Module,
    engine: Ddp | Plain | Fsdp2,
    optimizer: Optimizers | None,
    on_lost: OnLost,
    given: Mapping[str, object],
) -> Outer:
    """Make the engine for local updates, over the engine that would exchange the model's gradients.

    Args:
        given: the options of ``attach`` that local updates do not have.

    Raises:
        ThinwireError: gradients would be averaged too, or there is nobody to exchange updates with.
    """
    if isinstance(engine, Ddp):
        raise ThinwireError(
            "the model is a DistributedDataParallel, which averages the gradients of all workers in each step, and "
            "local updates are of each worker's own; attach to the model in it, ddp.module, with process_group="
        )
    if given["scaler"] is not None:
        raise ThinwireError(
            "scaler= is given, and a step that a GradScaler leaves out on one worker would leave that worker a step "
            "behind in its round; train in bfloat16, without a scaler"
        )
    for name in ("ranks_per_node", "sparse_gradients"):
        if given[name]:
            raise ThinwireError(f"{name}= is {given[name]}, which is for gradients; leave it out with local updates")
    if isinstance(engine, Fsdp2) and (engine.group is None or engine.scatter is not None or engine.gather is not None):
        raise ThinwireError(
            "local updates are exchanged between the replicas of a shard: pass fsdp2=Fsdp2Options(replicate="
            'mesh["replicate"]), without reduce_scatter= and all_gather='
        )
    made = Outer(model, engine, optimizer, on_lost)
    if on_lost == "continue":
        _check_survivable(made, given)
    return made


def _check_survivable(made: Outer, given: Mapping[str, object]) -> None:
    """Raise a ``ThinwireError`` if those that are left could not go on without a lost worker."""
    group = made.exchanger.group
    if not isinstance(made.exchanger, Plain) or group is None or dist.get_backend(group) != "gloo":
        raise ThinwireError(
            'on_lost="continue" makes a new gloo group of the workers that are left, each with the whole model; pass '
            'process_group= a group of gloo and no wrapper, or on_lost="error" and restart from a checkpoint'
        )
    if given["policy"] is not None or any(isinstance(one, MeanAdamW) for one in each_of(made.optimizer)):
        raise ThinwireError(
            f'on_lost="continue" with {"a policy" if given["policy"] is not None else "MeanAdamW"}, which talks to the '
            'other workers outside of the exchange; leave it out, or use on_lost="error"'
        )


def check_for_gradients(on_nonfinite: OnNonfinite, on_lost: OnLost) -> None:
    """Raise a ``ThinwireError`` if an option is only for local updates."""
    for name, value, only in (("on_nonfinite", on_nonfinite, "zero"), ("on_lost", on_lost, "continue")):
        if value == only:
            raise ThinwireError(
                f'{name} is "{value}", which is for local updates, e.g. thinwire.diloco(); leave it out with methods '
                "that exchange gradients"
            )
