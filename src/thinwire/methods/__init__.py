"""Recipes: each builds a method from a compressor and a memory in a few lines."""

from thinwire.methods.basic import cast, dense, dgc, lean, topk
from thinwire.methods.feedback_family import econtrol, ef14, ef21, ef21_bc, ef21_pp, ef21_sgdm, ef21_w
from thinwire.methods.local_settings import PENALTIES, Local
from thinwire.methods.local_updates import (
    co2,
    diloco,
    local,
    lookahead,
    muloco,
    post_local_sgd,
    slowmo,
    sparse_loco,
    streaming_diloco,
    updates,
)
from thinwire.methods.onebit import onebit_adam, onebit_lamb, zeroone_adam
from thinwire.methods.options import IDENTITY, Options
from thinwire.methods.quantized import ef_sign, maxmin, natural, qsgd, signsgd, terngrad
from thinwire.methods.sparsified import decoupled_momentum, powersgd, randk, scalecom, sidco

__all__ = [
    "IDENTITY",
    "PENALTIES",
    "Local",
    "Options",
    "cast",
    "co2",
    "decoupled_momentum",
    "dense",
    "dgc",
    "diloco",
    "econtrol",
    "ef14",
    "ef21",
    "ef21_bc",
    "ef21_pp",
    "ef21_sgdm",
    "ef21_w",
    "ef_sign",
    "lean",
    "local",
    "lookahead",
    "maxmin",
    "muloco",
    "natural",
    "onebit_adam",
    "onebit_lamb",
    "post_local_sgd",
    "powersgd",
    "qsgd",
    "randk",
    "scalecom",
    "sidco",
    "signsgd",
    "slowmo",
    "sparse_loco",
    "streaming_diloco",
    "terngrad",
    "topk",
    "updates",
    "zeroone_adam",
]
