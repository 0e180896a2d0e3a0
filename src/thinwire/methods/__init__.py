"""The recipes: a method is a few lines over the catalogue's parts."""

from thinwire.methods.basic import IDENTITY, cast, dense, dgc, topk

__all__ = ["IDENTITY", "cast", "dense", "dgc", "topk"]
