"""Comparison of the results of two revisions in one cell."""

from collections.abc import Iterator, Mapping
from typing import Any


def refused(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return True if both raised the same kind of error."""
    return "error" in before and before["error"] == after.get("error")


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Which parts differ, and where first; empty where none does."""
    if refused(before, after):
        return ""
    if "error" in before or "error" in after:
        return f"{_outcome(before)} before, {_outcome(after)} after"
    parts = [_params(before["params"], after["params"]), _states(before["states"], after["states"])]
    parts.append(_bytes(before["bytes"], after["bytes"]))
    return ", ".join(part for part in parts if part)


def _outcome(found: Mapping[str, Any]) -> str:
    return f"{found['error']} ({found['said'][:200]})" if "error" in found else "no error"


def _params(before: list[Any], after: list[Any]) -> str:
    if before == after:
        return ""
    first = next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), None)
    return f"params from step {first + 1} of {len(after)} on" if first is not None else "params, in number of steps"


def _states(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    changed = [name for name in before if name in after and before[name] != after[name]]
    gone, new = [name for name in before if name not in after], [name for name in after if name not in before]
    found = ((changed, ""), (gone, " gone"), (new, " new"))
    said = [f"{len(names)} of {len(after)}{what} ({names[0]})" for names, what in found if names]
    return f"states: {', '.join(said)}" if said else ""


def _bytes(before: list[Any], after: list[Any]) -> str:
    if before == after:
        return ""
    old, new = list(_flat(before)), list(_flat(after))
    first = next(((x, y) for x, y in zip(old, new, strict=False) if x != y), (len(old), len(new)))
    return f"bytes ({first[0]}, now {first[1]})"


def _flat(rows: Any) -> Iterator[Any]:
    if isinstance(rows, list):
        for row in rows:
            yield from _flat(row)
    else:
        yield rows
