"""thinwire: train PyTorch over thin wires.

    wire = thinwire.attach(ddp, thinwire.dgc(density=0.001), optimizer=optimizer)

``thinwire.exchange.pipeline`` is the file to read first.
"""

from thinwire._version import __version__
from thinwire.attach import attach
from thinwire.comm.link import Link
from thinwire.compressors.block_topk import BlockTopK
from thinwire.compressors.cast import Cast
from thinwire.compressors.cltk import CLTK
from thinwire.compressors.dct import DctTopK
from thinwire.compressors.natural import Natural
from thinwire.compressors.powersgd import PowerSGD
from thinwire.compressors.quantize import QSGD, Quantize
from thinwire.compressors.randk import RandK
from thinwire.compressors.scaled import Scaled
from thinwire.compressors.sidco import SIDCo
from thinwire.compressors.sign import Sign
from thinwire.compressors.sparse import TopK
from thinwire.compressors.ternary import TernGrad
from thinwire.compressors.threshold import Threshold
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor, Memory
from thinwire.engines.simulator import Simulation, simulate
from thinwire.memories.compressed_momentum import CompressedMomentum, SteadyFeedback
from thinwire.memories.decoupled_momentum import DecoupledMomentum
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory
from thinwire.memories.majority_vote import MajorityVote
from thinwire.memories.momentum import Momentum, MomentumCorrection
from thinwire.memories.shifted import EF21, EControl
from thinwire.methods import (
    cast,
    decoupled_momentum,
    dense,
    dgc,
    econtrol,
    ef14,
    ef21,
    ef21_bc,
    ef21_pp,
    ef21_sgdm,
    ef21_w,
    ef_sign,
    lean,
    maxmin,
    natural,
    onebit_adam,
    onebit_lamb,
    powersgd,
    qsgd,
    randk,
    scalecom,
    sidco,
    signsgd,
    terngrad,
    topk,
    zeroone_adam,
)
from thinwire.methods.method import Method, Rule
from thinwire.methods.warmup import Warmup
from thinwire.optim import OneBitAdam, OneBitLamb, ZeroOneAdam
from thinwire.policies.lgreco import LGreCo
from thinwire.session.session import Session

__all__ = [
    "CLTK",
    "EF21",
    "QSGD",
    "BlockTopK",
    "Cast",
    "CompressedMomentum",
    "Compressor",
    "DctTopK",
    "DecoupledMomentum",
    "EControl",
    "ErrorFeedback",
    "LGreCo",
    "Link",
    "MajorityVote",
    "Memory",
    "Method",
    "Momentum",
    "MomentumCorrection",
    "Natural",
    "NoMemory",
    "OneBitAdam",
    "OneBitLamb",
    "PowerSGD",
    "Quantize",
    "RandK",
    "Rule",
    "SIDCo",
    "Scaled",
    "Session",
    "Sign",
    "Simulation",
    "SteadyFeedback",
    "TernGrad",
    "ThinwireError",
    "Threshold",
    "TopK",
    "Warmup",
    "ZeroOneAdam",
    "__version__",
    "attach",
    "cast",
    "decoupled_momentum",
    "dense",
    "dgc",
    "econtrol",
    "ef14",
    "ef21",
    "ef21_bc",
    "ef21_pp",
    "ef21_sgdm",
    "ef21_w",
    "ef_sign",
    "lean",
    "maxmin",
    "natural",
    "onebit_adam",
    "onebit_lamb",
    "powersgd",
    "qsgd",
    "randk",
    "scalecom",
    "sidco",
    "signsgd",
    "simulate",
    "terngrad",
    "topk",
    "zeroone_adam",
]
