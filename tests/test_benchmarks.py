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


def test_codec(tmp_path):
    """Whatever depends on k alone is held to its bounds here as well: on a message of 1,000 elements, not 25,600."""
    command = [sys.executable, "-m", "benchmarks.codec", "--numel", "1000000", "--rounds", "1"]
    command += ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[1], capture_output=True)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    bits = {row["case"]: row["value"] for row in rows if row["metric"] == "bits_per_element"}
    lost = {row["case"]: row["value"] for row in rows if row["metric"] == "error"}
    assert bits["indices/entropy/0.001"] < bits["indices/rice/0.001"] <= 11.6
    assert bits["indices/elias_fano/0.001"] <= 12.0
    assert bits["message/int4/0.001"] <= 17.0
    assert bits["message/sign/0.001"] <= 13.5
    assert lost["message/sign/0.001"] > lost["message/int2/0.001"] > lost["message/int4/0.001"] > 0
    assert (tmp_path / "out.png").stat().st_size > 1000
