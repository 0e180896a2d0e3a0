"""thinwire: train PyTorch over thin wires.

    wire = thinwire.attach(ddp, thinwire.dgc(density=0.001), optimizer=optimizer)

``thinwire.exchange.pipeline`` is the file to read first.
"""

from thinwire import compressors, memories, methods, optim, policies
from thinwire._version import __version__
from thinwire.attach import attach
from thinwire.core import Compressor, Memory, ThinwireError, register
from thinwire.engines import zeroth
from thinwire.engines.fsdp2.engine import Fsdp2Options
from thinwire.engines.simulator import simulate
from thinwire.engines.zeroth import ZerothOrder
from thinwire.methods import (
    cast,
    dense,
    dgc,
    diloco,
    econtrol,
    ef21,
    lean,
    maxmin,
    onebit_adam,
    powersgd,
    qsgd,
    scalecom,
    signsgd,
    sparse_loco,
    topk,
    updates,
    zeroone_adam,
)
from thinwire.methods.method import Method, Rule, Warmup
from thinwire.session.session import Session

__all__ = [
    "Compressor",
    "Fsdp2Options",
    "Memory",
    "Method",
    "Rule",
    "Session",
    "ThinwireError",
    "Warmup",
    "ZerothOrder",
    "__version__",
    "attach",
    "cast",
    "compressors",
    "dense",
    "dgc",
    "diloco",
    "econtrol",
    "ef21",
    "lean",
    "maxmin",
    "memories",
    "methods",
    "onebit_adam",
    "optim",
    "policies",
    "powersgd",
    "qsgd",
    "register",
    "scalecom",
    "signsgd",
    "simulate",
    "sparse_loco",
    "topk",
    "updates",
    "zeroone_adam",
    "zeroth",
]


def __getattr__(name: str) -> object:
    """Raise an AttributeError that says where a part stands."""
    for place in (compressors, memories, methods, optim, policies):
        if name in place.__all__:
            raise AttributeError(f"thinwire has no {name}; it is {place.__name__}.{name}")
    raise AttributeError(f"module 'thinwire' has no attribute {name!r}")
