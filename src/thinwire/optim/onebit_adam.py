"""Adam and LAMB in one bit: 1-bit Adam, which freezes the variance and exchanges the momentum, 0/1 Adam, 1-bit LAMB."""

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from thinwire.core import ThinwireError
from thinwire.core.sharding import own, wrapped
from thinwire.optim.method_optimizer import FreezeStep, Freezing, MethodOptimizer
from thinwire.optim.rare import is_sparse, lifted, quiet


class OneBitAdam(Freezing):
    """AdamW that exchanges its momentum in one bit per element once the variance is frozen; for ``onebit_adam()``.

    dense:   ``m = mean_i (beta1 m + (1 - beta1) g_i)``, ``v = beta2 v + (1 - beta2) g^2``, AdamW's step
    frozen:  ``m = C-mean_i(beta1 m + (1 - beta1) g_i)``, ``x -= lr (m / (sqrt(v_hat) + eps) + weight_decay x)``
    ``g = (m' - beta1 m) / (1 - beta1)``; ``v_hat = v / (1 - beta2^t)`` of the last dense step.

    Do not scale or clip ``grad`` between backward and step: it is the momentum. ``onebit_adam(clip=)`` clips.

    Args:
        params: parameters of the attached model.
        lr: learning rate.
        betas: decay of the momentum, which the memory applies, and of the variance.
        eps: added to the root of the variance.
        weight_decay: decoupled, as in AdamW.
        freeze_step: number of dense steps; the paper advises 15 to 25 % of the training and at least the warm-up of
            the learning rate. ``"auto"``: until the variance has settled (see ``Freezing``). None: all steps.
        bias_correction: as in Adam. The momentum's ends with the dense steps; the variance's is frozen with it. False
            is as in DeepSpeed.

    Raises:
        ThinwireError: a value is outside its range.

    State: ``exp_avg_sq``, and ``exp_avg`` until the variance is frozen; the memory holds the momentum itself.

    Source: H. Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed",
    2021, arXiv:2102.02888, algorithm 1.

    Departures: bias correction. The scale of a block is its l1 mean, not the l2 norm of a tensor, which is no
    contraction. The ratio test uses the bias-corrected variance, in both directions. Elements whose variance is 0 at
    the switch are not exchanged. Tensors in which over a quarter of the elements had no gradient in the last dense step
    (rare features) stay dense, with a live variance. Variances far below their block's are raised (``optim.rare``).
    """

    recipe: ClassVar[str] = "thinwire.onebit_adam()"

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        fixed = self.fixed(state)
        if fixed:
            state.pop("exp_avg", None)
        else:
            g = self.recovered(grad, state, beta1)
            state["step"] += 1
            refresh(state["exp_avg_sq"], g, beta2)
            self.look(g, state)
            state["exp_avg"].copy_(grad)
        t = float(state["step"]) if group["bias_correction"] else math.inf
        apply(param, grad, state["exp_avg_sq"], group, math.inf if fixed else t, t)


class ZeroOneAdam(MethodOptimizer):
    """AdamW whose variance is updated in ever rarer dense steps; other steps send gradients in one bit per element.

    ``t in T_v``: dense, and ``v = beta2 v + (1 - beta2) g^2``; else one bit, and ``v`` stays. ``m = beta1 m + (1 -
    beta1) g`` at all steps. The gaps of ``T_v`` begin at 1 and double after every ``refreshes`` of them.
    For ``zeroone_adam()``.

    Args:
        params, lr, betas, eps, weight_decay: as for ``OneBitAdam``.
        refreshes: number of dense steps after which the gap doubles.
        freeze_step: number of steps after which the variance is no longer updated; None: no limit.

    Raises:
        ThinwireError: a value is outside its range.

    State: ``exp_avg`` and ``exp_avg_sq``, as in Adam.

    Source: Y. Lu et al., "Maximizing Communication Efficiency for Large-scale Training via 0/1 Adam", 2022,
    arXiv:2202.06009, algorithm 1; the gaps as in its code.

    Departures: ranks exchange at every step. The paper's second half takes local steps between ever rarer exchanges;
    replicas would differ, which thinwire does not support. Bias correction uses the number of variance updates. A
    weight whose variance is still 0 does not move. Rare features: as in ``OneBitAdam``.
    """

    takes: ClassVar[str] = "gradient, with dense steps in between"
    recipe: ClassVar[str] = "thinwire.zeroone_adam()"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        refreshes: int = 16,
        freeze_step: int | None = None,
    ) -> None:
        if not (type(refreshes) is int and refreshes >= 1):
            raise ThinwireError(f"refreshes is {refreshes!r}; it must be a number from 1 on, e.g. 16")
        if freeze_step is not None and not (type(freeze_step) is int and freeze_step >= 1):
            raise ThinwireError(f"freeze_step is {freeze_step!r}; give a number of steps from 1 on, or None for never")
        rest = {"weight_decay": weight_decay, "refreshes": refreshes, "freeze_step": freeze_step}
        super().__init__(params, lr, betas, eps, **rest)

    def rule(self) -> str:
        group = self.param_groups[0]
        return f"{super().rule()}, refreshes {group['refreshes']}, freeze_step {group['freeze_step']}"

    def density(self, ahead: int = 0) -> float | None:
        return 1.0 if self._refreshes(max(0, self.steps + ahead)) else None

    def _refreshes(self, step: int) -> bool:
        group = self.param_groups[0]
        return is_refresh(step, group["refreshes"]) and step < (group["freeze_step"] or math.inf)

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state.setdefault("refreshed", 0)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        m.mul_(beta1).add_(grad, alpha=1.0 - beta1)
        dense = self._refreshes(self.steps)
        if dense or state.get("kept"):
            g = grad.to(v.dtype)
            state["refreshed"] += 1
            refresh(v, g, beta2)
            if dense and not self._refreshes(self.steps + 1):
                state["kept"] = is_sparse(quiet(g, v))
                state["small"] = 0 if state["kept"] else lifted(v)[1]
        if not dense and state.get("small"):
            v = wrapped(lifted(v)[0].as_strided(own(v).shape, own(v).stride()), v)
        apply(param, m * (v != 0), v, group, float(state["step"]), float(state["refreshed"]))

    def after(self) -> None:
        if self._refreshes(self.steps - 1) and not self._refreshes(self.steps):
            small = sum(state.get("small", 0) for _, state, _ in self.variances())
            if small:
                self.note(f"{small:,} variances are next to nothing and count as a hundredth of their block's")
            self.say_kept()


class OneBitLamb(Freezing):
    """LAMB that exchanges its momentum in one bit per element once the variance is frozen; for ``onebit_lamb()``.

    dense:   ``x -= lr r u``, ``u = m_hat / (sqrt(v_hat) + eps) + weight_decay x``, ``r = clip(||x|| / ||u||)`` of each
    tensor; ``c`` is the moving average of ``r``.
    frozen:  ``x -= lr c f u``; ``f`` follows ``max (sqrt(v_hat) + eps) / (sqrt(v_fresh) + eps)``, within ``factor``
    and by at most ``factor_change`` per step; ``v_fresh`` is updated with ``g = (m' - beta1 m) / (1 - beta1)``.

    Args:
        params, lr, betas, eps, weight_decay, freeze_step, bias_correction: as for ``OneBitAdam``.
        coeff: bounds of the trust ratio ``r``.
        coeff_beta: decay of its moving average.
        factor: bounds of ``f``.
        factor_change: largest relative change of ``f`` in a step, in (0, 1).

    Raises:
        ThinwireError: a value is outside its range.

    State: ``exp_avg``, ``exp_avg_sq`` and, after the freeze, ``exp_avg_sq_fresh``.

    Source: C. Li et al., "1-bit LAMB: Communication Efficient Large-Scale Large-Batch Training with LAMB's Convergence
    Speed", 2021, arXiv:2104.06069, algorithm 1.

    Departures: every block of every tensor has its own scale, so momenta are not rescaled to share one. The moving
    average of the trust ratio starts from the first ratio, not from 0. Elements whose variance is 0 are excluded from
    the exchange and the maximum. Rare features: as in ``OneBitAdam``.
    """

    recipe: ClassVar[str] = "thinwire.methods.onebit_lamb()"

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
        coeff: tuple[float, float] = (0.01, 10.0),
        coeff_beta: float = 0.9,
        factor: tuple[float, float] = (0.5, 4.0),
        factor_change: float = 0.1,
    ) -> None:
        for name, (low, high) in (("coeff", coeff), ("factor", factor)):
            if not 0.0 < low <= high:
                raise ThinwireError(f"{name} is {low, high}; it is (lowest, highest), both above 0")
        for name, share in (("coeff_beta", coeff_beta), ("factor_change", factor_change)):
            if not 0.0 < share < 1.0:
                raise ThinwireError(f"{name} is {share}; it must be in (0, 1)")
        self.more = {"coeff": coeff, "coeff_beta": coeff_beta, "factor": factor, "factor_change": factor_change}
        super().__init__(params, lr, betas, eps, weight_decay, freeze_step=freeze_step, bias_correction=bias_correction)

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        g = self.recovered(grad, state, beta1)
        state["exp_avg"].copy_(grad)
        fixed = self.fixed(state)
        state["step"] += 0.0 if fixed else 1.0
        t, v = float(state["step"]) if group["bias_correction"] else math.inf, state["exp_avg_sq"]
        if fixed:
            denom = denominator(v, t, group)
            direction = grad / denom
            step = direction.add(param, alpha=group["weight_decay"])
            ratio = state.get("coeff", torch.ones((), dtype=v.dtype, device=param.device))
            ratio = ratio * self._factor(denom, g, direction, step, state, group)
        else:
            refresh(v, g, beta2)
            self.look(g, state)
            direction = grad / (1.0 - beta1**t) / denominator(v, t, group)
            step = direction.add(param, alpha=group["weight_decay"])
            x, u = norm(param), norm(step)
            ratio = torch.where((x > 0) & (u > 0), (x / u).clamp(*group["coeff"]), 1.0)
            mean = state.get("coeff", ratio)
            state["coeff"] = mean + (1.0 - group["coeff_beta"]) * (ratio - mean)
        param.sub_(step.mul_(ratio * float(group["lr"])))

    def _factor(
        self, denom: Tensor, g: Tensor, direction: Tensor, step: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        """Return ``f``, which enlarges the step as gradients become smaller than the frozen variance."""
        v, (low, high), change = state["exp_avg_sq"], group["factor"], group["factor_change"]
        if "exp_avg_sq_fresh" not in state:
            state["exp_avg_sq_fresh"], state["step_fresh"] = v.clone(), state["step"].clone()
            state["factor"] = torch.ones((), dtype=v.dtype, device=v.device)
        v_fresh, last = state["exp_avg_sq_fresh"], state["factor"]
        refresh(v_fresh, g, group["betas"][1])
        state["step_fresh"] += 1.0
        t = float(state["step_fresh"]) if group["bias_correction"] else math.inf
        ratios = torch.where(v > 0, denom / denominator(v_fresh, t, group), 0.0)
        found = ratios.max() if ratios.numel() else last
        if group["weight_decay"]:
            share = (norm(direction) / norm(step)).nan_to_num(1.0).clamp(max=1.0)
            found = found * share + (1.0 - share)
        found = found.clamp(low, high)
        state["factor"] = torch.minimum(torch.maximum(found, (1.0 - change) * last), (1.0 + change) * last)
        return state["factor"]


def is_refresh(step: int, each: int) -> bool:
    """Return True if ``step`` is a refresh: from step 0 on, ``each`` refreshes at each gap of 1, 2, 4, ... steps."""
    gap = 1 << ((step // each + 1).bit_length() - 1)  # gaps of 2^j begin at each (2^j - 1)
    return (step - each * (gap - 1)) % gap == 0


def refresh(v: Tensor, g: Tensor, beta2: float) -> None:
    """Update ``v = beta2 v + (1 - beta2) g^2``."""
    v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)


def denominator(v: Tensor, t: float, group: dict[str, Any]) -> Tensor:
    """Return ``sqrt(v / (1 - beta2^t)) + eps``; an infinite ``t`` means no bias correction."""
    beta2 = group["betas"][1]
    return v.sqrt().div_(math.sqrt(1.0 - beta2**t) if t else 1.0).add_(group["eps"])


def apply(param: Tensor, m: Tensor, v: Tensor, group: dict[str, Any], t_m: float, t_v: float) -> None:
    """Take AdamW's step, with bias correction for ``t_m`` and ``t_v`` steps."""
    lr = float(group["lr"])
    param.mul_(1.0 - lr * group["weight_decay"])
    param.addcdiv_(m, denominator(v, t_v, group), value=-lr / (1.0 - group["betas"][0] ** t_m))


def norm(x: Tensor) -> Tensor:
    return cast(Tensor, torch.linalg.vector_norm(x))
