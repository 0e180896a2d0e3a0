"""Checks of the arguments of ``attach``, made before anything is changed or sent: a wrong type or value is an error."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.link import Link
from thinwire.core import ThinwireError, checks
from thinwire.core.checks import Check, of_type, shown, whole
from thinwire.methods.given import method_of
from thinwire.session.optimizers import Optimizers, Several

ORDER = "the model comes first and the method second: attach(model, thinwire.dgc(), optimizer=optimizer)"


def unwrapped(given: Any) -> Any:
    """Return the DDP model inside a ``torch.compile`` wrapper, and everything else unchanged."""
    inner = getattr(given, "_orig_mod", None)
    return inner if isinstance(inner, DistributedDataParallel) else given


def model_of(model: Any, groups: bool) -> nn.Module:
    """Return the model to attach to, if it is one; ``groups``: True if a process group is initialized."""
    if not isinstance(model, nn.Module):
        raise ThinwireError(f"model is {_wrong_model(model)}")
    if isinstance(model, nn.DataParallel):
        raise ThinwireError(
            "the model is a DataParallel, which is one process and exchanges no gradients; start a process for each "
            "device (torchrun) and wrap the model in DistributedDataParallel"
        )
    if not groups:
        raise ThinwireError(
            "there is no process group; call torch.distributed.init_process_group(...) first, in processes that "
            "torchrun starts (thinwire.simulate(...) needs neither)"
        )
    return model


def _wrong_model(given: Any) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}; make a model of it, and wrap it in DistributedDataParallel"
    if isinstance(given, torch.optim.Optimizer):
        return f"an optimizer, {type(given).__name__}; {ORDER}"
    if parameters := _parameters(given):
        return f"{parameters}; pass the model itself"
    try:
        name = method_of(given).name
    except ThinwireError:
        return f"{shown(given)}; {ORDER}"
    return f"a method, {name}; {ORDER}"


def inside(model: nn.Module) -> str:
    """Return the part of an error text that names a DDP model inside another module; empty if there is none."""
    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]  # pyright: ignore[reportUnknownArgumentType]
    names = [name for name, module in modules if isinstance(module, DistributedDataParallel)]
    return f"; attach to the DistributedDataParallel inside of it, model.{names[0]}" if names else ""


def optimizer_of(name: str, given: Any) -> Any:
    """Return the given optimizer, ``Several`` optimizers, or None, if it is one of these."""
    if given is None or isinstance(given, (torch.optim.Optimizer, Several)):
        return given
    example = "pass the optimizer that steps, e.g. optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)"
    if isinstance(given, type):
        kind = given.__name__
        raise ThinwireError(f"{name} is the class {kind}; call it: {kind}(model.parameters(), lr=0.1)")
    if isinstance(given, nn.Module):
        raise ThinwireError(f"{name} is a model, {type(given).__name__}; {example}")
    if parameters := _parameters(given):
        raise ThinwireError(f"{name} is {parameters}; {example}")
    raise ThinwireError(f"{name} is {shown(cast(object, given))}; {example}")


def _parameters(given: Any) -> str | None:
    """Return a text about parameters that were given instead of what holds them; None for anything else."""
    if inspect.isgenerator(given):
        return "a generator, such as model.parameters()"
    if isinstance(given, Tensor):
        return f"a {type(given).__name__}"
    return f"a {type(given).__name__} of {len(given)}" if isinstance(given, (list, tuple)) else None  # pyright: ignore[reportUnknownArgumentType]


def _having(*names: str, says: str) -> Check:
    """Return a check that passes None, and objects with these methods."""

    def check(name: str, given: Any) -> Any:
        if given is not None and (isinstance(given, type) or not all(hasattr(given, key) for key in names)):
            raise ThinwireError(f"{name} is {shown(given)}; {says}")
        return given

    return check


def _nodes(name: str, given: Any) -> Any:
    if given is None or isinstance(given, DeviceMesh):
        return given
    return whole(1, says="it is the ranks of a node, e.g. 8, or a DeviceMesh of two dimensions")(name, given)


def _group(name: str, given: Any) -> Any:
    if given is None or given is dist.GroupMember.NON_GROUP_MEMBER:
        return given
    says = "pass the ranks that train the model: dist.group.WORLD, or what dist.new_group(ranks) answers"
    return of_type(dist.ProcessGroup, says)(name, given)


OPTIONS: dict[str, Check] = {
    "seed": checks.seed,
    "emulate_link": Link.read,
    "scaler": _having("get_scale", "is_enabled", says="pass the GradScaler of the run: torch.amp.GradScaler(...)"),
    "on_nonfinite": checks.one_of("skip", "raise", "zero"),
    "on_lost": checks.one_of("error", "continue"),
    "timeout": checks.seconds,
    "kernels": checks.one_of("auto", "reference", "cpu", "cuda"),
    "ranks_per_node": _nodes,
    "process_group": _group,
    "sparse_gradients": checks.flag,
    "policy": _having("after_step", says="pass a policy with after_step(session), e.g. thinwire.policies.LGreCo()"),
}


def options(**given: Any) -> dict[str, Any]:
    """Return the options of ``attach`` or ``simulate``, checked and converted."""
    return {name: OPTIONS[name](name, value) for name, value in given.items()}


def check_held(named: Sequence[tuple[str, Tensor]], optimizer: Optimizers | None) -> None:
    """Raise a ``ThinwireError`` if the optimizer holds no parameter of the model."""
    if optimizer is None:
        return
    held = [cast(Tensor, param) for group in optimizer.param_groups for param in group["params"]]
    known = {id(param) for param in held}
    if any(id(param) in known for _, param in named):
        return
    if isinstance(named[0][1], DTensor) and not any(isinstance(param, DTensor) for param in held):
        raise ThinwireError(
            "the optimizer was built before fully_shard(), which replaced the parameters by sharded ones, so it would "
            "step what the model no longer uses; build the optimizer after fully_shard()"
        )
    raise ThinwireError(
        f"the optimizer holds none of the model's parameters (e.g. {named[0][0]!r}); build it of this model, after "
        "whatever replaces its parameters"
    )
