"""Plain words: docstrings begin with a verb or a noun; words that need a guide stay out of code and docs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUESTIONS = re.compile(r"(What|Whether|How|Where|Who|When|Those)\b")
WORDS = {
    r"departures|class Departures": "bucket scheduler",
    r"[Aa]rrivals": "gradient hooks",
    r"landed": "completed",
    r"verdicts?": "step status",
    r"lanes?": "local ranks",
    r"keepers": "checkpoint group",
    r"mirrored": "replicated estimate",
    r"succession|hand_on|handed_on": "migrate",
    r"[Hh]andover|hand-over": "momentum transfer",
    r"Joint|Partner": "optimizer link",
    r"cuttable": "splittable",
    r"denser": "scaled density",
    r"rehears\w*": "warm up kernels",
    r"packer": "decoding compressor",
    r"brought": "side data",
    r"any_beside|norm_beside": "across shards",
    r"any_inside|mean_inside|sent_inside|inside_bytes": "within the node",
    r"[Tt]alk": "control channel",
    r"settle": "as meant: update residual, complete, resolve",
    r'"carried"': "pending residual",
    r"route_together": "pipeline.route",
    r"is_bad|not_finite": "nonfinite",
}
DEMO = {"src/thinwire/cli/main.py", "src/thinwire/cli/demo_report.py", "src/thinwire/report/html.py"}
ELSEWHERE = {"verdicts?": DEMO}  # the sentence that the demo's page begins with


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "name", "module"), ast.get_docstring(node) or ""


def test_docstrings_begin_with_a_verb_or_a_noun():
    questions = [(path.name, name) for path in SOURCES for name, text in docstrings(path) if QUESTIONS.match(text)]
    assert questions == []


@pytest.mark.parametrize("word", WORDS)
def test_old_words_are_gone(word):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in [*SOURCES, *PAGES]
        if path.relative_to(ROOT).as_posix() not in ELSEWHERE.get(word, ())
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(rf"(?<![\w-])(?:{word})(?![\w-])", line)
    ]
    assert found == [], f"say {WORDS[word]!r}"
