"""Bytes: bits, indices and values as bytes, where they lie in a message, and frames for files and uploads."""
