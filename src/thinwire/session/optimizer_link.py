"""The optimizers' part in a session's method.

An SGD optimizer leaves its momentum to memories that own it; an optimizer such as ``OneBitAdam`` is itself a part of
the method. Both keep their settings, which a user or a scheduler may change, and their checkpoints, which are marked if
the session holds more state: if such a checkpoint is loaded without the session's state, a warning says so.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from thinwire.comm.collectives import Collective
from thinwire.core import Role, ThinwireError
from thinwire.core.interfaces import named
from thinwire.core.memory_capabilities import Absorbed, traits_of
from thinwire.core.sharding import own, wrapped
from thinwire.exchange.fused import warm_up_kernels
from thinwire.exchange.units import Unit
from thinwire.methods.method import Method
from thinwire.optim.method_optimizer import MethodOptimizer
from thinwire.session.momentum_transfer import MomentumTransfer
from thinwire.session.optimizers import Optimizers, check_optimizer, each_of, holders, kind_of, release_optimizer

if TYPE_CHECKING:
    from thinwire.session.session import Session

MARK = "thinwire_step"
"""The key, in each parameter group of a checkpoint, of the step at which a session held state as well.

All ways to save an optimizer keep the groups and accept an int; an optimizer ignores the key."""


class OptimizerLink:
    """The link of a session to its optimizers: one, several, or none."""

    def __init__(self, session: "Session", optimizer: Optimizers | None) -> None:
        self.session, self.optimizer = session, optimizer
        self.owner = optimizer if isinstance(optimizer, MethodOptimizer) else None
        """The optimizer that is part of the method, or None."""
        self.transfer: MomentumTransfer | None = None
        """The transfer of momentum to memories that own it, or None."""
        self.marked: float | None = -1.0
        """The stage (density) for which the units know their live elements; -1 for none."""
        self.settings: dict[int, Absorbed] = {}
        self.stateful = False
        """True if a memory of the method has state."""
        self.held: dict[int, list[Unit]] = {}
        """The units that each optimizer steps, by the optimizer's id."""
        self.missing: int | None = None
        """The step of a session state that an optimizer's checkpoint needs and that has not been loaded, or None."""
        self._took = False  # took momentum at attach
        self._loaded = False  # an optimizer has loaded a checkpoint since the last exchange, or
        self._restored = False  # the session has

    # -- the method ------------------------------------------------------------------------------------------------

    def prepare(self, method: Method) -> tuple[dict[str, Absorbed], MomentumTransfer | None]:
        """Return what the memories do for the optimizers, by parameter name, and the transfer that the method needs.

        Nothing is changed; optimizers that don't fit the method are an error.
        """
        params = self.session.named
        if any(rule.memory.stateful for rule in method.rules) and self.session.rounds.needs_optimizer:
            check_optimizer(self.optimizer, params, self.session, method.name)
        holders(self.optimizer, params)
        if self.transfer is not None:
            self.transfer.written()  # restores the settings if a step failed
        transfer = MomentumTransfer(self.optimizer, method, params) if method.absorbs else None
        self._check_gives(method)
        self.settings = self.owner.settings() if self.owner else {}
        settings = {name: self.settings[id(param)] for name, param in params if id(param) in self.settings}
        return settings | (transfer.settings if transfer else {}), transfer

    def _check_gives(self, method: Method) -> None:
        """Raise a ``ThinwireError`` if the memories give the optimizer something else than it needs."""
        wanted, kind = getattr(self.optimizer, "takes", "gradient"), kind_of(self.optimizer)
        if len(each := each_of(self.optimizer)) > 1 and any(isinstance(one, MethodOptimizer) for one in each):
            raise ThinwireError(
                f"optimizer= is {kind}, of which one is a part of its method; it must hold all parameters that are "
                "exchanged, alone"
            )
        for rule in method.rules:
            given = traits_of(rule.memory).gives
            if self.optimizer is not None and given != wanted:
                way_out = f"attach {self.owner.recipe}" if self.owner else "use the one that its recipe names"
                raise ThinwireError(
                    f"{method.name} hands the optimizer its {given}, and {kind} steps with its {wanted}; {way_out}"
                )

    def leave(self, transfer: MomentumTransfer | None) -> None:
        """Give momentum back before the units change, if the next method does not own it. A collective call."""
        if self.transfer is not None:
            self.transfer.follow(self.session.units, self.session.workers)
            if transfer is None:
                self._give_momentum(self.session.collective)

    def enter(self, transfer: MomentumTransfer | None, units: Sequence[Unit], method: Method) -> str | None:
        """Take the momentum for the new units; returns the message for the user, or None."""
        before, self.transfer = self.transfer, transfer
        self.stateful = any(rule.memory.stateful for rule in method.rules)
        held = holders(self.optimizer, self.session.named)
        self.held = {id(one): [u for u in units if held.get(u.name) is one] for one in each_of(self.optimizer)}
        if transfer is None or before is not None:
            return None
        self._took = transfer.take(units, self.session.workers)
        each = sorted({f"{s.momentum:g}, {s.nesterov}, {s.weight_decay:g}" for s in transfer.settings.values()})
        found = "; ".join(each)
        return f"momentum, nesterov, weight_decay ({found}) moved from the optimizer into the memory until detach()"

    def start(self, cleanup: ExitStack) -> None:
        """Install the hooks on the optimizers' checkpoints; ``cleanup`` removes them."""
        for one in each_of(self.optimizer):
            self._read_mark(one)
            cleanup.callback(one.register_state_dict_post_hook(self._mark).remove)
            cleanup.callback(one.register_load_state_dict_post_hook(self._load).remove)
        if self._took:
            self.missing = None

    def give_back(self, collective: Collective) -> None:
        """Leave the optimizers as they are without a session, with their momentum. A collective call."""
        self.hold(False, self.session.units)
        release_optimizer(self.optimizer, self.session)
        self._give_momentum(collective)

    def _give_momentum(self, collective: Collective) -> None:
        transfer, self.transfer = self.transfer, None
        if transfer is not None:
            transfer.give_back(self.session.units, self.session.workers, collective, self.session.timeout)

    def hold(self, attached: bool, units: Sequence[Unit]) -> None:
        """Mark an optimizer of the method as attached or not; a momentum that it keeps moves to the units, or back."""
        self.marked = -1.0
        if not self.owner or not (attached or self.owner.attached):
            return
        self.owner.attached = attached
        for unit in units:
            state = self.owner.state.get(unit.param, {})
            if traits_of(unit.memory).gives != "momentum" or not state:
                continue
            if not attached:
                state["exp_avg"] = wrapped(unit.shared.now["momentum"].clone(), unit.param)
            elif "exp_avg" in state:
                for copy in (unit.shared.now, unit.shared.next):
                    copy["momentum"].copy_(own(state["exp_avg"]))

    # -- the step --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise a ``ThinwireError`` if the memories can't follow the optimizers' settings in the next step."""
        if self.transfer is not None:
            self.transfer.check(self.session.units)
        if self.owner and self.owner.settings() != self.settings:
            raise ThinwireError(
                f"beta1 of {type(self.owner).__name__} was changed, and the exchange goes on with the one it had at "
                "attach; use a scheduler that leaves it alone (in OneCycleLR: cycle_momentum=False)"
            )
        if torch.is_grad_enabled():
            self._warn_of_missing()

    def density(self, ahead: int) -> float | None:
        """Return the density of the exchange ``ahead`` steps after the next, if the optimizer decides it."""
        return self.owner.density(ahead) if self.owner else None

    def keep(self, density: float | None, units: Sequence[Unit]) -> bool:
        """Set ``kept`` of the units at the first step of a stage; returns True if it changed for any unit."""
        if not self.owner or density == self.marked:
            return False
        before = [unit.kept for unit in units]
        for unit in units:
            unit.kept = self.owner.kept(unit.param)
        return before != [unit.kept for unit in units]

    def begin(self, density: float | None) -> None:
        """Begin an exchange: the optimizers' present settings apply to it, and the live elements of its stage."""
        units, workers = self.session.units, self.session.workers
        if self._loaded and not self._restored:
            self.hold(True, units)
        self._warn_of_missing()
        self._loaded = self._restored = False
        if self.transfer is not None and self.transfer.follow(units, workers):
            warm_up_kernels(units, workers[0].kernels)
        if not self.owner or density == self.marked:
            return
        self.marked = density
        for unit in units:
            live = self.owner.live(unit.param) if "live" in named(unit.memory, Role.DERIVED) else None
            live = None if live is None else own(live)
            for state in unit.states(workers):
                for copy in (state.now, state.next):
                    copy.pop("live", None)
                    copy.update({} if live is None else {"live": live})

    def tell(self) -> None:
        """Write the optimizer's notes to the ledger after a step."""
        if self.owner:
            for note in self.owner.notes:
                self.session.ledger.note(f"step {self.session.step}: {note}")
            self.owner.notes.clear()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def rule(self) -> str:
        """Return one line that must be the same on all ranks."""
        return self.owner.rule() if self.owner else "takes no part"

    def moves(self, unit: Unit) -> Mapping[str, Any]:
        """Return the optimizer state of a unit whose memory layout has changed."""
        self.marked = -1.0
        return self.owner.state.get(unit.param, {}) if self.owner else {}

    def restored(self) -> None:
        """Update the optimizers' side after the session has loaded its state."""
        self.hold(True, ())
        for unit in self.session.units:
            unit.align(self.session.workers)
        if self.transfer is not None:
            self.transfer.seen = None
        self._restored, self.missing = True, None

    def _mark(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if self.stateful and (self.session.step > 0 or self._took):
            for group in state["param_groups"]:
                group[MARK] = self.session.step

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the momentum of a checkpoint that an optimizer has loaded into the memory."""
        self._read_mark(optimizer)
        self._loaded = True
        if self.transfer is not None:
            units, workers = self.session.units, self.session.workers
            self.session.undo()
            self.transfer.follow(units, workers)
            if self.transfer.take(units, workers):
                self.missing = None
            self.transfer.seen = None  # so that ``check`` looks at the settings that were loaded

    def _read_mark(self, optimizer: torch.optim.Optimizer) -> None:
        steps = [mark for group in optimizer.param_groups if isinstance(mark := group.pop(MARK, None), int)]
        self.missing = max(steps) if steps and not self._restored else None

    def _warn_of_missing(self) -> None:
        """Warn once about a session state that was not loaded."""
        missing, self.missing = self.missing, None
        if missing is not None:
            warnings.warn(
                f"the optimizer's state is from step {missing} of a thinwire session, and the momentum and residuals "
                f"of step {missing}, which the session held, were not restored: training goes on without them. Save "
                "wire.state_dict() (or wire, with torch.distributed.checkpoint) beside the optimizer, and load it "
                "into the session after attach()",
                stacklevel=4,
            )
