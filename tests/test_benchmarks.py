"""Every benchmark runs, tiny, so that none can rot."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks import convex, lgreco
from benchmarks.gpu import page, sections
from benchmarks.gpu.found import Found
from benchmarks.same_bits.comparing import difference

from thinwire.report import results

ROOT = Path(__file__).parents[1]
checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="another revision needs git")


def run(tmp_path, *command):
    """What ``python -m benchmarks.*`` wrote, as {(case, metric): value}."""
    argv = [sys.executable, "-m", *command, "--json", str(tmp_path / "out.json")]
    subprocess.run(argv, check=True, timeout=120, cwd=ROOT, capture_output=True)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    return {(row["case"], row["metric"]): row["value"] for row in rows}


def test_soak(tmp_path):
    figures = {metric: value for (_, metric), value in run(tmp_path, "benchmarks.soak", "--steps", "40").items()}
    assert figures["ratio"] > 10
    assert figures["resident_bytes_late"] > 0
    assert figures["threads_late"] == figures["threads_early"]


def test_step(tmp_path):
    """Without a lab, on the loopback."""
    options = ["--models", "tiny", "--links", "none", "--rounds", "1", "--steps", "1"]
    figures = run(tmp_path, "benchmarks.step", *options, "--plot", str(tmp_path / "out.png"))
    for method in ["local", "dense", "local_sgd", "dense_sgd", "fp16", "bf16", "powersgd1", "powersgd4", "dgc"]:
        assert figures[f"tiny/2/none/{method}", "step_ms"] > 0
    assert figures["tiny/2/none/dense", "ratio_to_dense"] == 1.0
    assert 0 < figures["tiny/2/none/dgc", "wire_bytes"] < 0.1 * 4 * 3 * 96 * 97
    assert (tmp_path / "out.png").stat().st_size > 0


def test_checks(tmp_path):
    figures = run(tmp_path, "benchmarks.checks", "--models", "tiny", "--rounds", "2")
    for metric in ("step_ms", "look_ms", "save_ms", "load_ms", "look_share", "save_ratio", "load_ratio"):
        assert figures["tiny", metric] > 0


@checkout
def test_before_after(tmp_path):
    figures = run(
        tmp_path, "benchmarks.before_after", "--model", "tiny", "--methods", "dgc", "--rounds", "1", "--steps", "1"
    )
    assert figures["dgc", "before_ms"] > 0
    assert figures["dgc", "after_over_before"] > 0


@checkout
def test_same_bits(tmp_path):
    """Of ``dense()`` alone, whose bits are DDP's at every revision."""
    options = ["HEAD", "--cells", "dense*/sim3/reference", "--json", str(tmp_path / "out.json")]
    argv = [sys.executable, "-m", "benchmarks.same_bits", *options]
    done = subprocess.run(argv, timeout=120, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 cells equal, 0 differ" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["before"] == found["after"]
    assert len(found["after"]["dense/sim3/reference"]["params"]) == 5


def test_same_bits_says_what_differs():
    before = {"params": ["a", "b"], "states": {"w/residual": "a", "w/momentum": "b"}, "bytes": [[1.0]]}
    after = {"params": ["a", "c"], "states": {"w/residual": "c", "w/velocity": "b"}, "bytes": [[2.0]]}
    error, other = ({"error": kind, "said": "no"} for kind in ("ThinwireError", "TypeError"))
    assert difference(before, before) == difference(error, error) == ""
    changed = difference(before, after)
    assert changed.startswith("params from step 2 of 2 on, states: 1 of 2 (w/residual), 1 of 2 gone (w/momentum), ")
    assert changed.endswith("new (w/velocity), bytes (1.0, now 2.0)")
    assert difference(before, error) == "no error before, ThinwireError (no) after"
    assert "TypeError" in difference(error, other)


def test_codec(tmp_path):
    """Whatever depends on k alone is held to its bounds here as well: on a message of 1,000 elements, not 25,600."""
    plot = str(tmp_path / "out.png")
    figures = run(tmp_path, "benchmarks.codec", "--numel", "1000000", "--rounds", "1", "--plot", plot)
    bits = {case: value for (case, metric), value in figures.items() if metric == "bits_per_element"}
    lost = {case: value for (case, metric), value in figures.items() if metric == "error"}
    assert bits["indices/entropy/0.001"] < bits["indices/rice/0.001"] <= 11.6
    assert bits["indices/elias_fano/0.001"] <= 12.0
    assert bits["message/int4/0.001"] <= 17.0
    assert bits["message/sign/0.001"] <= 13.5
    assert lost["message/sign/0.001"] > lost["message/int2/0.001"] > lost["message/int4/0.001"] > 0
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_kernels(tmp_path):
    options = ["--elements", "300000", "--threads", "1", "--rounds", "1", "--plot", str(tmp_path / "out.png")]
    figures = run(tmp_path, "benchmarks.kernels", *options)
    for case in ["copy", "dgc/cpu", "dgc/reference", "dgc/abs_topk", "dgc/cpu_bf16_grad", "dgc/cpu_bf16_state"]:
        assert figures[f"{case}/1", "ratio_to_ref"] > 0


@pytest.mark.alone
def test_gpu(tmp_path):
    """The benchmarks on the CPU, tiny."""
    written = tmp_path / "page.md"
    only = "machine,kernels,step of the mlp"
    figures = run(tmp_path, "benchmarks.gpu", "--device", "cpu", "--tiny", "--only", only, "--out", str(written))
    for case in ("copy", "kernel/fp32", "kernel_and_selection/bf16", "dgc/bf16", "dgc_reference/fp32", "abs_topk/fp32"):
        assert figures[f"0.3M/{case}", "ratio_to_floor"] > 0
    for case in ("mlp/sgd/dgc_ddp", "mlp/sgd/powersgd_hook"):
        assert figures[case, "ratio_to_local"] > 0
    assert figures["mlp/sgd/dense_1gbit", "step_ms"] > figures["mlp/sgd/local", "step_ms"]
    assert "Nothing failed." in written.read_text()


def test_gpu_survives_what_fails(tmp_path):
    """A section that fails, one that hangs and one that dies are said, with what they had found before."""
    found = Found(str(tmp_path / "before.json"), "cpu", 60.0)
    found.put("a", "ms", [1.0])
    assert found.attempt("b", lambda: 1 / 0) is None
    failing = f"shutil.copy({str(tmp_path / 'before.json')!r}, path)"
    found.failed.clear()
    found.path = str(tmp_path / "good.json")
    found.write()
    good = f"shutil.copy({str(tmp_path / 'good.json')!r}, path)"
    ends = {
        "raises": failing,
        "hangs": f"{good}; time.sleep(60)",
        "dies": f"{good}; os.abort()",
        "goes on": good,
    }
    code = "import os, shutil, sys, time; path = sys.argv[sys.argv.index('--json') + 1]; "
    each = [sections.Section(name, ["-c", code + end], 10.0) for name, end in ends.items()]
    outcomes = sections.run_all([(each, 2, time.monotonic() + 60)], tmp_path)
    assert all([row.value for row in one.rows] == [1.0] for one in outcomes)
    failed = {one.name: [said for _, said in one.failed] for one in outcomes}
    assert "ZeroDivisionError" in failed["raises"][0]
    assert "cut after 10 s" in failed["hangs"][0]
    assert "exit code -6" in failed["dies"][0]
    assert failed["goes on"] == []
    page.write(tmp_path / "page.md", results.meta("0", device="A Device"), outcomes)
    page.write(tmp_path / "page.md", results.meta("0", device="A Device"), outcomes)
    text = (tmp_path / "page.md").read_text()
    assert "**3 failed.**" in text
    assert "`raises: b`: ZeroDivisionError: division by zero" in text
    assert text.count("## Earlier") == 1
    assert page.slug("NVIDIA H200") == "nvidia-h200"


def test_gpu_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    argv = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(argv, check=True, timeout=60, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert "no CUDA here" in done.stdout


def test_exchange(tmp_path):
    """Two workers on the loopback: that the model of bytes holds, not that of seconds."""
    options = ["--workers", "2", "--links", "none", "--rounds", "3", "--hidden", "64", "--blocks", "2"]
    figures = run(tmp_path, "benchmarks.exchange", *options, "--plot", str(tmp_path / "out.png"))
    assert figures["two_phase/none/2/0.01", "measured_s"] > 0
    assert figures["all_gather/none/2/0.01", "modelled_s"] > 0
    assert 0 < figures["two_phase/1024/0.01", "bytes"] < figures["all_gather/1024/0.01", "bytes"] / 5
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_convergence(tmp_path):
    options = ["--cases", "dense", "dgc_int4", "--seeds", "1", "--steps", "8", "--workers", "2", "--hidden", "64"]
    figures = run(tmp_path, "benchmarks.convergence", *options)
    assert 0 < figures["dgc_int4", "wire_bytes"] < figures["dense", "wire_bytes"]
    assert figures["dgc_int4", "heldout_loss"] != figures["dense", "heldout_loss"]


def test_convergence_with_adamw(tmp_path):
    options = ["--model", "transformer", "--cases", "dense", "ef21_sgdm_1%", "--seeds", "1", "--steps", "6"]
    figures = run(tmp_path, "benchmarks.convergence", *options, "--workers", "2")
    assert 0 < figures["ef21_sgdm_1%", "wire_bytes"] < figures["dense", "wire_bytes"] / 5
    assert figures["ef21_sgdm_1%", "heldout_loss"] != figures["dense", "heldout_loss"]


def test_sharded(tmp_path):
    options = ["--cases", "plain", "scatter_8", "gather_8", "--seeds", "1", "--steps", "3", "--width", "16"]
    figures = run(tmp_path, "benchmarks.sharded", *options)
    assert figures["scatter_8", "share_of_gradients"] <= 0.27
    assert figures["gather_8", "share_of_parameters"] <= 0.27
    assert figures["scatter_8", "heldout_loss"] != figures["plain", "heldout_loss"]


def test_onebit(tmp_path):
    options = ["--steps", "8", "--seeds", "1", "--width", "16", "--length", "16", "--workers", "2"]
    figures = run(tmp_path, "benchmarks.onebit", *options)
    assert figures["adam", "ratio"] < 1.1
    for case in ("onebit_adam", "zeroone_adam"):
        assert 1.0 < figures[case, "heldout_loss"] < 6.0
    assert figures["onebit_adam", "ratio_compressed"] > 5


def test_zeroth(tmp_path):
    options = ["--steps", "6", "--base-steps", "3", "--width", "16", "--length", "16", "--batch", "4"]
    figures = run(tmp_path, "benchmarks.zeroth", *options)
    for case in ("full", "offloaded", "ddp_2", "pertp_2", "lora"):
        assert figures[case, "replay_is_equal"] == 1.0
        assert figures[case, "wire_bytes"] <= 8 < figures[case, "model_bytes"]
        assert figures[case, "loss_after"] != figures[case, "loss_before"]
    assert figures["offloaded", "loss_after"] == figures["full", "loss_after"]
    assert figures["pertp_2", "loss_after"] == figures["full", "loss_after"]


def test_local(tmp_path):
    options = ["--recipes", "sparse_loco", "muloco", "mean_adamw_topk", "--periods", "2", "--steps", "4"]
    options += ["--rates", "0.001", "--workers", "2", "--seeds", "1"]
    figures = run(tmp_path, "benchmarks.local", *options)
    dense = figures["transformer/dense@4", "bits"]
    for case in ("lstm/sparse_loco/2@4", *(f"transformer/{name}/2@4" for name in options[1:4])):
        assert 0 < figures[case, "bits"] < dense
        assert figures[case, "held_out"] > 0
    assert run(tmp_path, "benchmarks.local", *options) == figures  # from the file


def test_overlap(tmp_path):
    """Without a lab, on the loopback."""
    options = ["--link", "none", "--width", "64", "--every", "2", "--rounds", "1", "--turns", "1"]
    figures = run(tmp_path, "benchmarks.overlap", *options)
    for case in ("local", "blocking", "delayed", "co2"):
        assert figures[case, "over_local"] > 0


def test_lgreco(tmp_path):
    """Without CIFAR-10 the ResNet is left out."""
    options = ["--seeds", "1", "--steps", "12", "--every", "5", "--looks", "2", "--workers", "2", "--hidden", "24"]
    figures = run(tmp_path, "benchmarks.lgreco", *options)
    assert {case for case, _ in figures} == {"lstm/topk", "lstm/maxmin", "lstm/powersgd"}
    for case in ("lstm/topk", "lstm/maxmin", "lstm/powersgd"):
        assert 0 < figures[case, "bytes_plan"] <= figures[case, "bytes_uniform"]
        assert 0 < figures[case, "error_ratio"] < 2
        assert 0 < figures[case, "share"] < figures[case, "share_here"] < 1


def test_lgreco_resnet():
    """A step on what stands in for CIFAR-10, so that the ResNet can't rot either."""
    model = lgreco.resnet(8, 2)
    assert len([layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]) == 14 + 2
    assert model(torch.zeros(3, 3, 32, 32)).shape == (3, 10)


def test_convex(tmp_path):
    options = ["--sets", "synthetic", "--rounds", "60", "--steps", "40", "--multiples", "16"]
    options += ["--uneven", "synthetic", "--stochastic", "synthetic", "--plot", str(tmp_path / "out.png")]
    figures = run(tmp_path, "benchmarks.convex", *options)
    assert (
        0 < figures["exact/synthetic/16x/ef21", "grad_norm2_60"] < figures["exact/synthetic/16x/ef14", "grad_norm2_60"]
    )
    assert figures["stochastic/synthetic/4x/ef21_sgdm", "grad_norm2"] > 0
    assert figures["uneven/synthetic/ef21_w", "grad_norm2_end"] < figures["uneven/synthetic/ef21", "grad_norm2_end"]
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_convex_on_phishing():
    """EF21 converges where error feedback stalls: the data is next to the repository, or this is skipped."""
    data = convex.load("phishing", ROOT.parent / "shared" / "data")
    if data is None:
        pytest.skip("../shared/data/libsvm_phishing.npz is not there")
    problem = convex.Problem.of(*data)
    assert problem.step(1) == pytest.approx(0.020161, rel=1e-4)
    assert convex.exact(problem, "ef21", 1, 16.0, 600)[-1] < 1e-8
    assert convex.exact(problem, "ef14", 1, 16.0, 600)[-1] > 1e-6
