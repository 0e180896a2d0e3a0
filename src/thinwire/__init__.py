"""thinwire: train PyTorch over thin wires.

    wire = thinwire.attach(ddp, thinwire.dgc(density=0.001), optimizer=optimizer)

``thinwire.pipeline`` is the file to read first.
"""

from thinwire._version import __version__
from thinwire.compressors.cast import Cast
from thinwire.compressors.sparse import TopK
from thinwire.core import Compressor, Memory
from thinwire.engines.attach import attach
from thinwire.link import Link
from thinwire.memories.feedback import ErrorFeedback, NoMemory
from thinwire.memories.momentum import Momentum, MomentumCorrection
from thinwire.methods import cast, dense, dgc, topk
from thinwire.policy.plan import Method, Rule
from thinwire.policy.schedule import Warmup
from thinwire.session import Session
from thinwire.sim.workers import Simulation, simulate
from thinwire.tensors import ThinwireError

__all__ = [
    "Cast",
    "Compressor",
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
    "simulate",
    "topk",
]
