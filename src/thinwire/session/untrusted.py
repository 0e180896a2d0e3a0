"""Readers of untrusted checkpoint entries: an entry of a wrong type or size is an error."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinwire.compressors.cast import DTYPES
from thinwire.core.errors import ThinwireError


def read_tensor(value: Any, what: str) -> Tensor:
    """Return an ordinary tensor of a supported dtype, or the local part of a DTensor."""
    tensor: Any = value.to_local() if isinstance(value, DTensor) else value
    ordinary = (
        isinstance(tensor, Tensor) and tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested)
    )
    if not ordinary or type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype not in DTYPES.values():
        kind = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ThinwireError(f"{what} in the checkpoint is {kind}, not a tensor of {', '.join(DTYPES)}")
    if tensor.nbytes > tensor.untyped_storage().nbytes():  # expanded: one number that claims to be a million
        raise ThinwireError(
            f"{what} in the checkpoint is of shape {tuple(tensor.shape)}, with less in it; it is damaged"
        )
    return tensor.detach()


def read_mapping(state: Any, key: str) -> Mapping[str, Any]:
    value = state.get(key) if isinstance(state, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not isinstance(value, Mapping):
        raise ThinwireError(f"the checkpoint has no {key!r}; it is damaged, or not of thinwire")
    if wrong := [name for name in cast(Mapping[Any, Any], value) if not isinstance(name, str)]:
        raise ThinwireError(f"the checkpoint's {key!r} has {shown(wrong[0])} where a name should be; it is damaged")
    return cast(Mapping[str, Any], value)


def read_integer(state: Any, key: str, least: int) -> int:
    value: object = cast(Mapping[Any, Any], state).get(key) if isinstance(state, Mapping) else None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**62:
        raise ThinwireError(f"the checkpoint's {key} is {shown(value)}, not a number from {least} on; it is damaged")
    return value


def shown(value: object, length: int = 40) -> str:
    """Return the start of the value's text, or its type's name if printing it may fail (huge ints, deep lists)."""
    small = value is None or isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 2**128)
    return str(value)[:length] if small else type(value).__name__
