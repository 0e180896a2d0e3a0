"""The link between a session and an optimizer that is part of its method, such as ``OneBitAdam``."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Role, named
from thinwire.core.memory_capabilities import Absorbed, traits_of
from thinwire.core.sharding import own, wrapped
from thinwire.exchange.units import Unit
from thinwire.exchange.workers import Worker
from thinwire.methods.method import Method
from thinwire.optim.method_optimizer import MethodOptimizer
from thinwire.report.ledger import Ledger
from thinwire.session.optimizers import Optimizers, each_of, kind_of


class OptimizerLink:
    """The optimizer link of a session; does nothing if the optimizer is not part of the method."""

    def __init__(self, optimizer: Optimizers | None) -> None:
        self.optimizer = optimizer
        self.owner = optimizer if isinstance(optimizer, MethodOptimizer) else None
        self.marked: float | None = -1.0
        """The stage (density) for which the units know their live elements; -1 for none."""
        self.settings: dict[int, Absorbed] = {}

    def agree(self, method: Method, named: Iterable[tuple[str, Tensor]]) -> dict[str, Absorbed]:
        """Return what the memories do for the optimizer, by parameter name.

        Raises:
            ThinwireError: the memories give the optimizer something else than it needs, e.g. a momentum.
        """
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
        self.settings = self.owner.settings() if self.owner else {}
        return {name: self.settings[id(param)] for name, param in named if id(param) in self.settings}

    def rule(self) -> str:
        """Return one line that must be the same on all ranks."""
        return self.owner.rule() if self.owner else "takes no part"

    def hold(self, attached: bool, units: Sequence[Unit]) -> None:
        """Mark the optimizer as attached or not; a momentum that it keeps moves to the units, or back."""
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

    def moves(self, unit: Unit) -> Mapping[str, Any]:
        """Return the optimizer state of a unit whose memory layout has changed."""
        self.marked = -1.0
        return self.owner.state.get(unit.param, {}) if self.owner else {}

    def density(self, ahead: int) -> float | None:
        """Return the density of the exchange ``ahead`` steps after the next, if the optimizer decides it."""
        return self.owner.density(ahead) if self.owner else None

    def check(self) -> None:
        """Check the optimizer before a step.

        Raises:
            ThinwireError: a setting that the memory has taken over was changed.
        """
        if self.owner and self.owner.settings() != self.settings:
            raise ThinwireError(
                f"beta1 of {type(self.owner).__name__} was changed, and the exchange goes on with the one it had at "
                "attach; use a scheduler that leaves it alone (in OneCycleLR: cycle_momentum=False)"
            )

    def keep(self, density: float | None, units: Sequence[Unit]) -> bool:
        """Set ``kept`` of the units at the first step of a stage; returns True if it changed for any unit."""
        if not self.owner or density == self.marked:
            return False
        before = [unit.kept for unit in units]
        for unit in units:
            unit.kept = self.owner.kept(unit.param)
        return before != [unit.kept for unit in units]

    def begin(self, density: float | None, units: Sequence[Unit], workers: Sequence[Worker]) -> None:
        """Begin a step; at the first step of a stage, the units' states get the mask of live elements."""
        if not self.owner or density == self.marked:
            return
        self.marked = density
        for unit in units:
            live = self.owner.live(unit.param) if "live" in named(unit.memory, Role.DERIVED) else None
            live = None if live is None else own(live)
            for state in (unit.shared, *(worker.local[unit.name] for worker in workers)):
                for copy in (state.now, state.next):
                    copy.pop("live", None)
                    copy.update({} if live is None else {"live": live})

    def tell(self, ledger: Ledger, step: int) -> None:
        """Write the optimizer's notes to the ledger after a step."""
        if self.owner:
            for note in self.owner.notes:
                ledger.note(f"step {step}: {note}")
            self.owner.notes.clear()
