"""Isolation from torch settings of the caller, which must not change what a method computes or sends.

This file switches off the settings of the current thread: autocast, grad and inference mode, a default device, and
every other mode that rewrites calls of torch's functions. A TorchDispatchMode (FlopCounterMode, fake tensors) stays,
since it works below these functions. The default dtype is global, and another thread may be using it, so it stays, and
thinwire names the dtype of every tensor it makes. The precision of matrix products is global too; it is raised
while a method multiplies matrices.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Generator
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_C = cast(Any, torch)._C
CASTS = ("cpu", "cuda", "xpu", "mps")
"""The device types that have their own autocast."""


_precise = threading.Lock()
_short: list[tuple[Any, str]] = []  # the settings to restore
_users = 0


@contextlib.contextmanager
def full_precision() -> Generator[None]:
    """Compute products of float32 matrices in float32, whatever ``set_float32_matmul_precision`` is set to.

    The setting is global: the first thread that enters saves it, and the last that leaves restores it.
    """
    global _users
    backends = cast(Any, torch.backends)
    with _precise:
        for kind in (backends.mkldnn.matmul, backends.cuda.matmul):
            if kind.fp32_precision not in ("none", "ieee"):
                _short.append((kind, kind.fp32_precision))
                kind.fp32_precision = "ieee"
        _users += 1
    try:
        yield
    finally:
        with _precise:
            _users -= 1
            while not _users and _short:
                kind, before = _short.pop()
                kind.fp32_precision = before


class Undisturbed:
    """A context without the caller's torch settings, which it restores at the end. It takes microseconds."""

    __slots__ = ("casts", "grad", "inference", "modes")

    def __enter__(self) -> None:
        self.modes = _C.DisableTorchFunction()  # includes a default device
        self.modes.__enter__()
        self.inference = torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else None
        if self.inference is not None:  # tensors made in it could not be written to outside
            self.inference.__enter__()
        self.grad = torch.is_grad_enabled()
        if self.grad:
            _C._set_grad_enabled(False)  # torch.no_grad() takes five times as long
        self.casts = [kind for kind in CASTS if torch.is_autocast_enabled(kind)]
        for kind in self.casts:
            torch.set_autocast_enabled(kind, False)

    def __exit__(self, *error: Any) -> None:
        for kind in self.casts:
            torch.set_autocast_enabled(kind, True)
        if self.grad:
            _C._set_grad_enabled(True)
        if self.inference is not None:
            self.inference.__exit__(*error)
        self.modes.__exit__(*error)


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap ``function`` to run without the caller's torch settings."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with Undisturbed():
            return function(*args, **kwargs)

    return inside


def undisturbed_methods(kind: type[T]) -> type[T]:
    """Wrap every method of the class ``kind`` by ``undisturbed``, including ``__init__``."""
    for name, member in list(vars(kind).items()):
        if inspect.isfunction(member) and (name == "__init__" or not name.startswith("__")):
            setattr(kind, name, undisturbed(member))
    return kind
