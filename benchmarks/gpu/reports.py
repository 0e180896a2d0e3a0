"""A plugin of pytest that writes down each test as it ends, so that a run that is cut keeps what it has.

pytest -p benchmarks.gpu.reports tests/gpu      # with THINWIRE_REPORTS=FILE: a JSON object a line
"""

import json
import os
from pathlib import Path


def _write(**said: object) -> None:
    if path := os.environ.get("THINWIRE_REPORTS"):
        with Path(path).open("a") as file:
            file.write(json.dumps(said) + "\n")


def pytest_runtest_logstart(nodeid, location):
    _write(test=nodeid, outcome="begun")


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _write(test=report.nodeid, outcome=report.outcome, said=reason, seconds=report.duration)


def pytest_collectreport(report):
    if report.failed:
        _write(test=report.nodeid or "collection", outcome="failed", said=report.longreprtext, seconds=0.0)
