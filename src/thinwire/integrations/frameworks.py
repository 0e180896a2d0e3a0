"""Parts that the integrations share: checks of a framework, and how to attach to the model that it has wrapped."""

import importlib
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from thinwire import Compressor, Method, Rule, Session, ThinwireError, attach


def framework(module: str, extra: str, least: str) -> Any:
    """Import a framework, or raise an error that says what to install.

    Args:
        module: the module to import, e.g. ``"lightning.pytorch"``.
        extra: the extra of thinwire that installs it; also the name of its distribution.
        least: the oldest version that works.

    Raises:
        ImportError: the framework is not installed.
        ThinwireError: the framework is older than ``least``.

    Example::

        accelerate = framework("accelerate", "accelerate", "1.0")
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this integration needs {extra}, which can't be imported ({error}); pip install 'thinwire[{extra}]'"
        ) from error
    try:
        there = version(extra)
    except PackageNotFoundError:  # e.g. a nightly build, whose distribution has another name
        there = getattr(found, "__version__", least)
    check_version(extra, there, least)
    return found


def check_version(name: str, found: str, least: str) -> None:
    """Refuse a framework that is too old.

    Raises:
        ThinwireError: ``found`` is older than ``least``.
    """
    if _numbers(found) < _numbers(least):
        raise ThinwireError(
            f"{name} {found} is installed, and this integration needs {least} or later; upgrade it, or call "
            "thinwire.attach() on the wrapped model and save wire.state_dict() on each rank"
        )


def check_processes(who: str, processes: int, way_out: str) -> None:
    """Raise a ``ThinwireError`` if ``who``, e.g. "the Trainer", has only 1 process."""
    if processes == 1:
        raise ThinwireError(f"{who} has 1 process, so nothing is exchanged and the model is not wrapped; {way_out}")


def ddp_within(model: nn.Module) -> nn.Module:
    """Return the DDP model within ``model``, e.g. one that was compiled; without one, ``model`` itself."""
    return next((part for part in model.modules() if isinstance(part, DistributedDataParallel)), model)


def attach_within(
    model: nn.Module,
    method: Method | Compressor | Rule,
    optimizer: torch.optim.Optimizer | None,
    scaler: Any,
    options: dict[str, Any],
) -> Session:
    """Attach to the DDP model within ``model``; ``scaler`` is the framework's, unless ``options`` have another."""
    return attach(ddp_within(model), method, optimizer=optimizer, **{"scaler": scaler, **options})


def warn_of_clipping(method: Method, setting: str, off: str) -> None:
    """Warn that a framework clips after the exchange, which loses gradient if the method sends pending residuals."""
    if any(rule.memory.stateful for rule in method.rules):
        warnings.warn(
            f"{setting} clips after the exchange, where the gradient of {method.name} is a burst of what was held "
            f"back, and what is cut off there is lost; set {off}, and clip on each rank by the method: "
            "thinwire.dgc(clip=)",
            stacklevel=3,
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
