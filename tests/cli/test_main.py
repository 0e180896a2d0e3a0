"""The two commands, as a user runs them."""

import json
import subprocess
import sys

import pytest

from thinwire.cli.main import cli, main


def command(*args, cwd, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "thinwire", *args], cwd=cwd, timeout=timeout, capture_output=True, text=True
    )


def figures(path):
    data = json.loads(path.read_text())
    assert set(data["meta"]) >= {"command", "versions", "cores", "date"}
    assert all(set(row) == {"case", "metric", "value", "low", "high"} for row in data["rows"])
    return {(row["case"], row["metric"]): row["value"] for row in data["rows"]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = command("demo", "--quick", "--seconds", "3", "--json", "out.json", cwd=folder, timeout=90)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_demo_writes_results(demo):
    folder, done = demo
    found = figures(folder / "out.json")
    assert found == figures(folder / "demo" / "results.json")
    for case in ("dense", "fp16", "dgc"):
        for metric in ("steps", "heldout_loss", "wire_bytes_per_step", "ratio", "ratio_compressed", "step_ms"):
            assert found[case, metric] > 0, (case, metric)
    assert found["dense", "ratio"] == 1
    assert found["fp16", "ratio"] == pytest.approx(2, rel=1e-3), (
        "but for the head, which dense messages of DDP have not"
    )
    assert found["dgc", "ratio_compressed"] > 300
    assert found["dgc", "ratio"] > 10
    assert found["dgc", "steps"] > found["dense", "steps"]
    assert "emulated 100 Mb/s" in done.stdout
    assert "held-out loss" in done.stdout.splitlines()[-2]  # the verdict
    for case in ("dense", "fp16", "dgc"):
        parts = sum(found[case, f"{part}_ms"] for part in ("compute", "compress", "decompress", "rest"))
        assert parts >= 0.999 * found[case, "step_ms"]


def test_report_in_a_real_browser(demo, chromium):
    folder, _ = demo
    dom, console = chromium(folder / "demo" / "report.html")
    assert dom.count("<svg") == 3
    assert "Loss against seconds" in dom
    assert "CONSOLE" not in console, console


def test_simulate(tmp_path):
    done = command(
        "simulate",
        "--workers",
        "4",
        "--steps",
        "8",
        "--hidden",
        "32",
        "--density",
        "0.01",
        "--json",
        "o.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = figures(tmp_path / "o.json")
    assert found["dense", "heldout_loss"] != found["dgc", "heldout_loss"]
    assert found["dgc", "ratio"] > 1
    assert "dense" in done.stdout
    assert "dgc" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo", "--colour"], "No such option"),
        (["demo", "--link", "5parsecs"], "link '5parsecs' is not understood; write a bandwidth"),
        (["demo", "--density", "0"], "0<x<=1"),
        (["demo", "--density", "1.5"], "0<x<=1"),
        (["demo", "--density", "nan"], "not a finite number"),
        (["demo", "--seconds", "inf"], "not a finite number"),
        (["demo", "--workers", "1"], "x>=2"),
        (["demo", "--seconds", "soon"], "not a valid float"),
        (["demo", "--out", "/proc/nowhere"], "can't write /proc/nowhere/results.json"),
        (["simulate", "--json", "/proc/nowhere.json"], "can't write /proc/nowhere.json"),
        (["simulate", "--steps", "0"], "x>=1"),
        (["dream"], "No such command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_options_are_frozen():
    options = {name: sorted(p.name for p in cmd.params) for name, cmd in cli.commands.items()}
    assert options == {
        "demo": ["density", "json_file", "link", "out", "quick", "seconds", "workers"],
        "simulate": ["density", "hidden", "json_file", "seed", "steps", "workers"],
    }
