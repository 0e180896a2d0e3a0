"""Zeroth-order training: two forward passes a step, and one scalar between the ranks."""

from thinwire.engines.zeroth.replay_file import replay
from thinwire.engines.zeroth.zeroth_order import ZerothOrder

__all__ = ["ZerothOrder", "replay"]
