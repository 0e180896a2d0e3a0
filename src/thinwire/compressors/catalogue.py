"""The catalogue: the name of every compressor and memory, and their way to JSON and back.

A new compressor is one file and one row here.
"""

from dataclasses import asdict
from typing import Any

from thinwire.compressors.cast import Cast
from thinwire.compressors.sparse import TopK
from thinwire.core import Compressor, Memory, ThinwireError
from thinwire.memory import ErrorFeedback, Momentum, MomentumCorrection, NoMemory

COMPRESSORS: dict[str, type[Compressor]] = {"cast": Cast, "topk": TopK}
MEMORIES: dict[str, type[Memory]] = {
    "none": NoMemory,
    "error_feedback": ErrorFeedback,
    "momentum_correction": MomentumCorrection,
    "momentum": Momentum,
}


def to_json(part: Compressor | Memory) -> dict[str, Any]:
    """``{"kind": name, **hyper-parameters}``."""
    for name, kind in (COMPRESSORS | MEMORIES).items():
        if type(part) is kind:
            return {"kind": name, **asdict(part)}  # pyright: ignore[reportArgumentType, reportCallIssue]
    raise ThinwireError(f"{type(part).__name__} is not in the catalogue; add it to thinwire.compressors.catalogue")


def from_json(data: dict[str, Any], rows: dict[str, Any]) -> Any:
    """The compressor or memory that ``to_json`` wrote; ``rows`` is ``COMPRESSORS`` or ``MEMORIES``."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in rows:
        raise ThinwireError(f"kind {kind!r} is not in the catalogue; it has {', '.join(rows)}")
    try:
        return rows[kind](**fields)
    except TypeError as error:
        raise ThinwireError(f"{kind}: {error}") from error
