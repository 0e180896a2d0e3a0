"""Every benchmark runs, tiny, so that none can rot."""

import json
import subprocess
import sys
from pathlib import Path


def test_soak(tmp_path):
    command = [sys.executable, "-m", "benchmarks.soak", "--steps", "40", "--json", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[1], capture_output=True)
    figures = {row["metric"]: row["value"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert figures["ratio"] > 10
    assert figures["resident_bytes_late"] > 0
    assert figures["threads_late"] == figures["threads_early"]
