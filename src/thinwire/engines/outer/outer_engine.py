"""Checks and setup for local updates; ``local_rounds.py`` has the rounds.

The model has no wrapper, or is sharded by ``fully_shard`` and replicated over a mesh. Its engine for gradients finds
the parameters and makes the collective; only its hooks on gradients are not installed.
"""

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from thinwire.comm.collectives import Collective
from thinwire.comm.control import Together
from thinwire.comm.link import Link
from thinwire.core.errors import ThinwireError
from thinwire.core.tensors import float_at_least_32
from thinwire.engines.bare import Plain
from thinwire.engines.ddp import Ddp
from thinwire.engines.fsdp2.engine import Fsdp2
from thinwire.engines.outer.local_rounds import LocalRounds
from thinwire.engines.outer.replica import Replica, floating
from thinwire.methods.method import Method
from thinwire.optim.mean_adamw import MeanAdamW
from thinwire.session.optimizers import Optimizers, each_of, holders
from thinwire.session.replicas import Replicas
from thinwire.session.rounds import OnNonfinite
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
            raise ThinwireError(
                f"inner step {rounds.inner} is in the middle of a round of {rounds.local.every}, which began with "
                "other settings of local(...); change them after a round, or give the same ones here"
            )
        if rounds.local.fragments != local.fragments:
            raise ThinwireError(
                f"fragments changes from {rounds.local.fragments} to {local.fragments}; detach() and attach again"
            )


class Outer:
    """A model for local updates, before it is attached.

    Args:
        model: its buffers are averaged if the method says so.
        exchanger: the engine that would exchange its gradients.
        optimizer: the inner optimizer.
        on_nonfinite: see ``thinwire.attach``.
    """

    def __init__(
        self, model: nn.Module, exchanger: Plain | Fsdp2, optimizer: Optimizers | None, on_nonfinite: OnNonfinite
    ) -> None:
        if optimizer is None:
            raise ThinwireError(
                "a round ends after so many steps of the inner optimizer, which must be seen: call "
                "attach(..., optimizer=optimizer)"
            )
        self.model, self.exchanger, self.optimizer = model, exchanger, optimizer
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.channel = exchanger.channel

    def exchanged(self) -> list[tuple[str, Tensor]]:
        self.live = self.exchanger.exchanged()
        held = holders(self.optimizer, self.live)
        if missing := [name for name, _ in self.live if name not in held]:
            raise ThinwireError(
                f"parameter {missing[0]!r} is not in the inner optimizer ({len(missing)} are missing), so no worker "
                "would change it; give it to the optimizer, or freeze it: requires_grad_(False)"
            )
        self.anchors = [(name, anchor_of(param)) for name, param in self.live]
        replica = Replica([param for _, param in self.live], self.optimizer, floating(self.model.buffers()))
        self.rounds = LocalRounds([replica], on_nonfinite=self.on_nonfinite)
        return self.anchors

    def fits(self, method: Method) -> None:
        check_local(method, len(self.live), self.rounds)

    @property
    def no_sync(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext

    def compared(self, every: int) -> Replicas:
        held = self.exchanger.compared(every)
        return Replicas(self.anchors, held.channel, held.parts, min(every, 1))

    def collective(self, link: Link | None, together: Together) -> Collective:
        return self.exchanger.collective(link, together)

    @property
    def share(self) -> Callable[[Session], None] | None:
        return None if self.exchanger.share is None else self._share

    @torch.no_grad()
    def _share(self, session: Session) -> None:
        assert self.exchanger.share is not None
        self.exchanger.share(session)
        for (_, anchor), (_, param) in zip(self.anchors, self.live, strict=True):
            anchor.copy_(param)

    def install(self, session: Session) -> None:
        rounds = self.rounds
        rounds.sent = session.collective.sent, session.collective.sent_within_node  # without what ``share`` has sent
        for one in each_of(self.optimizer):
            if isinstance(one, MeanAdamW):
                one.carrier = session.collective
                session.cleanup.callback(setattr, one, "carrier", None)

        def after(*_: object) -> None:
            rounds.stepped()

        session.cleanup.callback(self.optimizer.register_step_post_hook(after).remove)


def over(
    model: nn.Module,
    engine: Ddp | Plain | Fsdp2,
    optimizer: Optimizers | None,
    on_nonfinite: OnNonfinite,
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
    return Outer(model, engine, optimizer, on_nonfinite)
