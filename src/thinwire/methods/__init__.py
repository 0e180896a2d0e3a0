"""The recipes: a method is a few lines over the catalogue's parts."""

from thinwire.methods.basic import IDENTITY, cast, dense, dgc, topk
from thinwire.methods.lowrank import powersgd

__all__ = ["IDENTITY", "cast", "dense", "dgc", "powersgd", "topk"]
