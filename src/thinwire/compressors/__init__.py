"""Compressors: they encode a tensor into a payload, and decode it."""

from thinwire.compressors.block_topk import BlockTopK, DctTopK
from thinwire.compressors.cast import Cast
from thinwire.compressors.powersgd import PowerSGD
from thinwire.compressors.quantize import QSGD, Quantize
from thinwire.compressors.randk import RandK
from thinwire.compressors.rounding import Natural, TernGrad
from thinwire.compressors.scaled import Scaled
from thinwire.compressors.sign import Sign
from thinwire.compressors.sparse import CLTK, TopK
from thinwire.compressors.threshold import SIDCo, Threshold

__all__ = [
    "CLTK",
    "QSGD",
    "BlockTopK",
    "Cast",
    "DctTopK",
    "Natural",
    "PowerSGD",
    "Quantize",
    "RandK",
    "SIDCo",
    "Scaled",
    "Sign",
    "TernGrad",
    "Threshold",
    "TopK",
]
