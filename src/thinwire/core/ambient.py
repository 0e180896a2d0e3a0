"""What is set around a call, by whoever trains, and must change neither what a method computes nor what it sends.

Of torch's settings those that belong to a thread are put aside here: autocast, grad and inference mode, a default
device, and every other mode that rewrites calls of torch's functions (a TorchDispatchMode, as FlopCounterMode and fake
tensors are, stays: it sees operations below them). The default dtype belongs to all threads, of which another may be in
the midst of its own work, so it is left alone, and whatever makes a tensor says its dtype. The precision of products
belongs to all threads, too: it is raised while a method multiplies matrices.
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
"""The kinds of devices that have an autocast of their own."""


_precise = threading.Lock()
_short: list[tuple[Any, str]] = []  # the settings that were put aside
_users = 0


@contextlib.contextmanager
def full_precision() -> Generator[None]:
    """Inside it products of float32 matrices are made in float32, whatever ``set_float32_matmul_precision`` says.

    The setting belongs to all threads: the first that comes in puts it aside, and the last that leaves puts it back.
    """
    global _users
    backends = cast(Any, torch.backends)
    kinds: tuple[Any, ...] = (backends.mkldnn.matmul, backends.cuda.matmul)
    with _precise:
        short: list[tuple[Any, str]] = [
            (kind, kind.fp32_precision) for kind in kinds if kind.fp32_precision not in ("none", "ieee")
        ]
        _users += 1
        _short.extend(short)
        for kind, _ in short:
            kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _precise:
            _users -= 1
            while not _users and _short:
                kind, before = _short.pop()
                kind.fp32_precision = before


class Undisturbed:
    """``with Undisturbed():`` nothing that is set around it counts; afterwards all of it is as it was. Microseconds."""

    __slots__ = ("casts", "grad", "inference", "modes")

    def __enter__(self) -> None:
        self.modes = _C.DisableTorchFunction()  # a default device is such a mode
        self.modes.__enter__()
        self.inference = torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else None
        if self.inference is not None:  # what is made inside could never be written to outside
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
    """``function``, called where nothing that is set around counts."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with Undisturbed():
            return function(*args, **kwargs)

    return inside


def undisturbed_methods(kind: type[T]) -> type[T]:
    """``kind``, every method of which is undisturbed, its making too."""
    for name, member in list(vars(kind).items()):
        if inspect.isfunction(member) and (name == "__init__" or not name.startswith("__")):
            setattr(kind, name, undisturbed(member))
    return kind
