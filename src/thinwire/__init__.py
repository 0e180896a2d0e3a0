"""thinwire: train PyTorch over thin wires.

    wire = thinwire.attach(ddp, thinwire.dgc(density=0.001), optimizer=optimizer)

``thinwire.pipeline`` is the file to read first.
"""

from thinwire._version import __version__
from thinwire.compressors.cast import Cast
from thinwire.compressors.sign import Sign
from thinwire.compressors.sparse import TopK
from thinwire.core import Compressor, Memory
from thinwire.engines.ddp import attach
from thinwire.link import Link
from thinwire.memories.adam import CompressedMomentum, SteadyFeedback
from thinwire.memories.feedback import ErrorFeedback, NoMemory
from thinwire.memories.momentum import Momentum, MomentumCorrection
from thinwire.methods import cast, dense, dgc, onebit_adam, onebit_lamb, topk, zeroone_adam
from thinwire.optim import OneBitAdam, OneBitLamb, ZeroOneAdam
from thinwire.policy.plan import Method, Rule
from thinwire.policy.schedule import Warmup
from thinwire.session import Session
from thinwire.sim.workers import Simulation, simulate
from thinwire.tensors import ThinwireError

__all__ = [
    "Cast",
    "CompressedMomentum",
    "Compressor",
    "ErrorFeedback",
    "Link",
    "Memory",
    "Method",
    "Momentum",
    "MomentumCorrection",
    "NoMemory",
    "OneBitAdam",
    "OneBitLamb",
    "Rule",
    "Session",
    "Sign",
    "Simulation",
    "SteadyFeedback",
    "ThinwireError",
    "TopK",
    "Warmup",
    "ZeroOneAdam",
    "__version__",
    "attach",
    "cast",
    "dense",
    "dgc",
    "onebit_adam",
    "onebit_lamb",
    "simulate",
    "topk",
    "zeroone_adam",
]
