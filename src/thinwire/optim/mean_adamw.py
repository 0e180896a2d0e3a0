"""AdamW for the exchange of updates: private moments, scaled to the second moments of the mean gradient."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from thinwire.comm.collectives import TIMEOUT, Carrier, NoAnswer
from thinwire.comm.process_group import ProcessGroup
from thinwire.core import checks
from thinwire.core.ambient import undisturbed
from thinwire.core.context import Context
from thinwire.core.errors import ThinwireError
from thinwire.core.tensors import float_at_least_32
from thinwire.optim.gradient_sketch import Layout, layout, noise_scale, sketch, squared_norms
from thinwire.optim.method_optimizer import check, restore_dtypes

ONE_FOR_ALL = ("sketch_every", "ratio_beta", "seed")
HEADER = 2
"""Values at the front of a message: a number drawn from seed and step, and its square."""


class MeanAdamW(torch.optim.Optimizer):
    """AdamW for workers that exchange updates, with the second moments of the mean gradient.

    Each worker steps with its own gradient, and only its update is compressed and averaged. Its own second moments
    contain noise that the mean gradient does not have: they are up to N times too large. So they are scaled:

    ``m = beta1 m + (1 - beta1) g_i``, ``v = beta2 v + (1 - beta2) g_i^2``
    ``x -= lr (m_hat / (sqrt(r v_hat) + eps) + weight_decay x)``
    ``r = EMA(||mean_i g_i||^2) / EMA(mean_i ||g_i||^2)``, in [1/N, 1], for each row of a matrix or each tensor.

    Every so many steps the workers sum a sketch of their gradients (``optim.gradient_sketch``), from which
    all compute the same ``r``. ``step()`` does that by ``carrier``, which is made from the process group. Workers in
    one process do it themselves, whenever ``due``: ``take(sum of all workers' sketch(), N)`` before ``step()``.

    Args:
        params: parameters or groups, as for ``torch.optim.AdamW``; the same on all workers.
        lr: learning rate.
        betas: decay of the momentum and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        sketch_every: steps from one sketch to the next. The first ``sketch_every`` steps have one each, since a ratio
            from a single sketch is too rough.
        sketches: signed sums per row and sketch; a tensor with one ratio has 31.
        ratio_beta: decay of the averages in ``r``, per sketch.
        per: one ratio per "row" of a matrix, i.e. output unit, or per "tensor"; vectors always have one. "auto":
            rows where they cost at most 1/32 bit per element and step, with the defaults from 640 columns on. A group
            may have its own ``per`` and ``sketches``.
        seed: seed of the signs, equal on all workers.
        process_group: the workers; None for the default group, or for a single worker if there is none.

    Raises:
        ThinwireError: a value is outside its range; a parameter is sharded or complex; a gradient is sparse; workers
            are at different steps or have different seeds; a worker did not answer.

    **Wire**: one all-reduce in ``sketch_every`` steps, after the first of them. ``4 (sketches + 1)`` bytes per row,
    ``4 (31 + 1)`` per tensor with one ratio (less if it has fewer elements), and 8 more. On CUDA the host waits for it.

    State: as AdamW's, with ``mean_norm``, ``local_norm`` (the averages in ``r``) and ``ratio``, float32 ``[rows]`` or
    ``[1]``. A state of ``torch.optim.AdamW`` can be loaded.

    Example:
        >>> workers = [torch.nn.Parameter(torch.zeros(8)) for _ in range(2)]
        >>> optimizers = [MeanAdamW([x], lr=0.1) for x in workers]
        >>> for x, optimizer in zip(workers, optimizers):
        ...     x.grad = torch.ones(8)
        >>> summed = sum(optimizer.sketch() for optimizer in optimizers)
        >>> for optimizer in optimizers:
        ...     optimizer.take(summed, world=2)
        ...     optimizer.step()
        >>> float(optimizers[0].state[workers[0]]["ratio"])
        1.0

    Source: I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101, algorithm 2; the
    ratio and the noise scale: S. McCandlish, J. Kaplan, D. Amodei, "An Empirical Model of Large-Batch Training", 2018,
    arXiv:1812.06162, appendix A.1; signed sums: N. Alon, Y. Matias, M. Szegedy, "The space complexity of approximating
    the frequency moments", 1996.

    Departures: the ratio itself is not in a paper. McCandlish et al. have one noise scale for the model, from exact
    norms; here there is one per row or tensor, from sketches, and its numerator keeps the noise of the mean gradient,
    as Adam's second moment does. Moments are at least float32. A row whose sum is not finite keeps its ratio. With one
    worker it is AdamW.
    """

    carrier: Carrier | None = None
    """The workers that sum their sketches in ``step()``; may be set, and is not copied with the optimizer."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        sketch_every: int = 8,
        sketches: int = 4,
        ratio_beta: float = 0.95,
        per: str = "auto",
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = {
            "sketch_every": checks.whole(1, hint=", e.g. 8")("sketch_every", sketch_every),
            "ratio_beta": checks.real(0.0, 1.0, below=True, hint=", e.g. 0.95")("ratio_beta", ratio_beta),
            "seed": checks.seed("seed", seed),
        }
        options |= {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"sketches": sketches, "per": per, "steps": 0, "sketched": -1, "world": 1}
        super().__init__(params, options)
        if process_group is not None:
            meaning = "give the process group of all workers, or None for the default group"
            checks.of_type(dist.ProcessGroup, meaning)("process_group", process_group)
            self.carrier = ProcessGroup(process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        check(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        checks.one_of("auto", "row", "tensor")("per", group["per"])
        checks.whole(1, hint=", e.g. 4")("sketches", group["sketches"])
        for name in ONE_FOR_ALL:
            if group[name] != self.defaults[name]:
                raise ThinwireError(
                    f"{name} is {group[name]!r} in a parameter group, and {self.defaults[name]!r} elsewhere; give one "
                    f"for all groups: MeanAdamW(groups, {name}=...)"
                )
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if isinstance(param, DTensor) or param.is_complex():
                kind = "complex" if param.is_complex() else "sharded"
                raise ThinwireError(
                    f"a parameter of shape {tuple(param.shape)} is {kind}; MeanAdamW steps whole real tensors: use "
                    "torch.optim.AdamW for it"
                )

    @property
    def steps(self) -> int:
        """Number of steps made."""
        return self.param_groups[0]["steps"]

    @property
    def due(self) -> bool:
        """True if the next step needs a sketch that was not taken yet."""
        group = self.param_groups[0]
        step, every = group["steps"], group["sketch_every"]
        return (step < every or step % every == 0) and group["sketched"] != step

    @undisturbed
    def sketch(self) -> Tensor:
        """Compute this worker's message, float32 and of one size on all workers; a missing gradient counts as zero.

        Raises:
            ThinwireError: a gradient is sparse.
        """
        seed = self.param_groups[0]["seed"]
        mark = float(Context(seed, self.steps, "mark", 0).draw(16))  # small, so that its sums are exact in float32
        parts = [torch.tensor([mark, mark * mark], dtype=torch.float32, device="cpu")]
        for index, (param, _, of) in enumerate(self._sketched()):
            x = torch.zeros_like(param) if param.grad is None else _strided(param.grad)
            x = x.to(float_at_least_32(x.dtype)).reshape(of.ratios, x.numel() // of.ratios)
            parts.append(sketch(x, of, Context(seed, self.steps, str(index), 0)).view(-1))
        return torch.cat([part.to(parts[-1].device, torch.float32) for part in parts])

    @undisturbed
    def take(self, summed: Tensor, world: int) -> None:
        """Update the ratios for the next step.

        Args:
            summed: the sum of the messages of all workers; not written to.
            world: number of workers.

        Raises:
            ThinwireError: the sum has another size than this worker's message, or workers have sketched different steps
                or with different seeds.
        """
        checks.whole(1)("world", world)
        work = list(self._sketched())
        size = HEADER + sum(of.numbers for *_, of in work)
        if summed.numel() != size:
            raise ThinwireError(
                f"a sum of sketches has {summed.numel()} values, and this worker's sketch {size}; give all workers the "
                "same parameters and options"
            )
        mark, square = cast(list[float], summed[:HEADER].tolist())
        if mark * mark != world * square:  # equal if, and only if, all marks are
            raise ThinwireError(
                f"the {world} workers are at different steps or have different seeds (this one: step {self.steps}, "
                f"seed {self.param_groups[0]['seed']}); give all one seed, and let all make the same steps"
            )
        at = HEADER
        for param, group, of in work:
            part = summed[at : at + of.numbers].view(of.ratios, of.sums + 1).to(param.device)
            update_ratio(self.state[param], part, world, group["ratio_beta"])
            at += of.numbers
        for group in self.param_groups:
            group["sketched"], group["world"] = group["steps"], world

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step all parameters that have a gradient, after an exchange of sketches if one is due.

        Every call counts as a step, so all workers must make the same calls.

        Raises:
            ThinwireError: a gradient is sparse, or the exchange failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.due:
            self._exchange()
        self._update()
        return loss

    def _exchange(self) -> None:
        if self.carrier is None and dist.is_initialized() and dist.group.WORLD is not None:
            self.carrier = ProcessGroup(dist.group.WORLD)
        if self.carrier is None or self.carrier.world == 1:
            return
        try:
            summed = self.carrier.all_reduce(self.sketch()).wait(TIMEOUT)
        except NoAnswer as error:
            raise ThinwireError(
                f"step {self.steps}: summing the gradient sketches failed: {error}. Restart from the last checkpoint."
            ) from error
        self.take(summed, self.carrier.world)

    @undisturbed
    def _update(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    update(param, _strided(param.grad), self.state[param], group)
            group["steps"] += 1

    def metrics(self) -> dict[str, float]:
        """Return the gradient noise scale, ``tr(Sigma) / ||G||^2``, of the model and of each tensor.

        It is the batch at which noise and signal are equal, in batches of one worker. The keys are "noise_scale" and
        "noise_scale/<name>"; the name is an index unless the optimizer was given ``model.named_parameters()``. Empty
        before the first sketch and with one worker. On CUDA the host waits.
        """
        world = self.param_groups[0]["world"]
        found: dict[str, float] = {}
        named = [(name, self.state[param]) for param, name in self._named() if "ratio" in self.state.get(param, {})]
        if world > 1 and named:
            pairs = [torch.stack([state["mean_norm"].sum(), state["local_norm"].sum()]) for _, state in named]
            table = cast(list[list[float]], torch.stack([pair.to(pairs[0].device) for pair in pairs]).tolist())
            found["noise_scale"] = noise_scale(sum(mean for mean, _ in table), sum(local for _, local in table), world)
            for (name, _), (mean, local) in zip(named, table, strict=True):
                found[f"noise_scale/{name}"] = noise_scale(mean, local, world)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # a state of torch.optim.AdamW lacks some
                group.setdefault(name, value)

    def _sketched(self) -> Iterator[tuple[Tensor, dict[str, Any], Layout]]:
        every = self.param_groups[0]["sketch_every"]
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    yield param, group, layout(param.shape, group["per"], group["sketches"], every)

    def _named(self) -> Iterator[tuple[Tensor, str]]:
        params = [param for group in self.param_groups for param in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        yield from zip(params, names or map(str, range(len(params))), strict=True)


def update_ratio(state: dict[str, Any], summed: Tensor, world: int, beta: float) -> None:
    """Update the averages and the ratios of one tensor from the sum of its sketches ``[ratios, sums + 1]``."""
    if "ratio" not in state or len(state["ratio"]) != len(summed):
        state["mean_norm"], state["local_norm"] = (summed.new_zeros(len(summed)) for _ in range(2))
    mean, local = state["mean_norm"], state["local_norm"]
    found = squared_norms(summed, world)
    finite = found[0].isfinite() & found[1].isfinite()
    for average, new in zip((mean, local), found, strict=True):
        average.lerp_(torch.where(finite, new, average), 1.0 - beta)
    state["ratio"] = torch.where(local > 0.0, mean / local, 1.0).clamp_(1.0 / world, 1.0)


def update(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Take AdamW's step with the second moments times the ratio, in the operations of torch's for-loop."""
    if "step" not in state:
        dtype = float_at_least_32(param.dtype)
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    m, v, ratio = state["exp_avg"], state["exp_avg_sq"], state.get("ratio")
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    state["step"] += 1
    t, g = float(state["step"]), grad.to(v.dtype)
    param.mul_(1.0 - lr * group["weight_decay"])
    m.lerp_(g, 1.0 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
    scale = (1.0 - beta2**t) ** 0.5
    if ratio is not None:
        shape = (*ratio.shape[: param.ndim], *[1] * (param.ndim - 1))  # [rows, 1, ...], or [] for a scalar
        scale = scale / ratio.to(v.dtype).sqrt().view(shape)
    param.addcdiv_(m, v.sqrt().div_(scale).add_(group["eps"]), value=-lr / (1.0 - beta1**t))


def _strided(grad: Tensor) -> Tensor:
    if grad.layout is not torch.strided:
        raise ThinwireError(
            f"a gradient of shape {tuple(grad.shape)} is sparse, and MeanAdamW steps dense ones; use "
            "torch.nn.Embedding(sparse=False), or torch.optim.SparseAdam for it"
        )
    return grad
