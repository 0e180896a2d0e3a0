"""Optimizers that are part of a method: they say which exchanges are dense, and take what the memory hands them."""

from thinwire.optim.onebit_adam import OneBitAdam, ZeroOneAdam
from thinwire.optim.onebit_lamb import OneBitLamb

__all__ = ["OneBitAdam", "OneBitLamb", "ZeroOneAdam"]
