import json

import pytest

from thinwire.report import html, results
from thinwire.report.ledger import Ledger, StepRow


def ledger():
    book = Ledger("topk", 4, "gloo")
    book.note("a note")
    book.note("a note")
    for step in range(3):
        book.add(StepRow(step, "topk", 10.0, 1000.0, 5.0, 800.0, send_seconds=0.002, error=0.5 if step == 0 else None))
    return book


def test_ledger_totals_and_table(tmp_path):
    book = ledger()
    assert book.ratio == 100
    text = book.markdown()
    for expected in ("| topk |", "100.0", "160.0", "2.00", "0.5000", "- a note"):
        assert expected in text
    assert text.count("a note") == 1
    book.write_jsonl(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_an_empty_ledger():
    assert "no step yet" in Ledger("dense", 2, "gloo").markdown()
    assert Ledger("dense", 2, "gloo").ratio == 1


def test_results_shape(tmp_path):
    results.write(tmp_path / "r.json", results.meta("0", more=1), [results.Row("a", "m", 1.0, 0.5, 2.0)])
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["rows"] == [{"case": "a", "metric": "m", "value": 1.0, "low": 0.5, "high": 2.0}]
    assert data["meta"]["more"] == 1


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "a & b", 'say "x"'])
def test_the_page_escapes_and_needs_no_network(evil):
    plots = [html.Plot("p", "x", "y", {"one": ([0, 1], [2, 3])}), html.Plot("q", "x", "y", {"one": ([0], [2])}, True)]
    text = html.page(evil, evil, plots, [evil], [[evil]], {evil: evil})
    assert "<script" not in text
    assert text.count("<svg") == 2
    assert "src=" not in text
