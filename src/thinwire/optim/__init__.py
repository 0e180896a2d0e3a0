"""Optimizers that are part of a method: they choose which exchanges are dense and step with the memory's output."""

from thinwire.optim.onebit_adam import OneBitAdam, OneBitLamb, ZeroOneAdam

__all__ = ["OneBitAdam", "OneBitLamb", "ZeroOneAdam"]
