"""Memories: the state of a parameter between steps, such as residuals and momentum."""

from thinwire.memories.compressed_momentum import CompressedMomentum, SteadyFeedback
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory
from thinwire.memories.momentum import Momentum, MomentumCorrection
from thinwire.memories.shifted import EF21, EControl
from thinwire.memories.sign_descent import DecoupledMomentum, MajorityVote

__all__ = [
    "EF21",
    "CompressedMomentum",
    "DecoupledMomentum",
    "EControl",
    "ErrorFeedback",
    "MajorityVote",
    "Momentum",
    "MomentumCorrection",
    "NoMemory",
    "SteadyFeedback",
]
