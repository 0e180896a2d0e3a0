"""Changes of parameters' strides, dtypes, shapes and devices since attach: followed if possible, else an error."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinwire.core.errors import ThinwireError
from thinwire.core.sharding import own, real_strides
from thinwire.core.tensors import is_dense
from thinwire.session.session import Session

Lies: TypeAlias = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]
DTYPE, DEVICE, SHAPE, STRIDES = range(4)


class Layouts:
    """The known layouts of some parameters.

    Args:
        again: the advice in the error for a change that can't be followed.
    """

    def __init__(self, named: Mapping[str, Tensor], again: str) -> None:
        self.again = again
        self.known: list[tuple[Tensor, str, Lies]] = [(param, name, _lies(param)) for name, param in named.items()]

    def check(self, session: Session) -> bool:
        """Follow changed strides; returns True if any have changed, and then it is a collective call.

        Raises:
            ThinwireError: something has changed that can't be followed; nothing has been sent.
        """
        for param, _, (dtype, device, shape, stride) in self.known:
            if param.stride() != stride or param.dtype != dtype or param.shape != shape or param.device != device:
                self._follow(session)
                return True
        return False

    def _follow(self, session: Session) -> None:
        now = [(param, name, _lies(param)) for param, name, _ in self.known]
        moved: dict[str, tuple[int, ...]] = {}
        for (param, name, was), (_, _, lies) in zip(self.known, now, strict=True):
            if lies != was:
                self._check(param, name, was, lies)
                moved[name] = real_strides(param, was[-1])
        session.follow(moved)
        self.known = now

    def _check(self, param: Tensor, name: str, was: Lies, lies: Lies) -> None:
        part = next(part for part in (SHAPE, DTYPE, DEVICE, STRIDES) if lies[part] != was[part])
        if part == STRIDES and is_dense(own(param)) and not isinstance(param, DTensor):
            return
        kept = ", with what is pending: state = wire.state_dict() before, and wire.load_state_dict(state) after"
        raise ThinwireError(
            f"parameter {name!r} was {_shown(was, part)} at attach and is {_shown(lies, part)} now, which what is "
            f"remembered of it can't follow; {self.again}{kept if part != SHAPE else ''}"
        )


def _lies(param: Tensor) -> Lies:
    return param.dtype, param.device, param.shape, param.stride()


def _shown(lies: Lies, part: int) -> str:
    dtype, device, shape, strides = lies
    return (f"{dtype}", f"on {device}", f"of shape {tuple(shape)}", f"of strides {strides}")[part]
