"""A bounded run of the coverage-guided fuzzer; ``fuzz_frame.py`` says how to run it for longer."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="the fuzzer runs where atheris has a wheel")


def test_the_fuzzer_finds_nothing(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "fuzz_frame.py"), "-runs=30000", "-max_len=400"]
    done = subprocess.run(
        [*command, "-rss_limit_mb=1500", "-print_final_stats=1"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 30000 runs" in done.stderr
    assert int(re.search(r"peak_rss_mb: +(\d+)", done.stderr)[1]) < 1000
