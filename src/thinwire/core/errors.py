"""The one exception of the package."""

from typing import Any


class ThinwireError(Exception):
    """Error of thinwire; the message names the value, the limit and the way out."""

    lost: Any = None
    """After a failed exchange, what is known of the other ranks (``thinwire.comm.liveness.Lost``)."""
