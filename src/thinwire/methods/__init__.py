"""The recipes: a method is a few lines over the catalogue's parts."""

from thinwire.methods.basic import IDENTITY, cast, dense, dgc, topk
from thinwire.methods.feedback import econtrol, ef14, ef21, ef21_bc, ef21_pp, ef21_sgdm, ef21_w

__all__ = [
    "IDENTITY",
    "cast",
    "dense",
    "dgc",
    "econtrol",
    "ef14",
    "ef21",
    "ef21_bc",
    "ef21_pp",
    "ef21_sgdm",
    "ef21_w",
    "topk",
]
