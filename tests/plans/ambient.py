"""Torch's global state around a step, which no method may depend on."""

import contextlib
from collections.abc import Iterator

import torch

KINDS = ("float64", "bfloat16", "autocast", "deterministic")


@contextlib.contextmanager
def ambient(kind: str) -> Iterator[None]:
    """A default dtype, autocast or deterministic mode; "" for nothing."""
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    try:
        if kind == "deterministic":
            torch.use_deterministic_algorithms(True)
        elif kind in ("float32", "float64", "bfloat16"):
            torch.set_default_dtype(getattr(torch, kind))
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
