"""What is shipped: the source archive, its metadata, and links that hold outside of the repository."""

import os
import re
import subprocess
import sys
import tarfile
from email import message_from_bytes
from pathlib import Path

import pytest

import thinwire

ROOT = Path(__file__).parents[1]
BASE = "https://github.com/thinwire/thinwire/blob/main/"
SHIPPED = ("src", "tests", "docs", "examples", "benchmarks")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The unpacked source archive."""
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(folder / f"thinwire-{thinwire.__version__}.tar.gz") as packed:
        packed.extractall(folder, filter="data")
    return folder / f"thinwire-{thinwire.__version__}"


def test_the_source_archive_is_complete(archive):
    wanted = {"constraints.txt", "Makefile", "LICENSE", "pyproject.toml"}
    wanted |= {f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")} | {"CITATION.cff"}
    wanted |= {
        path.relative_to(ROOT).as_posix()
        for folder in SHIPPED
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".md", ".c", ".typed")
    }
    packed = {path.relative_to(archive).as_posix() for path in archive.rglob("*") if path.is_file()}
    assert wanted <= packed, sorted(wanted - packed)
    assert not [name for name in packed if name.startswith((".venv", ".ci", "demo/")) or "__pycache__" in name]


def test_the_tests_of_the_source_archive_run(archive):
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_architecture.py",
        "tests/test_sizes.py",
    ]
    where = {**os.environ, "PYTHONPATH": str(archive / "src")}
    done = subprocess.run(run, cwd=archive, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_metadata(archive):
    found = message_from_bytes((archive / "PKG-INFO").read_bytes())
    assert {line.split(",")[0] for line in found.get_all("Project-URL")} >= {
        "Homepage",
        "Documentation",
        "Issues",
        "Changelog",
    }
    assert "Programming Language :: Python :: 3.11" in found.get_all("Classifier")
    needed = found.get_all("Requires-Dist")
    assert {"cli", "cpu", "all", "zstd"} <= set(found.get_all("Provides-Extra"))
    for extra in ("cpu", "cli", "all"):
        assert any(one.startswith("numba") and f"extra == '{extra}'" in one for one in needed), needed


def test_links_of_the_readme_are_absolute():
    text = (ROOT / "README.md").read_text()
    inline = re.findall(r"\]\(([^)]+)\)", text)
    defined = dict(re.findall(r"^\[(`[^`]+`)\]: (\S+)$", text, re.MULTILINE))
    assert inline
    assert defined
    for link in (*inline, *defined.values()):
        assert link.startswith("https://"), link
        if link.startswith(BASE):
            assert (ROOT / link.removeprefix(BASE)).exists(), link
    assert set(re.findall(r"\[(`[^`]+\.(?:md|py)`)\]", text)) == set(defined)


def test_the_version_is_one():
    assert f"## {thinwire.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {thinwire.__version__}\n" in (ROOT / "CITATION.cff").read_text()
