"""Policies: they decide, outside the exchange, how strongly each parameter is compressed."""

from thinwire.policies.lgreco import LGreCo

__all__ = ["LGreCo"]
