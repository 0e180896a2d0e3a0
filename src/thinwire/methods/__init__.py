"""The recipes: a method is a few lines over the catalogue's parts."""

from thinwire.methods.adam import onebit_adam, onebit_lamb, zeroone_adam
from thinwire.methods.basic import IDENTITY, cast, dense, dgc, topk

__all__ = ["IDENTITY", "cast", "dense", "dgc", "onebit_adam", "onebit_lamb", "topk", "zeroone_adam"]
