import json
from html import escape

import pytest

from thinwire.cli import demo_report, demo_runs
from thinwire.cli.demo_training import CaseResult, Point, Settings
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
    plots = [html.Plot("p", "x", "y", {"one": ([0, 1], [2, 3])}), html.Bars("q", "x", {"one": (2, evil)})]
    text = html.page(evil, evil, evil, [html.Table([evil], [[evil]], evil)], plots, {evil: evil}, [evil])
    assert "<script" not in text
    assert text.count("<svg") == 2
    assert "src=" not in text


def test_the_page_fits_a_phone(tmp_path, chromium):
    """At 400 px nothing is cut off: every cell of a wide table is in sight, with its column's name before it."""
    columns = [f"a long name of column {i}" for i in range(8)]
    wide = html.Table(columns, [["1,234,567,890 bytes"] * 8] * 3)
    page = html.page("t", "v", "i " * 200, [wide], [html.Bars("b", "x", {"one": (1.0, "1,000")})], {}, ["x" * 500])
    frame = f'<iframe id="phone" width="400" height="800" srcdoc="{escape(page)}"></iframe>'
    look = """<p id="seen"></p><script>window.onload = () => {
        const phone = document.getElementById("phone").contentDocument, cells = [...phone.querySelectorAll("td")];
        const inside = cells.filter(c => c.getBoundingClientRect().right <= 400 && c.offsetHeight > 0).length;
        const named = getComputedStyle(cells[1], "::before").content;
        document.getElementById("seen").textContent =
            `${phone.documentElement.scrollWidth <= 400} ${inside} of ${cells.length} ${named}`; }</script>"""
    (tmp_path / "page.html").write_text(frame + look)
    dom, console = chromium(tmp_path / "page.html")
    assert 'true 24 of 24 "a long name of column 1: "' in dom.replace("&quot;", '"'), dom[-300:]
    assert "CONSOLE" not in console, console


def _case(case, steps, warmup, loss):
    points = [Point(0.0, 0, 4.0), Point(1.0, steps, loss)]
    split = {"compute": 1.0, "compress": 2.0, "decompress": 0.5}
    return CaseResult(case, steps, points, [0.01] * steps, warmup, 1e6 / steps, 1e6, steps / 10, split_ms=split)


@pytest.mark.parametrize("steps", [1, 39, 40])
def test_a_demo_that_ends_in_its_warm_up_says_so(steps):
    cases = [_case("dense", 10, 0, 3.0), _case("dgc", steps, 40, 2.0)]
    rows = demo_runs.rows(cases)
    text = demo_report.html_page(cases, Settings(), rows, results.meta("0"))
    assert demo_report.table(rows).rows[1][0] == "dgc (warm-up)"
    assert "Too short for a verdict" in demo_report.verdict(cases, Settings())
    assert f"dgc did {steps} steps and its warm-up takes 40" in text
    assert text.count("(warm-up)") == 2  # in the table, and at its bar


def test_the_verdict_names_the_lowest_loss():
    done = [_case("dense", 10, 0, 3.0), _case("dgc", 41, 40, 2.0)]
    assert demo_report.table(demo_runs.rows(done)).rows[1][0] == "dgc"
    assert "dgc reached the lowest held-out loss (dense 3.000, dgc 2.000)" in demo_report.verdict(done, Settings())
    assert "4.1 times the steps of dense" in demo_report.verdict(done, Settings())
    lost = [_case("dense", 10, 0, 1.0), _case("dgc", 41, 40, 2.0)]
    assert "leave compression off" in demo_report.verdict(lost, Settings())
    meta = results.meta("0.1")
    page = demo_report.html_page(lost, Settings(), demo_runs.rows(lost), meta)
    for said in (meta["command"], "thinwire 0.1", results.cpu(), "2 cores" if meta["cores"] == 2 else "cores", "rest"):
        assert escape(said) in page
