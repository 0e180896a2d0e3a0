"""The catalogue: the name of every compressor and memory, and their way to JSON and back.

A new compressor is one file and one row here.
"""

from dataclasses import fields
from typing import Any, cast

from thinwire.compressors.blocks import BlockTopK
from thinwire.compressors.cast import Cast
from thinwire.compressors.dct import DctTopK
from thinwire.compressors.lowrank import PowerSGD
from thinwire.compressors.natural import Natural
from thinwire.compressors.quantize import QSGD, Quantize
from thinwire.compressors.random import RandK
from thinwire.compressors.scaled import Scaled
from thinwire.compressors.sidco import SIDCo
from thinwire.compressors.sign import Sign
from thinwire.compressors.sparse import TopK
from thinwire.compressors.ternary import TernGrad
from thinwire.compressors.threshold import Threshold
from thinwire.core import Chain, Compressor, Memory
from thinwire.memories.adam import CompressedMomentum, SteadyFeedback
from thinwire.memories.demo import DecoupledMomentum
from thinwire.memories.feedback import ErrorFeedback, NoMemory
from thinwire.memories.momentum import Momentum, MomentumCorrection
from thinwire.memories.shifted import EF21, EControl
from thinwire.memories.vote import MajorityVote
from thinwire.tensors import ThinwireError

COMPRESSORS: dict[str, type[Compressor]] = {
    "cast": Cast,
    "chain": Chain,
    "scaled": Scaled,
    "powersgd": PowerSGD,
    "topk": TopK,
    "randk": RandK,
    "threshold": Threshold,
    "sidco": SIDCo,
    "block_topk": BlockTopK,
    "dct_topk": DctTopK,
    "qsgd": QSGD,
    "quantize": Quantize,
    "terngrad": TernGrad,
    "natural": Natural,
    "sign": Sign,
}
MEMORIES: dict[str, type[Memory]] = {
    "none": NoMemory,
    "error_feedback": ErrorFeedback,
    "momentum_correction": MomentumCorrection,
    "momentum": Momentum,
    "majority_vote": MajorityVote,
    "decoupled_momentum": DecoupledMomentum,
    "ef21": EF21,
    "econtrol": EControl,
    "compressed_momentum": CompressedMomentum,
    "steady_feedback": SteadyFeedback,
}


def to_json(part: Compressor | Memory) -> dict[str, Any]:
    """``{"kind": name, **hyper-parameters}``."""
    for name, kind in (COMPRESSORS | MEMORIES).items():
        if type(part) is kind:
            pairs = ((f.name, getattr(part, f.name)) for f in fields(cast(Any, part)))
            return {"kind": name, **{key: to_json(v) if isinstance(v, Compressor) else v for key, v in pairs}}
    raise ThinwireError(f"{type(part).__name__} is not in the catalogue; add it to thinwire.compressors.catalogue")


def from_json(data: dict[str, Any], rows: dict[str, Any]) -> Any:
    """The compressor or memory that ``to_json`` wrote; ``rows`` is ``COMPRESSORS`` or ``MEMORIES``."""
    own = dict(data)
    kind = own.pop("kind", None)
    if kind not in rows:
        raise ThinwireError(f"kind {kind!r} is not in the catalogue; it has {', '.join(rows)}")
    try:
        return rows[kind](**{key: _part(value) for key, value in own.items()})
    except TypeError as error:
        raise ThinwireError(f"{kind}: {error}") from error


def _part(value: Any) -> Any:
    """A hyper-parameter, which may be a compressor or a list of numbers."""
    if isinstance(value, list):
        return tuple(cast("list[Any]", value))
    return from_json(cast("dict[str, Any]", value), COMPRESSORS) if isinstance(value, dict) else value
