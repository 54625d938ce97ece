"""What the benchmarks against other stores say: who is first, the page, its pictures, the document."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import results_page
from peers import causes, document
from peers.charts import charts, placed
from peers.drawing import svg
from peers.filing import newest
from peers.protocol import BEFORE
from peers.report import circumstances, page
from peers.table import rankings


def found(peer_name: str, target: float, ms: float, recall: float) -> dict[str, Any]:
    record = {"section": "search", "what": "ids", "target": target, "peer": peer_name, "ms": ms, "recall": recall}
    return {**record, "p50": ms, "p95": 2 * ms, "p99": 3 * ms}


def curve(peer_name: str, ms: float, recall: float) -> dict[str, Any]:
    return {"section": "search", "what": "curve", "peer": peer_name, "ms": ms, "recall": recall}


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """A run that was never made: ours second at 0.95, first at 0.99; one misses the recall, one failed."""
    facts = {"kind": "store", "synced": True, "default_is_synced": True, "knobs": [1, 2], "knob": "ef"}
    about = {"versions": {"m": "1.0"}, "settings": "<b>bold</b>", "durability": "synced"}
    names = ["memevolve-gpu", "qdrant-edge", "zvec", "hnswlib"]
    peers = {name: {**facts, **about, "kind": "library" if name == "hnswlib" else "store"} for name in names}
    machine = {"date": "2026-01-01", "model": "A & B", "cores": 2, "memory_gb": 8, "system": "Linux", "python": "3.11"}
    heading = {
        "section": "machine",
        "command": "scripts/benchmark",
        "machine": {**machine, "sync_ms": 0.2},
        "data": "made up",
        "size": 1000,
        "dimension": 16,
        "seed": 1,
        "queries": {"judged by": 10, "calibrated on": 10},
        "plan": {"block": 25, "passes": 5},
        "threads": {"affinity": "one core"},
        "peers": peers,
    }
    rows = [
        heading,
        found("memevolve-gpu", 0.95, 0.4, 0.96),
        found("qdrant-edge", 0.95, 0.2, 0.951),
        found("zvec", 0.95, 0.1, 0.93),
        found("hnswlib", 0.95, 0.05, 0.95),
        found("memevolve-gpu", 0.99, 0.5, 0.995),
        found("qdrant-edge", 0.99, 1.5, 0.99),
        curve("memevolve-gpu", 0.4, 0.96),
        curve("memevolve-gpu", 0.5, 0.99),
        curve("memevolve-gpu", 0.6, 0.98),
        {"section": "reopen", "peer": "memevolve-gpu", "memory_mb": 10.0, "answer_s": 0.1, "disk_mb": 3.0},
        {"section": "scaling", "peer": "memevolve-gpu", "size": 1000, "search_ms": 0.1},
        {"section": "scaling", "peer": "memevolve-gpu", "size": 10_000, "search_ms": 0.2},
        {
            "section": "scaling",
            "peer": "memevolve-gpu",
            "curve": "search_ms",
            "exponent": 0.3,
            "residual": 0.0,
            "from": 1000,
            "to": 10_000,
        },
        {"section": "mixed", "peer": "zvec", "error": "mixed: <hung>"},
    ]
    return [{"run": "r", **row} for row in rows]


def test_rows_say_who_is_ahead_and_by_how_much(records: list[dict[str, Any]]) -> None:
    verdicts = {ranking.row.title: ranking.verdict for ranking in rankings(records)}
    assert verdicts["search, ids, recall@10 0.95"] == "qdrant-edge ahead, 2.00 times"
    assert verdicts["search, ids, recall@10 0.95, libraries too"] == "hnswlib ahead, 8.00 times"
    assert verdicts["search, ids, recall@10 0.99"] == "first, qdrant-edge follows at 3.00 times"
    assert verdicts["resident memory"] == "alone"


def test_who_misses_the_recall_is_shown_but_not_ranked(records: list[dict[str, Any]]) -> None:
    (ranking,) = (one for one in rankings(records) if one.row.title == "search, ids, recall@10 0.95")
    assert [(entry.peer, entry.ranked) for entry in ranking.entries] == [
        ("qdrant-edge", True),
        ("memevolve-gpu", True),
        ("zvec", False),
    ]


def test_the_page_needs_nothing_else_and_hides_nothing(records: list[dict[str, Any]]) -> None:
    html = page(records)
    assert not re.search(r"(?:src|href)=|https?:|@import|url\(", html)
    assert "qdrant-edge ahead, 2.00 times" in html
    assert "mixed: &lt;hung&gt;" in html
    assert "&lt;b&gt;bold" in html
    assert "A &amp; B" in html
    assert html.count("<svg") == len(charts(records)) == 5


def test_every_picture_is_well_formed_and_has_all_points(records: list[dict[str, Any]]) -> None:
    for chart in charts(records):
        tree = ET.fromstring(svg(chart))
        marks = len(tree.findall(".//circle")) + len(tree.findall(".//rect"))
        points = sum(len(series.points) for series in chart.series)
        assert marks == points + (0 if chart.kind == "bars" else len(chart.series))
        numbers = [float(node.get("cx", node.get("x", "0"))) for node in tree.iter()]
        assert all(0 <= number <= 860 for number in numbers)


def test_a_setting_that_another_beats_in_both_is_left_out_of_the_picture(records: list[dict[str, Any]]) -> None:
    (recall,) = (chart for chart in charts(records) if chart.key == "recall")
    assert [series.points for series in recall.series] == [((0.96, 2500.0), (0.99, 2000.0))]


def test_each_section_is_that_of_the_newest_run_that_has_it(tmp_path: Path) -> None:
    lines = [
        {"run": "1", "section": "machine"},
        {"run": "1", "section": "search", "peer": "a"},
        {"run": "1", "section": "mixed", "peer": "a"},
        {"run": "2", "section": "machine"},
        {"run": "2", "section": "search", "peer": "b"},
        {"run": "2", "section": "end"},
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert newest(file) == [lines[0], *lines[2:]]


def test_the_section_is_put_between_its_marks(records: list[dict[str, Any]], tmp_path: Path) -> None:
    made = document.section(records, tmp_path)
    text = f"# Title\n\n{document.BEGIN}\nold\n{document.END}\n\nafter\n"
    assert document.patched(text, made) == f"# Title\n\n{document.BEGIN}\n{made}\n{document.END}\n\nafter\n"
    assert "| qdrant-edge ahead, 2.00 times |" in made
    with pytest.raises(ValueError, match="needs the lines"):
        document.patched("# Title", made)


def test_the_document_shows_what_the_committed_run_measured(repository: Path) -> None:
    assert repository / "docs" / "explanation" / "peers.md" == document.DOCUMENT
    text = document.DOCUMENT.read_text(encoding="utf-8")
    results = repository / "benchmarks" / "results" / "peers.jsonl"
    assert document.patched(text, document.section(newest(results), results.parent)) == text


def test_every_row_that_is_lost_has_a_cause(records: list[dict[str, Any]], tmp_path: Path, repository: Path) -> None:
    made = document.section(records, tmp_path)
    lost = [ranking for ranking in rankings(records) if not ranking.first]
    assert [ranking.row.title for ranking in lost] == [
        line.split(" | ")[0].removeprefix("| ") for line in made.split("| what | ahead | why |")[1].splitlines()[2:]
    ]
    assert f"first in {len(rankings(records)) - len(lost)} of {len(rankings(records))} rows" in made
    committed = newest(repository / "benchmarks" / "results" / "peers.jsonl")
    for ranking in [*lost, *(one for one in rankings(committed) if not one.first)]:
        assert causes.cause_of(ranking) != causes.UNKNOWN, ranking.row.title


def test_an_older_state_of_this_store_is_shown_beside_and_never_ranked(records: list[dict[str, Any]]) -> None:
    about = {"peers": {BEFORE: records[0]["peers"]["memevolve-gpu"]}}
    old = {**found(BEFORE, 0.95, 0.01, 1.0), "run": "r"}
    (ranking,) = (
        one
        for one in rankings([*records, {**records[0], **about}, old])
        if one.row.title.endswith("ids, recall@10 0.95")
    )
    assert (ranking.before and ranking.before.value, ranking.verdict) == (0.01, "qdrant-edge ahead, 2.00 times")


def test_of_questions_not_seen_before_the_lower_recall_counts(records: list[dict[str, Any]]) -> None:
    asked = {"section": "unseen", "target": 0.95, "run": "r", "ms": 1.0, "recall": 0.97}
    rows = [
        {**asked, "peer": "memevolve-gpu", "recall_in": 0.99, "recall_out": 0.95},
        {**asked, "peer": "zvec", "ms": 0.1, "recall_in": 1.0, "recall_out": 0.94},
    ]
    ranking = next(one for one in rankings([*records, *rows]) if one.row.section == "unseen")
    assert [(entry.peer, entry.ranked) for entry in ranking.entries] == [("memevolve-gpu", True), ("zvec", False)]
    assert ranking.verdict == "alone"


def test_a_run_of_growth_is_labelled_with_its_own_sizes(records: list[dict[str, Any]]) -> None:
    second = [{**records[0], "run": "s"}, {"run": "s", "section": "scaling", "peer": "zvec", "size": 3000}]
    second += [{"run": "s", "section": "scaling", "peer": "zvec", "size": 70_000}, {"run": "s", "section": "end"}]
    assert circumstances(records[0], [*records, *second]).startswith("1,000 units, 16 dimensions")
    assert circumstances(second[0], [*records, *second]).startswith("growth at 3,000, 70,000 units")


def test_the_axis_of_recall_keeps_values_near_one_apart() -> None:
    places = [placed(value, "recall") for value in (0.9, 0.99, 0.999, 1.0)]
    steps = [after - before for before, after in pairwise(places)]
    assert steps[:2] == pytest.approx([1.0, 1.0])
    assert steps[2] > 0.3


def test_the_page_of_a_verdict_has_a_colour(records: list[dict[str, Any]]) -> None:
    html = page(records)
    for kind in set(re.findall(r'<span class="(\w+)">', html)):
        assert re.search(rf"(?m)(^|[}};])\.{kind}\{{color:", html), f"no rule colours span.{kind}"
    assert html.index("<svg") < html.index("<table"), "a picture comes first"
    assert "prefers-color-scheme:dark" in html


def test_the_page_of_results_links_every_figure(repository: Path) -> None:
    results = repository / "benchmarks" / "results"
    files = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()} - {"index.html"}
    assert set(re.findall(r'href="([^"]+)"', results_page.page(results))) == files
    committed = (results / "index.html").read_text(encoding="utf-8")
    assert committed == results_page.page(results), "run python benchmarks/results_page.py"
    for name in re.findall(r'(?:href|src)="([^"]+)"', committed):
        assert (results / name).is_file(), name
