"""thinwire: train PyTorch over thin wires.

    wire = thinwire.attach(ddp, thinwire.dgc(density=0.001), optimizer=optimizer)

``thinwire.pipeline`` is the file to read first.
"""

from thinwire._version import __version__
from thinwire.compressors.cast import Cast
from thinwire.compressors.sparse import TopK
from thinwire.core import Compressor, Memory
from thinwire.engines.ddp import attach
from thinwire.link import Link
from thinwire.memories.feedback import ErrorFeedback, NoMemory
from thinwire.memories.momentum import Momentum, MomentumCorrection
from thinwire.memories.shifted import EF21, EControl
from thinwire.methods import (
    cast,
    dense,
    dgc,
    econtrol,
    ef14,
    ef21,
    ef21_bc,
    ef21_pp,
    ef21_sgdm,
    ef21_w,
    topk,
)
from thinwire.policy.plan import Method, Rule
from thinwire.policy.schedule import Warmup
from thinwire.session import Session
from thinwire.sim.workers import Simulation, simulate
from thinwire.tensors import ThinwireError

__all__ = [
    "EF21",
    "Cast",
    "Compressor",
    "EControl",
    "ErrorFeedback",
    "Link",
    "Memory",
    "Method",
    "Momentum",
    "MomentumCorrection",
    "NoMemory",
    "Rule",
    "Session",
    "Simulation",
    "ThinwireError",
    "TopK",
    "Warmup",
    "__version__",
    "attach",
    "cast",
    "dense",
    "dgc",
    "econtrol",
    "ef14",
    "ef21",
    "ef21_bc",
    "ef21_pp",
    "ef21_sgdm",
    "ef21_w",
    "simulate",
    "topk",
]
