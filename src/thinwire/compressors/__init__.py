"""Compressors: they encode a tensor into a payload, and decode it."""

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
