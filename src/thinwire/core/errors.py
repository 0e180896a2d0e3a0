"""The one exception of the package."""


class ThinwireError(Exception):
    """Error of thinwire; the message names the value, the limit and the way out."""
