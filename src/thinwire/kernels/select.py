"""The choice of kernels, made once, at attach, and named in the ledger."""

import importlib.util
import os
from typing import Literal, TypeAlias

import torch

from thinwire.core.errors import ThinwireError
from thinwire.core.loops import Kernels
from thinwire.kernels.reference import REFERENCE

Choice: TypeAlias = Literal["auto", "reference", "cpu", "cuda"]


def choose(choice: Choice, device: torch.device) -> tuple[Kernels, str | None]:
    """Choose the kernels for parameters on ``device``; returns them and a note for the user, or None."""
    if choice not in ("auto", "reference", "cpu", "cuda"):
        raise ThinwireError(f"kernels is {choice!r}; choose 'auto', 'reference', 'cpu' or 'cuda'")
    kind = device.type if choice == "auto" else choice
    missing = None
    if kind == "reference":
        return REFERENCE, None
    if kind not in ("cpu", "cuda"):
        missing = f"there are none for {device.type} tensors"
    elif kind != device.type and not (kind == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"):
        missing = f"the parameters are on {device}"
    elif kind == "cpu" and importlib.util.find_spec("numba") is None:
        missing = "they need numba: pip install 'thinwire[cpu]'"
    elif kind == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "they need triton, which comes with PyTorch for CUDA"
    if missing is None:
        try:
            if kind == "cpu":
                from thinwire.kernels.cpu import Cpu

                return Cpu(), None
            from thinwire.kernels.cuda import Cuda

            return Cuda(), None
        except Exception as error:  # whatever a compiler that does not fit this machine raises
            missing = f"they can't be loaded: {error!r:.200}"
    if choice != "auto":
        raise ThinwireError(f"kernels={choice!r} can't run: {missing}; kernels='auto' takes what there is")
    return REFERENCE, f"kernels are plain PyTorch, which is slower: compiled ones are not used, since {missing}"
