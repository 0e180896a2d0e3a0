"""Parts that the benchmarks share: a list on the command line, and a figure with its spread."""

import statistics
from collections.abc import Sequence

from thinwire.report.results import Row


def several(text: str) -> list[str]:
    """``a,b`` on the command line."""
    return text.split(",")


def spread(case: str, metric: str, values: Sequence[float]) -> Row:
    """The median, with quartiles."""
    low, middle, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Row(case, metric, middle, low, high)
