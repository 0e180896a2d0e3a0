"""Version checks for frameworks that may be missing or too old."""

import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from thinwire.core.errors import ThinwireError


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


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
