"""The one exception of the package."""


class ThinwireError(Exception):
    """Something asked of thinwire cannot be done; the message names the value, the limit and the way out."""
