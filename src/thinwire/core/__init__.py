"""Core types that every other package uses."""

from thinwire.core.chain import Chain
from thinwire.core.context import NOWHERE, Context
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor, Memory, Payload, Role, Slot, State, Traits
from thinwire.core.registry import register
from thinwire.core.tensors import Decompressed, Dense, Sparse, flat

__all__ = [
    "NOWHERE",
    "Chain",
    "Compressor",
    "Context",
    "Decompressed",
    "Dense",
    "Memory",
    "Payload",
    "Role",
    "Slot",
    "Sparse",
    "State",
    "ThinwireError",
    "Traits",
    "flat",
    "register",
]
