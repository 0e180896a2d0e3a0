"""Optimizers that are part of a method.

Those of the 1-bit family choose which exchanges are dense and step with the memory's output; ``MeanAdamW`` steps with
each worker's own gradient, for an exchange of updates.
"""

from thinwire.optim.mean_adamw import MeanAdamW
from thinwire.optim.onebit_adam import OneBitAdam, OneBitLamb, ZeroOneAdam

__all__ = ["MeanAdamW", "OneBitAdam", "OneBitLamb", "ZeroOneAdam"]
