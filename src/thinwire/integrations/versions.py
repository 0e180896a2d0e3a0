"""What an integration needs of a framework that may not be there, or may be too old."""

import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from thinwire.core.errors import ThinwireError


def framework(module: str, extra: str, least: str) -> Any:
    """Import a framework, or say what to install.

    Args:
        module: what is imported, e.g. ``"lightning.pytorch"``.
        extra: the extra of thinwire that brings it, which is also the name of its distribution.
        least: the oldest version that does what is needed here.

    Raises:
        ImportError: it is not installed.
        ThinwireError: it is older than ``least``.

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
    except PackageNotFoundError:  # a build whose distribution has another name, as a nightly one
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
