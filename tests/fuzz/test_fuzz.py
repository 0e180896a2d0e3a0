"""Bounded runs of the coverage-guided fuzzers; each target says how to run it for longer."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="the fuzzer runs where atheris has a wheel")


@pytest.mark.parametrize(("name", "runs", "longest"), [("frame", 15_000, 400), ("checkpoint", 6_000, 200)])
def test_the_fuzzer_finds_nothing(tmp_path, name, runs, longest):
    command = [sys.executable, str(Path(__file__).parent / f"fuzz_{name}.py"), f"-runs={runs}", f"-max_len={longest}"]
    done = subprocess.run(
        [*command, "-rss_limit_mb=1500", "-print_final_stats=1"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {runs} runs" in done.stderr
    assert int(re.search(r"peak_rss_mb: +(\d+)", done.stderr)[1]) < 1000
