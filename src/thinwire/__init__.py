"""thinwire: train PyTorch over thin wires.

    wire = thinwire.attach(ddp, thinwire.dgc(density=0.001), optimizer=optimizer)

``thinwire.pipeline`` is the file to read first.
"""

from thinwire._version import __version__
from thinwire.compressors.blocks import BlockTopK
from thinwire.compressors.cast import Cast
from thinwire.compressors.dct import DctTopK
from thinwire.compressors.led import CLTK
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
from thinwire.core import Compressor, Memory
from thinwire.engines.attach import attach
from thinwire.lgreco import LGreCo
from thinwire.link import Link
from thinwire.memories.adam import CompressedMomentum, SteadyFeedback
from thinwire.memories.demo import DecoupledMomentum
from thinwire.memories.feedback import ErrorFeedback, NoMemory
from thinwire.memories.momentum import Momentum, MomentumCorrection
from thinwire.memories.shifted import EF21, EControl
from thinwire.memories.vote import MajorityVote
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
from thinwire.optim import OneBitAdam, OneBitLamb, ZeroOneAdam
from thinwire.policy.plan import Method, Rule
from thinwire.policy.schedule import Warmup
from thinwire.session import Session
from thinwire.sim.workers import Simulation, simulate
from thinwire.tensors import ThinwireError

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
