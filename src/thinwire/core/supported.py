"""Supported parameters: strided tensors of a dtype in which gradients can be summed.

A complex tensor is exchanged as twice as many real numbers, which is exact for linear compressors and memories.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor, Memory
from thinwire.core.sharding import own

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


def check_parameter(name: str, param: Tensor) -> None:
    """Check that a trained parameter can be exchanged, by whatever method, without reading its values."""
    if is_lazy(param):
        raise ThinwireError(
            f"parameter {name!r} has no shape yet (a lazy module): run one forward pass on every rank, then attach"
        )
    freeze = "or freeze it, with requires_grad_(False)"
    if param.layout != torch.strided:
        kind = str(param.layout).removeprefix("torch.")
        raise ThinwireError(
            f"parameter {name!r} has the layout {kind}; gradients of strided parameters alone can be exchanged: make "
            f"it dense, with to_dense(), {freeze}"
        )
    mine: Any = own(param) if isinstance(param, DTensor) else param
    own_way = type(mine).__torch_dispatch__ is not cast(Any, Tensor).__torch_dispatch__
    if own_way and not hasattr(mine, "fake_mode"):  # a fake tensor stands for an ordinary one
        raise ThinwireError(
            f"parameter {name!r} is a {type(mine).__name__}, a tensor that holds others, whose gradient can't be told "
            f"from them: make it an ordinary tensor, {freeze}"
        )
    if param.is_quantized or param.dtype not in (*REAL, *COMPLEX):
        raise ThinwireError(
            f"parameter {name!r} is {said(param.dtype)}, in which gradients can't be added up; of "
            f"{', '.join(map(said, (*REAL, *COMPLEX)))} they can: keep it in one of these, {freeze}"
        )
    grads: Any = getattr(param, "grad_dtype", None)
    if grads not in (None, param.dtype):
        raise ThinwireError(
            f"parameter {name!r} is {said(param.dtype)} and has gradients in {said(grads)} (grad_dtype); they must be "
            "of one dtype: leave grad_dtype as it is"
        )
    if param.is_inference():
        raise ThinwireError(
            f"parameter {name!r} was made under torch.inference_mode(), where autograd can't follow it; make the model "
            "outside, or replace it by a clone() of it"
        )


def check_complex(name: str, param: Tensor, method: str, compressor: Compressor, memory: Memory) -> None:
    """Check that the rule of a complex parameter treats real and imaginary parts separately."""
    if param.is_complex() and not (compressor.traits.linear and memory.linear):
        pair = f"{type(compressor).__name__} with {type(memory).__name__}"
        raise ThinwireError(
            f"parameter {name!r} is {said(param.dtype)}, and {method} has {pair} for it, which is for real numbers; "
            f"send it as it is: keep_dense=[{name!r}] where {method} takes that, or a rule in front of the others, "
            f"Rule(Cast(), NoMemory(), match={name!r})"
        )


def said(dtype: torch.dtype) -> str:
    """Return the name of a dtype."""
    return str(dtype).removeprefix("torch.")


def parts(name: str, x: Tensor) -> list[tuple[str, Tensor]]:
    """Return the strided tensors that ``x`` is made of: itself, or the parts of a sparse or wrapper tensor."""
    if x.layout == torch.sparse_coo:
        inner = {"indices": x._indices(), "values": x._values()}  # pyright: ignore[reportPrivateUsage]
    elif x.layout in (torch.sparse_csr, torch.sparse_bsr):
        inner = {"crow_indices": x.crow_indices(), "col_indices": x.col_indices(), "values": x.values()}
    elif x.layout in (torch.sparse_csc, torch.sparse_bsc):
        inner = {"ccol_indices": x.ccol_indices(), "row_indices": x.row_indices(), "values": x.values()}
    elif hasattr(x, "__tensor_flatten__") and not isinstance(x, DTensor):
        inner = {key: getattr(x, key) for key in cast(Any, x).__tensor_flatten__()[0]}
    else:
        return [(name, x)]
    return [part for key, tensor in inner.items() for part in parts(f"{name}.{key}", tensor)]
