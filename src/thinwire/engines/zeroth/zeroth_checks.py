"""Checks of what ``ZerothOrder`` is given, made before anything is sent."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.parallel import DistributedDataParallel

from thinwire.core.checks import of_type, shown
from thinwire.core.errors import ThinwireError

GROUP = of_type(dist.ProcessGroup, "pass the ranks that train the model, e.g. dist.group.WORLD")
MESH = of_type(DeviceMesh, 'pass init_device_mesh("cpu", (2, 4), mesh_dim_names=("pert", "data"))')


def check_ranks(group: Any, mesh: Any) -> None:
    """Check the process group or the mesh.

    Raises:
        ThinwireError: both are given, or one is something else.
    """
    if group is not None and mesh is not None:
        raise ThinwireError("process_group= and mesh= both say who trains the model; leave one of them out")
    if group is dist.GroupMember.NON_GROUP_MEMBER or (mesh is not None and MESH("mesh", mesh).get_coordinate() is None):
        raise ThinwireError("this rank is in neither process_group nor mesh; call ZerothOrder on their ranks only")
    if group is not None:
        GROUP("process_group", group)


def model_of(model: Any, ranks: bool) -> nn.Module:
    """Check the model.

    Args:
        ranks: True if a process group or a mesh is given.

    Raises:
        ThinwireError: it is no model, or wrapped.
    """
    if not isinstance(model, nn.Module):
        raise ThinwireError(f"model is {shown(model)}; pass the model itself, a torch.nn.Module")
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        raise ThinwireError(
            f"the model is a {type(cast(object, model)).__name__}, which exchanges gradients, and there are none; pass "
            "the model inside of it, model.module"
        )
    if not ranks and dist.is_initialized() and dist.get_world_size() > 1:
        raise ThinwireError(
            f"there are {dist.get_world_size()} ranks, and neither process_group= nor mesh= says which of them train "
            "the model; pass process_group=dist.group.WORLD, or a group of this rank alone"
        )
    return model


def device_of(
    param: Tensor, blocks: Sequence[nn.Module] | None, device: torch.device | str | None, node: Any
) -> torch.device:
    """Return the device that the model computes on.

    Raises:
        ThinwireError: there are blocks and no device, or the other way round, or there is no such device.
    """
    if blocks is None:
        if device is not None or node is not None:
            raise ThinwireError(
                "device= and node= are for blocks=, whose parameters lie in CPU memory between their passes; pass "
                "blocks=model.transformer.h, or leave them out"
            )
        return param.device
    if device is None:
        raise ThinwireError('blocks= needs device=, on which they compute; pass device="cuda", or "cpu" for a trial')
    if node is not None:
        GROUP("node", node)
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ThinwireError(f"device is {shown(device)}, which is not there: {error!s:.100}; pass another") from error


def keeps_statistics(module: nn.Module) -> bool:
    """Return True if a forward pass in training mode changes the module."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def check_statistics(modules: Sequence[nn.Module]) -> None:
    """Check that no module's running statistics would change.

    Raises:
        ThinwireError: one of them is in training mode.
    """
    for one in modules:
        if one.training:
            raise ThinwireError(
                f"a {type(one).__name__} is in training mode, where each forward pass changes its running statistics, "
                "on every rank in another way; call model.eval() before the step"
            )


def number(loss: Any) -> float:
    """Return the closure's loss as a float.

    Raises:
        ThinwireError: it is no number.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return float(loss.item())
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        return float(loss)
    shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else shown(loss)
    raise ThinwireError(f"the closure returned {shape}; it must return one number, the mean loss of the batch")
