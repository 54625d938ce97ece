"""Every figure in the README and on the page of figures comes from a file under ``benchmarks/results``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import each

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import verdicts

RESULTS = "benchmarks/results"


def read(repository: Path, name: str) -> Any:
    return json.loads((repository / RESULTS / name).read_text())


def rows(repository: Path) -> list[str]:
    """The cells that the page of figures must show, worded from the results."""
    foundation = read(repository, "foundation.json")
    search, filters = foundation["search, ivf, target_recall=0.99"], foundation["filters, ivf, target_recall=0.99"]
    opening, writes = foundation["opening, ivf"], foundation["single writes"]["at all units"]
    two, memory = read(repository, "two_processes.json"), read(repository, "memory_system.json")
    query = memory["query_memory, 5 results"]
    promise, million, months = (read(repository, f"{name}.json") for name in ("promise", "million", "months_of_use"))
    default, ninety_nine = (promise["recall"]["ivf"]["cold"][target] for target in ("0.95", "0.99"))
    large = million["search"]
    return [
        *promised(default, ninety_nine),
        f"{max(line['extra_ms'] for line in promise['small'].values()):.2f} ms",
        f"n^{promise['growth']['exponent']:.2f}",
        (
            f"{large['recall@10 in distribution']:.3f} / {large['recall@10 out of distribution']:.3f} in "
            f"{large['median_ms']:.1f} ms"
        ),
        of_ten_million(read(repository, "ten_million.json")),
        f"{months['worst_recall@10']:.3f}, {months['mapping_errors']} wrong, {months['files']['ratio']:.2f} times",
        f"{months['maintenance']['share_of_cpu']:.0%}, {months['search_ms']['p95_ratio']:.1f} times",
        f"{search['in']['recall@10']:.3f} / {search['out']['recall@10']:.3f}",
        f"{search['in']['ms']['search_vectors']:.2f} ms, {search['in']['share_of_flat']:.2f} of IndexFlat",
        f"{search['in']['payload_extra_ms']:.2f} ms more",
        f"{filters['a third']['in']['share_of_flat']:.2f} / {filters['1 %']['in']['share_of_flat']:.2f} of IndexFlat",
        f"{foundation['bulk store, embeddings given']['units_per_s']:,.0f} units/s",
        f"{writes['store']:.2f} ms, {writes['store/bare']:.1f} times",
        f"{writes['delete']:.2f} ms, {writes['delete/bare']:.1f} times",
        f"{opening['with snapshot']['open_s']:.2f} s / {opening['derived files deleted']['open_s']:.2f} s",
        "{counted_mb_per_1000:.2f} / {resident_mb_per_1000:.2f} MB".format(**opening["with snapshot"]),
        "{operations:,} operations, {lost} lost, {doubled} doubled, p99 of a write's waiting {wait:.1f} ms".format(
            **two, wait=two["write_waiting_ms"]["p99"]
        ),
        soaked(read(repository, "soak.json")),
        f"{query['semantic']['p95_ms']:.1f} ms / {query['hybrid, weighted']['p95_ms']:.1f} ms",
    ]


def of_ten_million(ten: Any) -> str:
    """Recall and time at both targets, what building took, and what it takes to hold."""
    low, high, memory = ten["search asked 0.95"], ten["search asked 0.99"], ten["resident_growth_mb"]
    assert ten["stored"] == ten["index"]["rows"] == 10_000_000
    return (
        f"{low['recall@10 in distribution']:.3f} / {low['recall@10 out of distribution']:.3f} in "
        f"{low['median_ms']:.0f} ms, {high['recall@10 in distribution']:.3f} / "
        f"{high['recall@10 out of distribution']:.3f} in {high['median_ms']:.0f} ms; "
        f"{ten['stored_per_s']:,.0f} units/s, then {ten['settled_s'] / 60:.1f} min to build; "
        f"{memory['stays']['anonymous'] / 1000:.1f} GB that cannot be dropped, "
        f"{memory['peak']['anonymous'] / 1000:.1f} at the peak; "
        f"{ten['disk_mb']['peak']['disk'] / 1000:.0f} GB of disk; opened in "
        f"{ten['reopening_ms']['open'] / 1000:.1f} s"
    )


def soaked(soak: Any) -> str:
    """The soak: what was wrong, and how long writes waited."""
    waits = (soak["write_wait_ms"]["p99"], soak["write_wait_ms_while_no_process_was_stopped"]["p99"])
    return (
        "{hours:.1f} h, {acknowledged_writes:,} acknowledged writes, {kills} kills, {lost} lost, {resurrected} back, "
        "{wrong_mapping} wrong, {lock_timeouts} refused for a lock that was held too long".format(**soak)
        + f", {waits[0]:.1f} / {waits[1]:.1f} ms"
    )


def promised(*targets: Any) -> list[str]:
    """Recall in and out of distribution, and the time beside HNSW32 at the same recall."""
    return [
        f"{line['in']['recall@10']:.3f} / {line['out']['recall@10']:.3f} in {line['in']['ms']['store']:.2f} ms, "
        f"{line['in']['times_as_fast_as_hnsw32']:.1f} / {line['out']['times_as_fast_as_hnsw32']:.1f} times as fast"
        for line in targets
    ]


def test_the_page_of_figures_shows_what_was_measured(repository: Path) -> None:
    shown = cells(repository / "docs" / "explanation" / "figures.md", "| what | figure | command |")
    assert sorted(shown) == sorted(rows(repository))


def cells(document: Path, head: str) -> list[str]:
    """The second column of the table below ``head``."""
    lines = document.read_text(encoding="utf-8").split(head)[1].splitlines()[2:]
    table = lines[: lines.index("")]
    return [line.split(" | ")[1] for line in table]


def promises(repository: Path) -> list[str]:
    """The figures of the README's table in their order, worded from the results."""
    foundation, promise, million, months, two = (
        read(repository, f"{name}.json")
        for name in ("foundation", "promise", "million", "months_of_use", "two_processes")
    )
    campaign = read(repository, "campaign.json")
    asked = promise["recall"]["ivf"]["cold"]["0.95"]
    search = foundation["search, ivf, target_recall=0.99"]["in"]
    writes = foundation["single writes"]["at all units"]
    return [
        f"{campaign['killed']['kills']:,} kills, {campaign['simulated']['cut']:,} simulated power cuts, 0 lost",
        "{operations:,} operations in a minute, {lost} lost, {doubled} doubled".format(**two),
        (
            f"months of use: {months['mapping_errors']} wrong mappings, "
            f"files {months['files']['ratio']:.2f} times fresh ones"
        ),
        (
            f"asked 0.95: {asked['in']['recall@10']:.3f} on queries like the data, "
            f"{asked['out']['recall@10']:.3f} out of distribution"
        ),
        f"{search['ms']['search_vectors']:.2f} ms at recall {search['recall@10']:.3f}, 39,320 units",
        (
            f"{million['search']['median_ms']:.1f} ms at recall {million['search']['recall@10 in distribution']:.3f}, "
            f"{million['search']['recall@10 out of distribution']:.3f} out of distribution"
        ),
        f"{writes['store']:.2f} ms, {writes['store/bare']:.1f} times a bare SQLite commit",
        f"{foundation['opening, ivf']['with snapshot']['counted_mb_per_1000']:.2f} MB for 1,000 units",
    ]


def test_the_readme_shows_what_was_measured(repository: Path) -> None:
    assert cells(repository / "README.md", "| guarantee | figure | command |") == promises(repository)


def test_the_readme_has_no_other_figure(repository: Path) -> None:
    """What is left of its prose without the held figures has only numbers that name a version or the sample."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    install = read(repository, "install.json")
    peers = (repository / RESULTS / "peers.jsonl").read_text(encoding="utf-8")
    assert '"size": 50000, ' in peers
    assert '"dimension": 384' in peers
    assert install["setup"]["mb"] < 300
    assert install["test --quick"]["processor_seconds"] / install["machine"]["cores"] < 60
    suites = read(repository, "conformance.json")["suites"]
    passed, failed, skipped = (sum(suite[name] for suite in suites) for name in ("passed", "failed", "skipped"))
    known = [
        *promises(repository),
        f"{passed} passed, {failed} failed, and {skipped}\ncannot apply",
        "50,000 units of 384 dimensions",
        f"{install['extras cpu and local']['mb']} MB with",
        "under 300 MB",
        "300 sample units",
        "kill -9 a writer",
        "Python 3.10",
        "Version 0.1.0",
    ]
    text = re.sub(r"(?s)```python.*?```|https?://\S+|`[^`\n]+`", "", text)
    for figure in known:
        assert figure in text, figure
        text = text.replace(figure, "")
    assert re.findall(r"\d[\d.,]*", text) == []


def test_the_page_of_figures_shows_the_results_of_the_public_suites(repository: Path) -> None:
    columns = ("suite", "version", "passed", "failed", "skipped")
    suites = read(repository, "conformance.json")["suites"]
    table = ["| suite | version | passed | failed | skipped |", "|---|---|---|---|---|"]
    table += [f"| {' | '.join(str(suite[name]) for name in columns)} |" for suite in suites]
    page = (repository / "docs" / "explanation" / "figures.md").read_text(encoding="utf-8")
    assert "\n".join(table) + "\n\n" in page
    assert len(suites) == 6
    assert [suite["failed"] for suite in suites] == [0] * len(suites)
    assert all(suite["passed"] >= 25 for suite in suites)


def test_the_page_on_size_shows_what_was_counted(repository: Path) -> None:
    found = read(repository, "size.json")
    page = (repository / "docs" / "explanation" / "size.md").read_text(encoding="utf-8")
    before, now = found["base"]["packages"]["all"], found["packages"]["all"]
    for title, name in (("files", "files"), ("lines", "lines"), ("of them code", "code")):
        rest = found["abilities"]["all other modules"][name]
        cells = [f"{number:,}" for number in (before[name], now[name], now[name] - rest, rest)]
        assert f"| {title} | {' | '.join(cells)} |" in page
    for ability, one in found["abilities"].items():
        assert f"| {ability} | {one['files']} | {one['lines']:,} | {one['code']:,} |" in page
    names = found["tests"]
    assert f"Of the {names['names_before']:,} names of test functions before, {names['kept']:,} are" in page
    became = re.findall(r"(?m)^\| (\d.*) \| .+ \|$", page.partition("## Tests")[2])
    told = sum(int(number) for row in became for number in re.findall(r"(?:^|, )(\d+) of", row))
    assert told + 2 + 6 + 7 == names["names_before"] - names["kept"]


def test_no_result_is_worse_than_what_is_promised() -> None:
    assert [one for one in verdicts.judged() if not one.met] == []


def test_the_page_of_figures_shows_every_promise(repository: Path) -> None:
    page = (repository / "docs" / "explanation" / "figures.md").read_text(encoding="utf-8")
    table = ["| what | promised | measured in |", "|---|---|---|", *(promise.row for promise in verdicts.PROMISES)]
    assert "\n".join(table) + "\n\n" in page


@each("promise", verdicts.PROMISES)
def test_a_result_that_is_worse_than_promised_is_told(promise: verdicts.Promise, tmp_path: Path) -> None:
    """With every number of its file spoiled in the worse direction, and without the file."""
    text = (verdicts.RESULTS / promise.file).read_text(encoding="utf-8")
    lines = text.splitlines() if promise.file.endswith(".jsonl") else [text]
    spoiled = "".join(json.dumps(worse(json.loads(line), promise.most)) + "\n" for line in lines)
    (tmp_path / promise.file).write_text(spoiled, encoding="utf-8")
    assert promise.verdict(tmp_path).met is False
    (tmp_path / promise.file).unlink()
    assert promise.verdict(tmp_path).met is False


def worse(value: Any, most: bool) -> Any:
    if isinstance(value, dict):
        kept = {"run", "section", "set", "peer", "size", "target", "synced", "of"}
        return {key: inner if key in kept else worse(inner, most) for key, inner in value.items()} | (
            {"error": "spoiled"} if "peer" in value else {}
        )
    if isinstance(value, list):
        return [worse(inner, most) for inner in value] + ["spoiled"]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (value + 1e6 if most else value - 1e6) if number else value


def test_the_verdicts_end_with_an_error_where_a_promise_is_broken(tmp_path: Path, repository: Path) -> None:
    script = repository / "benchmarks" / "verdicts.py"
    ended = subprocess.run([sys.executable, script, "--results", tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "0 kept" in ended.stdout


def test_every_test_that_the_page_on_reliability_names_exists(repository: Path) -> None:
    page = (repository / "docs" / "explanation" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    source = "".join(path.read_text(encoding="utf-8") for path in (repository / "cpu_tests").rglob("test_*.py"))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in source} == set()


def test_the_gpu_document_shows_what_cpu_tensors_answered(repository: Path) -> None:
    """The newest figures of CPU tensors."""
    newest = max((repository / RESULTS / "gpu").glob("*-cpu-tensors.json"))
    answers = json.loads(newest.read_text())["answers"]["answers"]
    text = (repository / "docs" / "how-to" / "gpu.md").read_text()
    for name, kind, precision in (("exact, float32", "exact", "float32"), ("exact, int8", "exact", "int8")):
        assert f"| {name} | {_cells(answers, kind, precision)} |" in text
    assert f"| 256 lists, calibrated for 0.95 | {_cells(answers, 'ivf', 'float32')} |" in text
    assert not any(row.get("not_allowed") for row in answers)


def _cells(answers: list[dict[str, Any]], kind: str, precision: str) -> str:
    """Recall in and out of distribution for each way to ask."""
    found: dict[str, list[str]] = {}
    for row in answers:
        if (row["engine"], row["kind"], row["precision"]) == ("torch", kind, precision):
            found.setdefault(row["asked"], []).append(f"{row['recall']:.3f}")
    return " | ".join(" / ".join(pair) for pair in found.values())


def test_the_decision_on_queries_that_go_on_shows_what_was_measured(repository: Path) -> None:
    page = (repository / "docs" / "decisions" / "0008-quarter-codes-held-once.md").read_text(encoding="utf-8")
    found = {(one["index"], one["asked"], one["rule"]): one for one in read(repository, "unsure.json")["found"]}
    for index, asked in {key[:2] for key in found}:
        pair = [found[index, asked, rule] for rule in ("without", "with")]
        cells = [f"{one[kind]['recall']:.3f} in {one[kind]['p50_ms']:.2f} ms" for kind in ("out", "in") for one in pair]
        assert f"| {index}, {asked:g} | {' | '.join(cells)} |" in page
        assert pair[1]["out"]["recall"] >= asked - 0.005
