"""The GPU benchmarks run: on CPU tensors and small sizes, so that a lease is not spent on their mistakes."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed"),
]


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "benchmarks")
import torch
from gpu import common, run, search

folder = Path(sys.argv[1])

def forked(name, act):
    child = os.fork()
    if not child:
        os.dup2(os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT), 1)
        act()
        sys.exit()
    return child

def ends(name, act):
    status = os.waitpid(forked(name, act), 0)[1]
    if status:
        sys.exit(f"{name} ended with status {status}")

def runs(name, *options):
    sys.argv = ["benchmarks/gpu/run.py", "--device", "cpu", "--quick", *options, "--json", str(folder / f"{name}.json")]
    run.main()

def shapes():
    print([name for name, _ in run.steps_of(run.options().parse_args([]))])

def late():
    kept = []
    setting = common.Setting("cpu", True, keep=lambda part, row: kept.append(row) if part == "search" else None)
    object.__setattr__(setting, "until", time.monotonic() + 1e9)
    def of_plan(plan, *rest, real=search.of_plan):
        yield from real(plan, *rest)
        object.__setattr__(setting, "until", 0.0)
    search.of_plan = of_plan
    try:
        search.run(setting, [2000], [32], 10**9)
    except common.LateError:
        print(len(kept), kept[0]["engine"])

ends("whole", lambda: runs("whole"))
ends("no cpu", lambda: runs("no cpu", "--parts", "search", "training", "--no-cpu"))
ends("no time", lambda: runs("no time", "--minutes", "0"))
ends("shapes", shapes)
ends("late", late)
killed = forked("killed", lambda: runs("killed", "--parts", "search", "memory", "ingest"))
lines = folder / "killed.jsonl"
until = time.monotonic() + 200
while time.monotonic() < until and not (lines.exists() and lines.read_text().count("\\n") >= 4):
    time.sleep(0.02)
os.kill(killed, signal.SIGKILL)
os.waitpid(killed, 0)
"""
"""Runs everything in forks of one process, for torch takes seconds to load."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the program's parts wrote and printed."""
    repository, folder = Path(__file__).resolve().parents[2], tmp_path_factory.mktemp("gpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository / "src")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in folder.glob("*.txt"))
    return folder


@pytest.fixture(scope="module")
def report(ran: Path) -> dict[str, Any]:
    """What the whole of it measured."""
    found: dict[str, Any] = json.loads((ran / "whole.json").read_text())
    return found


def test_every_part_was_measured(report: dict[str, Any]) -> None:
    assert report["left_out"] == {}
    assert {"bandwidth", "search", "answers", "training", "memory", "ingest"} <= set(report)
    assert report["machine"]["date"]
    assert report["machine"]["command"] == "python benchmarks/gpu/run.py --device cpu --quick"
    assert report["machine"]["device_name"] == "CPU tensors"
    assert report["bandwidth"]["bytes_per_s"] > 0
    assert {one["met"] for one in report["verdicts"]} == {None}, "figures without a GPU show nothing"


def test_each_contender_has_figures_or_a_reason(report: dict[str, Any]) -> None:
    table = report["search"]["table"]
    for row in table:
        assert row.get("skipped") in ("faiss-gpu needs a GPU", "flashlib is not installed") or row["times"].keys() == {
            "1",
            "16",
            "1024",
        }, row
    assert {row["engine"] for row in table if "times" in row} == {"cpu", "torch"}
    assert all(row["recall"] > 0.9 for row in table if "times" in row)
    exact = [row for row in report["answers"]["answers"] if row["kind"] == "exact" and row["engine"] == "torch"]
    assert {row["asked"] for row in exact} == {"whole", "a third dead", "a tenth allowed", "newest rows", "lengthened"}
    assert all(row["recall"] >= 0.97 and row["not_allowed"] == 0 for row in exact)
    training = report["training"]["training"]
    assert training["torch engine"]["objective"] > 0
    assert "GPU" in training["faiss-gpu"]["skipped"]
    memory = [row for row in report["memory"]["memory"] if row["engine"] == "torch"]
    assert all(row["predicted_bytes"] > 0 for row in memory)
    assert all(row["found_at_once"] for row in report["ingest"]["ingest"] if "skipped" not in row)


def test_a_run_that_is_killed_keeps_what_it_has_measured(ran: Path, repository: Path) -> None:
    lines = ran / "killed.jsonl"
    found = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
    assert found[0]["part"] == "machine"
    assert {entry["part"] for entry in found[1:]} <= {"bandwidth", "search", "memory", "ingest"}
    assert len(found) >= 3
    assert all(entry["row"] for entry in found[1:])
    lines.write_text(lines.read_text() + '{"part": "search", "ro')
    script = repository / "benchmarks" / "gpu" / "verdicts.py"
    told = subprocess.run([sys.executable, str(script), str(lines)], capture_output=True, text=True, check=True).stdout
    assert told.startswith("0 met, 0 missed, 13 not measured")


def test_the_minutes_are_looked_at_before_each_row_and_the_cpu_can_be_left_out(ran: Path) -> None:
    report = json.loads((ran / "no cpu.json").read_text())
    own = {row["engine"] for row in report["search"]["table"] if "times" in row}
    assert own == {"torch"}
    assert report["training"]["training"]["faiss-cpu"] == {"skipped": "left out by --no-cpu"}
    assert set(json.loads((ran / "no time.json").read_text())["left_out"].values()) == {"0 minutes had passed"}
    assert (ran / "late.txt").read_text().splitlines()[-1] == "1 torch"


def test_the_shapes_of_the_targets_come_first(ran: Path) -> None:
    first = ["bandwidth", "search 1000000 x 768", "search 1000000 x 384", "answers", "training", "memory", "ingest"]
    names = ast.literal_eval((ran / "shapes.txt").read_text())
    assert names[:9] == [*first, "search 10000000 x 384", "search 50000 x 384"]


def _times(ms: float) -> dict[str, Any]:
    return {"1": {"ms": ms}, "1024": {"qps": 1e3 / ms}}


def test_targets_are_judged_by_the_figures(tmp_path: Path, repository: Path) -> None:
    """Made-up figures of a card that reaches all but one target, and of one where half of the parts did not run."""
    report = _card_figures()
    assert _judged(report, repository, tmp_path) == (
        "12 met, 1 missed, 0 not measured",
        {"the same: 60 % or more of the bandwidth of a copy": "MISSED"},
    )
    table = report["search"]["table"]
    report["search"]["table"] = [row for row in table if row["engine"] != "faiss raw" and row["rows"] < 10**7]
    del report["training"]["training"]["faiss-gpu"]["seconds"]
    slow = next(row for row in table if row["dim"] == 768)
    slow["times"]["1"] |= {"ms": 1.5, "share_of_bandwidth": 0.7}
    report["memory"]["memory"][0]["card_over_predicted"] = 0.85
    report["search"]["table"].append({**table[0], "recall": 0.99})
    slow["times"]["1 recorded"] = {"ms": 0.9}
    first, told = _judged(report, repository, tmp_path)
    assert first == "6 met, 3 missed, 4 not measured"
    assert list(told.values()).count("MISSED") == 3
    assert list(told.values()).count("not measured") == 4


def test_figures_of_several_runs_are_taken_together(tmp_path: Path, repository: Path) -> None:
    whole = _card_figures()
    search = {**whole, "search": {"table": whole["search"]["table"][:3]}}
    rest = {"machine": whole["machine"], "search": {"table": whole["search"]["table"][3:]}}
    del search["memory"]
    rest["memory"] = whole["memory"]
    made = tmp_path / "whole.json"
    assert _judged(search, repository, tmp_path, rest, made)[0] == "12 met, 1 missed, 0 not measured"
    assert {key: found for key, found in json.loads(made.read_text()).items() if key != "verdicts"} == whole


def test_figures_of_a_host_do_not_count_for_a_gpu(tmp_path: Path, repository: Path) -> None:
    report = _card_figures()
    for row in report["search"]["table"]:
        row["searched_on"] = "cpu"
    assert _judged(report, repository, tmp_path)[0] == "6 met, 0 missed, 7 not measured"
    report["machine"]["device"] = "cpu"
    assert _judged(report, repository, tmp_path)[0] == "0 met, 0 missed, 13 not measured"


def _judged(
    report: dict[str, Any], repository: Path, folder: Path, more: dict[str, Any] | None = None, made: Path | None = None
) -> tuple[str, dict[str, str]]:
    """The first line of the table, and the targets that are not met with what is said of them."""
    paths = []
    for number, one in enumerate([report] if more is None else [report, more]):
        paths.append(folder / f"figures-{number}.json")
        paths[-1].write_text(json.dumps(one))
    script = repository / "benchmarks" / "gpu" / "verdicts.py"
    command = [sys.executable, script, *paths, *(() if made is None else ("--json", made))]
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    first, *lines = ran.stdout.splitlines()
    told = [line.strip().split("  ") for line in lines]
    words = {[part for part in parts if part][1].strip(): parts[0] for parts in told}
    return first, {target: word for target, word in words.items() if word != "met"}


def _card_figures() -> dict[str, Any]:
    def row(engine: str, kind: str, rows: int, dim: int, qps: float, **more: Any) -> dict[str, Any]:
        times = {"1": {"ms": 0.5, "p95_ms": 0.6, "share_of_bandwidth": 0.5}, "1024": {"qps": qps}}
        own = {"engine": engine, "kind": kind, "rows": rows, "dim": dim, "recall": 1.0, "precision": "float16"}
        return own | {"times": times, "searched_on": "cpu" if engine == "cpu" else "cuda:0"} | more

    million = 10**6
    table = [
        row("torch", "exact", million, 768, 1e5, precision="float32"),
        row("torch", "exact", million, 384, 2.1e5, recall=0.9995, precision="float32"),
        row("torch", "exact", million, 384, 1e3, recall=0.998),
        row("torch", "exact", million, 384, 9e5, recall=0.9, precision="int8"),
        row("faiss raw", "exact", million, 384, 1e5),
        row("flashlib", "exact", million, 384, 2e5),
        row("torch", "ivf", 10 * million, 384, 3e4, recall=0.951),
        row("faiss", "ivf", 10 * million, 384, 1e4, recall=0.96),
        row("faiss raw", "ivf", 10 * million, 384, 9e9, recall=0.94),
        *(row("cpu", "pq", n, dim, 1e3) for n, dim in ((million, 384), (million, 768), (10 * million, 384))),
        {"engine": "faiss", "kind": "exact", "rows": million, "dim": 768, "skipped": "faiss is missing"},
    ]
    trained = {"torch engine": {"seconds": 1.0, "objective": 1.005}, "faiss-gpu": {"seconds": 1.1, "objective": 1.0}}
    trained["flashlib"] = {"seconds": 1.2, "objective": 1.0}
    asked = {"engine": "torch", "kind": "exact", "precision": "float32", "asked": "whole", "queries": "in"}
    memory = {"engine": "torch", "kind": "ivf", "precision": "int8", "rows": million, "dim": 384}
    return {
        "machine": {"device": "cuda:0", "device_name": "A card", "quick": False},
        "bandwidth": {"bytes_per_s": 4e12},
        "search": {"table": table},
        "answers": {"answers": [{**asked, "recall": 1.0, "not_allowed": 0}, {**asked, "host": True}]},
        "training": {"rows": million, "dim": 384, "centroids": 4096, "training": trained},
        "memory": {"memory": [{**memory, "card_over_predicted": 1.05}, {**memory, "skipped": "no"}]},
        "ingest": {"ingest": [{"engine": "torch", "index_type": "flat", "found_at_once": True}, {"engine": "faiss"}]},
    }
