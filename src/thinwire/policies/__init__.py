"""Policies: who decides beside the path how strongly each parameter is compressed."""

from thinwire.policies.lgreco import LGreCo

__all__ = ["LGreCo"]
