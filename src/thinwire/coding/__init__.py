"""Bytes: codes for bits, indices and values, the layout of messages, and frames for files and uploads."""
