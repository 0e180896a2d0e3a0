"""1-bit LAMB: 1-bit Adam's exchange with layer-wise learning rates."""

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from thinwire.core import ThinwireError
from thinwire.optim.method_optimizer import FreezeStep, Freezing
from thinwire.optim.onebit_adam import denominator, refresh


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


def norm(x: Tensor) -> Tensor:
    return cast(Tensor, torch.linalg.vector_norm(x))
