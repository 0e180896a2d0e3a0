"""The site: every public name has an entry, every page is in it, and the code of its guides runs."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import thinwire
from thinwire.core import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ["core", "compressors", "memories", "methods", "optim", "policies"]
PARTS = [
    "engines.simulator.Simulation", "comm.link.Link", "coding.frame.encode", "coding.frame.decode",
    "methods.theory.xi", "methods.theory.ef21_step", "methods.theory.ef21_pp_step",
    "methods.theory.logistic_smoothness", "engines.zeroth.replay",
]  # fmt: skip
INTEGRATIONS = ["accelerate", "frameworks", "lightning", "per_rank_files", "torchft", "trainer"]
ALONE = ["choose-a-method", "how-it-works", "local-updates", "write-a-compressor"]
"""Guides whose code runs in one process."""
TOGETHER = ["quick-start", "checkpoints", "from-pytorch-hooks", "troubleshooting"]
"""Guides whose code runs in two, which have a process group already."""
ELSEWHERE = {"engines": "tests/engines/test_engines_docs.py", "from-deepspeed": "tests/test_readme.py"}
"""Guides whose code another test runs."""
WITHOUT = ["architecture", "benchmarks", "index", "methods", "trust"]
"""Guides without Python in them."""


def _blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)


def _run(page):
    names = {"__name__": "docs_page"}
    for i, block in enumerate(_blocks(page)):
        exec(compile(block, f"docs/{page}.md, block {i}", "exec"), names)


def _run_on_a_rank(rank, page, folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        names = {"__name__": "docs_page", "print": lambda *_: None}
        for i, block in enumerate(_blocks(page)):
            block = block.replace('dist.init_process_group("gloo")\n', "")  # the worlds of the tests have done it
            exec(compile(block, f"docs/{page}.md, block {i}", "exec"), names)
        return [name for name, value in names.items() if isinstance(value, thinwire.Session)]
    finally:
        os.chdir(before)


def test_every_guide_is_run_by_a_test_or_has_no_python():
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert pages == {*ALONE, *TOGETHER, *ELSEWHERE, *WITHOUT}
    assert [page for page in WITHOUT if _blocks(page)] == []
    assert [page for page in (*ALONE, *TOGETHER) if not _blocks(page)] == []
    assert [test for test in ELSEWHERE.values() if not (ROOT / test).exists()] == []


@pytest.mark.parametrize("page", ALONE)
def test_guides(page, monkeypatch):
    monkeypatch.setattr(registry, "COMPRESSORS", dict(registry.COMPRESSORS))  # a page registers its own
    _run(page)


@pytest.mark.parametrize("page", TOGETHER)
def test_guides_with_a_process_group(page, world2, tmp_path):
    assert world2.run(_run_on_a_rank, page, str(tmp_path), timeout=120.0)[0]


def _entries():
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    named = set(re.findall(r"^\.\. (?:auto\w+|py:\w+):: ([\w.]+)", text, re.MULTILINE))
    for module in re.findall(r"^\.\. automodule:: ([\w.]+)\n   :members:", text, re.MULTILINE):
        named |= {f"{module}.{name}" for name in _public(importlib.import_module(module))}
    return named


def _public(module):
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def test_every_public_name_has_an_entry():
    wanted = {f"thinwire.{name}" for name in thinwire.__all__}
    for package in PACKAGES:
        wanted |= {f"thinwire.{package}.{name}" for name in getattr(thinwire, package).__all__}
    wanted |= {f"thinwire.{part}" for part in PARTS}
    for name in INTEGRATIONS:
        module = importlib.import_module(f"thinwire.integrations.{name}")
        wanted |= {f"{module.__name__}.{part}" for part in _public(module)}
    assert sorted(wanted - _entries()) == []


def test_the_list_of_integrations_is_complete():
    files = (ROOT / "src" / "thinwire" / "integrations").glob("[!_]*.py")
    assert sorted(path.stem for path in files) == INTEGRATIONS


def test_every_entry_exists():
    for entry in _entries():
        assert pkgutil.resolve_name(entry) is not None, entry


def test_files_that_the_guides_name_exist():
    folders = [ROOT, ROOT / "src" / "thinwire", ROOT / "benchmarks" / "results"]
    for page in [*ALONE, *TOGETHER, "benchmarks"]:
        for name in re.findall(r"`([\w/]+(?:\.(?:py|md)|/))`", (DOCS / f"{page}.md").read_text()):
            if name not in {"train.py"}:  # the reader's own
                assert any((folder / name).exists() for folder in folders), f"{page}: {name}"


def _texts():
    """Every text in the sources, with {} for what stands in it."""
    for path in (ROOT / "src" / "thinwire").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)


def test_messages_that_troubleshooting_quotes_are_in_the_sources():
    page = (DOCS / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| `(.+?)`( \(PyTorch\))? \|", page, re.MULTILINE)
    quoted = [message for message, elsewhere in rows if not elsewhere]
    assert len(quoted) > 50
    texts = "\n".join(_texts())
    missing = [q for q in quoted if not re.search(re.escape(q).replace(re.escape("..."), ".*"), texts)]
    assert missing == []


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", "docs", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api" / "thinwire.html").exists()
