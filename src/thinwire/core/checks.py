"""Validation of arguments: clear values are accepted and normalised; others raise an error with the way out.

A check takes the name of an argument and its value, and returns the value as the rest of the code needs it: numpy
numbers become Python numbers, ``4.0`` counts as 4, ``torch.float16`` becomes ``"float16"``. It refuses ambiguous
values: ``"0.01"``, True for a number, NaN, or the density 1, which could mean 1 %.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from numbers import Integral, Real
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from thinwire.core.errors import ThinwireError

Check: TypeAlias = Callable[[str, Any], Any]
"""Function from the name of an argument and its value to the normalised value.

Raises:
    ThinwireError: the value is out of range or of the wrong type.
"""
SHORT = {
    "half": "float16", "fp16": "float16", "f16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32",
    "f32": "float32", "single": "float32", "double": "float64", "fp64": "float64", "f64": "float64",
}  # fmt: skip
"""Other names of dtypes."""


def check_fields(part: object, **checks: Check) -> None:
    """Check the fields of a frozen dataclass and replace them by the normalised values; for ``__post_init__``."""
    for name, check in checks.items():
        object.__setattr__(part, name, check(name, getattr(part, name)))


def shown(value: object) -> str:
    """Return a value's ``repr``, or its type if the ``repr`` is long or fails."""
    try:
        text = repr(value)
    except Exception:  # e.g. an int of 5,000 digits, or a broken object
        text = ""
    return text if 0 < len(text) <= 60 and "\n" not in text else f"of type {type(value).__name__}"


def as_number(name: str, value: Any, meaning: str) -> float:
    """Check a finite number; ``meaning`` is the part of the error that describes valid values."""
    if isinstance(value, (bool, np.bool_)):
        raise ThinwireError(f"{name} is {value}, which is no number; {meaning}")
    if isinstance(value, str):
        raise ThinwireError(f"{name} is the text {shown(value)}; {_instead(value)}{meaning}")
    if not isinstance(value, Real):
        inside = hasattr(cast("object", value), "__float__")  # a tensor, an array, a Decimal
        instead = f"write float({name}) for the number in it: " if inside else ""
        raise ThinwireError(f"{name} is {_kind(value)}; {instead}{meaning}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ThinwireError(f"{name} is {number}; {meaning}")
    return number


def _instead(text: str) -> str:
    """Return a hint for a number in quotes; empty for other texts."""
    text = text.strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    better = f"{number / 100:g} for {text}" if text.endswith("%") else text
    return f"write {better}, without quotes: " if math.isfinite(number) else ""


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}" if not isinstance(value, type) else f"{value!r}"


def real(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False, hint: str = ""
) -> Check:
    """Make a check for a number from ``low`` to ``high``; ``above`` and ``below`` exclude that end."""
    lower = "" if low == -math.inf else f"above {low:g}" if above else f"at least {low:g}"
    upper = "" if high == math.inf else f"below {high:g}" if below else f"at most {high:g}"
    bounds = (
        f"in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}" if lower and upper else lower or upper
    )
    meaning = f"it must be {bounds or 'a number'}{hint}"

    def check(name: str, value: Any) -> float:
        number = as_number(name, value, meaning)
        if not (low < number if above else low <= number) or not (number < high if below else number <= high):
            raise ThinwireError(f"{name} is {shown(value)}; {meaning}")
        return number

    return check


def whole(low: float = -math.inf, high: float = math.inf, *, hint: str = "", says: str = "") -> Check:
    """Make a check for a whole number from ``low`` to ``high``; ``says`` replaces the description in the error."""
    bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
    meaning = says or f"it must be a whole number, {bounds}{hint}"

    def check(name: str, value: Any) -> int:
        number = as_number(name, value, meaning)
        exact = int(value) if isinstance(value, Integral) else int(number)
        if exact != value or not low <= exact <= high:
            raise ThinwireError(f"{name} is {shown(value)}; {meaning}")
        return exact

    return check


seed: Check = whole(says="it must be a whole number, equal on all ranks, e.g. 0")


def share(example: str = "0.01", what: str = "kept/total") -> Check:
    """Make a check for a share in (0, 1], such as a density; it refuses the int 1, which could mean 1 %."""
    meaning = f"it is {what} and must be in (0, 1], e.g. {example}"

    def check(name: str, value: Any) -> float:
        number = as_number(name, value, meaning)
        if isinstance(value, Integral) and number == 1.0:
            raise ThinwireError(f"{name} is 1, which may mean 1 % or all; {meaning}: write 0.01 for 1 %, 1.0 for all")
        if 1.0 < number <= 100.0:
            raise ThinwireError(f"{name} is {shown(value)}; {meaning}: {number:g} % is {number / 100:g}")
        if not 0.0 < number <= 1.0:
            raise ThinwireError(f"{name} is {shown(value)}; {meaning}")
        return number

    return check


def flag(name: str, value: Any) -> bool:
    """Check True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ThinwireError(f"{name} is {shown(value)}; it must be True or False")
    return value is True or bool(cast("Any", value))


def one_of(*names: str) -> Check:
    """Make a check for one of these words."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ThinwireError(f"{name} is {shown(value)}; choose one of {', '.join(names)}")
        return str(value)

    return check


def dtype(names: Sequence[str], also: str = "") -> Check:
    """Make a check for a dtype or code out of ``names``; it also accepts ``torch.float16`` and ``"fp16"``."""

    def check(name: str, value: Any) -> str:
        given = str(value) if isinstance(value, torch.dtype) else value
        if isinstance(given, str):
            given = given.removeprefix("torch.")
            given = given if given in names else SHORT.get(given, given)
        if not isinstance(given, str) or given not in names:
            raise ThinwireError(f"{name} is {shown(value)}; choose one of {', '.join(names)}{also}")
        return given

    return check


def optional(check: Check) -> Check:
    """Make a check that also accepts None."""
    return lambda name, value: None if value is None else check(name, value)


def seconds(name: str, value: Any) -> float:
    """Check a time above 0, in seconds or as a ``timedelta``; returns seconds."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    return real(0.0, above=True, hint=", in seconds, or a timedelta: e.g. 300")(name, number)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Check texts, such as globs. A single text becomes a tuple; a set is sorted, since its order varies by process."""
    wrong = ThinwireError(f"{name} is {shown(value)}; it must be a list of texts, e.g. ['*.bias', 'head.*']")
    if not isinstance(value, Iterable) or isinstance(value, (bytes, bytearray)):
        raise wrong
    given = (value,) if isinstance(value, str) else tuple(cast("Iterable[Any]", value))
    if not all(isinstance(x, str) for x in given):
        raise wrong
    return tuple(sorted(given)) if isinstance(value, (set, frozenset)) else given


def of_type(kinds: type | tuple[type, ...], meaning: str) -> Check:
    """Make a check for an object of one of these types; it has its own error for a class that was not called."""
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)

    def check(name: str, value: Any) -> Any:
        if isinstance(value, type) and issubclass(value, allowed):
            raise ThinwireError(f"{name} is the class {value.__name__}; call it: {value.__name__}(...); {meaning}")
        if not isinstance(value, allowed):
            raise ThinwireError(f"{name} is {_kind(value)}; {meaning}")
        return value

    return check


def called(name: str, value: Any, meaning: str) -> Callable[..., Any]:
    """Check a function."""
    if not callable(value) or isinstance(value, type):
        raise ThinwireError(f"{name} is {_kind(value)}; {meaning}")
    return value
