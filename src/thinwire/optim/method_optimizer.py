"""Base classes of optimizers that are part of a method, and the rule that freezes the variance.

Such an optimizer has one step counter for all parameters, which counts the steps actually made. It is in
``param_groups``, so that the optimizer's own checkpoint holds it.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from thinwire.core import ThinwireError, flat
from thinwire.core.ambient import undisturbed
from thinwire.core.memory_capabilities import Absorbed
from thinwire.core.sharding import own
from thinwire.core.tensors import float_at_least_32
from thinwire.optim.rare import is_sparse, lifted, quiet

FreezeStep: TypeAlias = int | Literal["auto"] | None
"""Dense steps before the variance is frozen; "auto" for the ratio test; None for never."""
SETTLED = 0.96
"""The variance has settled when the smaller of its last two measured l1 norms is at least this share of the larger."""
UNKNOWN = 0.0
"""The density of an exchange that is not decided yet; no real density is 0."""


class MethodOptimizer(torch.optim.Optimizer):
    """An optimizer that decides, with the session, how its gradients are exchanged.

    Its decisions are the same on all ranks: they depend only on the steps made and on data that all ranks received.
    """

    takes: ClassVar[str]
    """The required content of ``grad``; it must equal the memory's ``gives``."""
    recipe: ClassVar[str]
    """The recipe to use with this optimizer."""
    attached: bool = False

    def __init__(self, params: ParamsT, lr: float, betas: tuple[float, float], eps: float, **rest: Any) -> None:
        check(lr, betas, eps, rest["weight_decay"])
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "steps": 0, **rest})
        self.notes: list[str] = []
        """Notes for the ledger."""
        self._said: set[str] = set()

    @abstractmethod
    def density(self, ahead: int = 0) -> float | None:
        """Return the density ``ahead`` steps from the next: 1 for dense, None for the method's own, or ``UNKNOWN``."""

    @abstractmethod
    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Step one parameter."""

    def live(self, param: Tensor) -> Tensor | None:
        """Return a mask: 1 for elements of ``param`` that are exchanged, 0 for others; None if all are exchanged."""
        return None

    def kept(self, param: Tensor) -> bool:
        """Return True if ``param`` is always exchanged dense, since its features are rare."""
        return bool(self.state.get(param, {}).get("kept"))

    def settings(self) -> dict[int, Absorbed]:
        """Return the settings that the memory applies for the optimizer, by the parameter's id."""
        momentum = self.takes == "momentum"
        return {id(p): Absorbed(group["betas"][0] if momentum else 0.0) for p, group in self.params()}

    def rule(self) -> str:
        """Return one line of settings that must be equal on all ranks."""
        return f"{type(self).__name__} at step {self.steps}"

    def params(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield each parameter with its group."""
        for group in self.param_groups:
            yield from ((param, group) for param in group["params"])

    @property
    def steps(self) -> int:
        """Number of steps made."""
        return self.param_groups[0]["steps"]

    def after(self) -> None:
        """Act on a step that was just made."""

    @undisturbed
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step all parameters that have a gradient; if none has, do nothing and don't count a step.

        Raises:
            ThinwireError: no method is attached to this optimizer, or a closure is given.
        """
        if closure is not None:
            raise ThinwireError("step(closure) runs backward inside the step; call backward first, then step()")
        if not self.attached:
            raise ThinwireError(
                f"{type(self).__name__} steps with what {self.recipe} hands it, and nothing is attached; call "
                f"thinwire.attach(ddp, {self.recipe}, optimizer=optimizer) before the first backward"
            )
        work = [(param, param.grad, group) for param, group in self.params() if param.grad is not None]
        for param, grad, group in work:
            state = self.state[param]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(
                        param, dtype=float_at_least_32(param.dtype), memory_format=torch.preserve_format
                    )
            self.update(param, grad, state, group)
        if work:
            for group in self.param_groups:
                group["steps"] += 1
            self.after()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("notes", [])  # torch does not copy these attributes
        self.__dict__.setdefault("_said", set[str]())

    def note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.notes.append(text)

    def say_kept(self) -> None:
        """Add a ledger note that names the parameters that stay dense."""
        if shapes := [tuple(p.shape) for p, _ in self.params() if self.kept(p)]:
            more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
            self.note(
                f"{len(shapes)} parameters of rare features, of shapes {', '.join(map(str, shapes[:3]))}{more}, stay "
                "dense and their variance follows: over a quarter of their elements had no gradient in the last dense "
                "step"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)

    def variances(self) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        """Yield each variance with its state and its group."""
        for param, group in self.params():
            if "exp_avg_sq" in (state := self.state.get(param, {})):
                yield state["exp_avg_sq"], state, group


class Freezing(MethodOptimizer):
    """An optimizer that exchanges dense until its variance is frozen, by step or by ratio test, and compressed after.

    The ratio test measures ``||v / (1 - beta2^t)||_1`` over all parameters every ``1 / (1 - beta2)`` steps. It freezes
    the variance when that has changed by less than 4 % and the learning rate has not grown. ``optim.rare`` describes
    which variances are not frozen and which are raised.
    """

    takes: ClassVar[str] = "momentum"
    more: Mapping[str, Any] = {}
    """Further settings of a group."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: FreezeStep = "auto",
        bias_correction: bool = True,
    ) -> None:
        if freeze_step is not None and freeze_step != "auto" and not (type(freeze_step) is int and freeze_step >= 1):
            raise ThinwireError(
                f"freeze_step is {freeze_step!r}; give a number of steps from 1 on (15 to 25 % of the training, not "
                "less than the learning rate's warm-up), 'auto', or None for never"
            )
        own = {"weight_decay": weight_decay, "freeze_step": freeze_step, "bias_correction": bias_correction}
        super().__init__(params, lr, betas, eps, **self.more, **own, frozen_at=None, looked=None)

    @property
    def frozen(self) -> bool:
        """True if the variance is frozen."""
        return self.param_groups[0]["frozen_at"] is not None

    def rule(self) -> str:
        group = self.param_groups[0]
        return f"{super().rule()}, freeze_step {group['freeze_step']!r}, frozen at {group['frozen_at']}"

    def density(self, ahead: int = 0) -> float | None:
        group = self.param_groups[0]
        end = group["freeze_step"] if group["frozen_at"] is None else group["frozen_at"]
        if end == "auto":  # a ratio test before that step may freeze the variance
            looks = (self.steps + max(ahead, 0)) % self._every == 0 and self.steps + ahead > 0
            return UNKNOWN if ahead and looks else 1.0
        return 1.0 if end is None or self.steps + ahead < end else None

    @property
    def _every(self) -> int:
        return max(1, round(1.0 / (1.0 - self.param_groups[0]["betas"][1])))

    def fixed(self, state: dict[str, Any]) -> bool:
        """Return True if this parameter's variance is frozen."""
        return self.frozen and not state.get("kept")

    def look(self, g: Tensor, state: dict[str, Any]) -> None:
        """Count elements without a gradient, in a dense step after which the variance may be frozen."""
        end, ahead = self.param_groups[0]["freeze_step"], self.steps + 1
        if not self.frozen and (end == ahead or (end == "auto" and ahead % self._every == 0)):
            state["quiet"] = quiet(g, state["exp_avg_sq"])

    def live(self, param: Tensor) -> Tensor | None:
        if not self.frozen or self.kept(param):
            return None
        v = self.state.get(param, {}).get("exp_avg_sq")
        if v is None:
            return torch.zeros_like(param, dtype=torch.bfloat16)
        return None if bool(v.all()) else (v != 0).to(torch.bfloat16)

    def after(self) -> None:
        group = self.param_groups[0]
        if self.frozen:
            return
        if group["freeze_step"] == self.steps:
            self._freeze("as it was told")
        elif group["freeze_step"] == "auto" and self.steps % self._every == 0:
            sizes = [
                float(v.sum(dtype=torch.float64)) / (1.0 - own["betas"][1] ** float(state["step"]))
                for v, state, own in self.variances()
            ]
            now, lr = sum(sizes), float(group["lr"])
            before, lr_before = group["looked"] or (0.0, 0.0)
            if min(before, now) >= SETTLED * max(before, now) > 0.0 and lr <= lr_before:
                self._freeze(f"it was {now:.4g} in the l1 norm, and {before:.4g} {self._every} steps before")
            for each in self.param_groups:
                each["looked"] = [now, lr]

    def _freeze(self, why: str) -> None:
        for group in self.param_groups:
            group["frozen_at"] = self.steps
        small = 0
        for v, state, _ in self.variances():
            state["kept"] = is_sparse(state.pop("quiet", None))
            if not state["kept"]:
                found, count = lifted(v)
                flat(own(v)).copy_(found)
                small += count
        dead = sum(int((v == 0).sum()) for v, state, _ in self.variances() if not state["kept"])
        params = [param for param, _ in self.params() if param.requires_grad]
        dead += sum(param.numel() for param in params if "exp_avg_sq" not in self.state.get(param, {}))
        left_out = f"; {dead:,} elements whose variance is 0 are left out from here on" if dead else ""
        self.notes.append(f"the variance is frozen after {self.steps} steps ({why}){left_out}")
        if small:
            self.note(f"{small:,} variances were next to nothing and were lifted to a hundredth of their block's")
        self.say_kept()

    def recovered(self, m: Tensor, state: dict[str, Any], beta1: float) -> Tensor:
        """Compute the mean gradient from the last momentum and this one."""
        return m.to(state["exp_avg"].dtype).sub(state["exp_avg"], alpha=beta1).div_(1.0 - beta1)


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Copy the saved state again; torch has cast all but ``step`` to the parameter's dtype, too coarse for updates."""
    saved = (index for group in state_dict["param_groups"] for index in group["params"])
    params = (param for group in optimizer.param_groups for param in group["params"])
    for index, param in zip(saved, params, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[param][key] = value.to(device=optimizer.state[param][key].device, copy=True)


def check(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not float(lr) >= 0.0:
        raise ThinwireError(f"lr is {lr}; it must not be negative")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ThinwireError(f"betas are {betas}; both must be in [0, 1), e.g. (0.9, 0.999)")
    if not eps > 0.0:
        raise ThinwireError(f"eps is {eps}; it must be above 0, e.g. 1e-8")
    if not weight_decay >= 0.0:
        raise ThinwireError(f"weight_decay is {weight_decay}; it must not be negative")
