"""Optimizers that are part of a method: they choose which exchanges are dense and step with the memory's output."""

from thinwire.optim.onebit_adam import OneBitAdam, ZeroOneAdam
from thinwire.optim.onebit_lamb import OneBitLamb

__all__ = ["OneBitAdam", "OneBitLamb", "ZeroOneAdam"]
