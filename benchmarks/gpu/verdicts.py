"""Compare figures with the targets for a real GPU: met, missed, or not measured.

    python benchmarks/gpu/verdicts.py benchmarks/results/gpu/DATE-DEVICE.json [MORE.json ...] [--json ALL.json]

Several files of one device, from runs of some parts each, are taken together; of a run that was cut off, give the
.jsonl file, which holds each row that it measured.
``run.py`` prints the same table at its end and keeps it with the figures. Figures measured on CPU tensors, or with
--quick, count as not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["TARGETS", "Verdict", "as_rows", "combined", "read_figures", "table_of", "verdicts"]

MILLION = 1_000_000
TARGET_RECALL, EXACT_RECALL, SAME_RECALL = 0.95, 0.999, 0.001
"""Recall@10 of inverted lists and of exact scans, at least, and by how much equal recalls may differ."""

Report = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """``met`` is None where nothing was measured; ``reached`` says what was, or why nothing."""

    target: str
    reached: str
    met: bool | None

    @property
    def word(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


class NotMeasuredError(Exception):
    """The figures do not hold what a target needs."""


def searched(report: Report, **wanted: Any) -> list[Row]:
    """The rows of the search table that are as ``wanted``, without those of a GPU's index that the host answered."""
    rows = report.get("search", {}).get("table", [])
    own = [row for row in rows if "times" in row and (row["engine"] == "cpu" or row["searched_on"] != "cpu")]
    return [row for row in own if all(row.get(name) == value for name, value in wanted.items())]


def some(rows: list[Row], what: str) -> list[Row]:
    if not rows:
        raise NotMeasuredError(f"no figures of {what}")
    return rows


def qps(row: Row) -> float:
    return float(row["times"]["1024"]["qps"])


def one_query(report: Report) -> Row:
    """The faster of the indexes that scan float16, by default: not recorded as a graph, which ``beside`` reports."""
    rows = searched(report, rows=MILLION, dim=768, engine="torch", kind="exact")
    scans = [row["times"] for row in rows if row["precision"] != "int8"]
    plain = min((times["1"] for times in some(scans, "one query over 1M x 768")), key=lambda one: float(one["ms"]))
    graphs = [times["1 recorded"] for times in scans if "1 recorded" in times]
    beside = f"; as a graph {min(one['ms'] for one in graphs):.3f} ms" if graphs else ""
    return {**plain, "beside": beside}


def time_of_one_query(report: Report) -> tuple[str, bool]:
    taken = one_query(report)
    return f"{taken['ms']:.3f} ms (95th percentile {taken['p95_ms']:.3f}){taken['beside']}", taken["ms"] < 1.0


def share_of_bandwidth(report: Report) -> tuple[str, bool]:
    share, ceiling = float(one_query(report)["share_of_bandwidth"]), report["bandwidth"]["bytes_per_s"]
    return f"{share:.0%} of {ceiling / 1e12:.2f} TB/s, read plus written", share >= 0.6


def against_flat(report: Report) -> tuple[str, bool]:
    """The fastest exact index against the fastest flat index of faiss-gpu, each in its fastest precision."""
    shape = {"rows": MILLION, "dim": 384, "kind": "exact"}
    theirs = max(some(searched(report, engine="faiss raw", **shape), "faiss-gpu's flat index"), key=qps)
    least = theirs["recall"] - SAME_RECALL
    ours = [row for row in searched(report, engine="torch", **shape) if row["recall"] >= least]
    return _ratio(max(some(ours, "an exact index of the torch engine at that recall"), key=qps), theirs, 2.0)


def against_flashlib(report: Report) -> tuple[str, bool]:
    """The same against flash_knn of flashlib."""
    shape = {"rows": MILLION, "dim": 384, "kind": "exact"}
    theirs = max(some(searched(report, engine="flashlib", **shape), "flashlib's exact search"), key=qps)
    least = theirs["recall"] - SAME_RECALL
    ours = [row for row in searched(report, engine="torch", **shape) if row["recall"] >= least]
    return _ratio(max(some(ours, "an exact index of the torch engine at that recall"), key=qps), theirs, 1.0)


def against_lists(report: Report) -> tuple[str, bool]:
    """The same for inverted lists, both at the recall asked for."""
    shape = {"rows": 10 * MILLION, "dim": 384, "kind": "ivf"}
    best = []
    for engines in (("torch",), ("faiss", "faiss raw")):
        rows = [row for engine in engines for row in searched(report, engine=engine, **shape)]
        enough = [row for row in rows if row["recall"] >= TARGET_RECALL]
        best.append(max(some(enough, f"inverted lists of {engines[0]} at recall {TARGET_RECALL}"), key=qps))
    return _ratio(best[0], best[1], 1.0)


def recall_of_exact_scans(report: Report) -> tuple[str, bool]:
    """Of plans in float32: others have lost digits before the rows came to the device."""
    rows = searched(report, engine="torch", kind="exact", precision="float32")
    worst = min(some(rows, "exact indexes of the torch engine"), key=lambda row: row["recall"])
    return f"{worst['recall']:.4f} at worst ({worst['rows']:,} x {worst['dim']})", worst["recall"] >= EXACT_RECALL


def recall_of_real_queries(report: Report) -> tuple[str, bool]:
    """Of exact scans in float32, for every kind of search."""
    rows = [row for row in report.get("answers", {}).get("answers", []) if row["kind"] == "exact"]
    scans = [row for row in rows if row["engine"] == "torch" and row["precision"] == "float32" and "recall" in row]
    worst = min(some(scans, "answers of exact indexes"), key=lambda row: row["recall"])
    wrong = sum(row["not_allowed"] for row in scans)
    reached = f"{worst['recall']:.4f} at worst ({worst['asked']}, {worst['queries']}), {wrong} not allowed"
    return reached, worst["recall"] >= EXACT_RECALL and not wrong


def trained(report: Report, name: str) -> Row:
    found = report.get("training", {})
    if (found.get("rows"), found.get("dim"), found.get("centroids")) != (MILLION, 384, 4096):
        raise NotMeasuredError("no training on 1M x 384 with 4,096 centroids")
    row: Row = found["training"].get(name, {})
    if "seconds" not in row:
        raise NotMeasuredError(f"{name}: {row.get('skipped', 'not run')}")
    return row


def training_time(report: Report, peer: str = "faiss-gpu") -> tuple[str, bool]:
    ours, theirs = (trained(report, name)["seconds"] for name in ("torch engine", peer))
    return f"{ours:.2f} s against {theirs:.2f} s: {theirs / ours:.1f} times as fast", ours <= theirs


def training_objective(report: Report) -> tuple[str, bool]:
    ours, theirs = (trained(report, name)["objective"] for name in ("torch engine", "faiss-gpu"))
    return f"{ours / theirs - 1:+.2%}", ours <= 1.01 * theirs


def predicted_memory(report: Report) -> tuple[str, bool]:
    rows = [row for row in report.get("memory", {}).get("memory", []) if "card_over_predicted" in row]
    off = max(some(rows, "memory on a card"), key=lambda row: abs(row["card_over_predicted"] - 1))
    shape = f"{off['engine']} {off['kind']} {off['precision']}, {off['rows']:,} x {off['dim']}"
    return f"{off['card_over_predicted'] - 1:+.1%} at worst ({shape})", abs(off["card_over_predicted"] - 1) <= 0.1


def cpu_beside(report: Report) -> tuple[str, bool]:
    """A row of the CPU for each shape that the GPU searched; says what the GPU buys where that is most."""
    gpu = some(searched(report, engine="torch"), "searches by the torch engine")
    cpu = searched(report, engine="cpu")
    shapes = {(row["rows"], row["dim"]) for row in gpu}
    missing = shapes - {(row["rows"], row["dim"]) for row in cpu}
    if missing:
        return "missing for " + ", ".join(f"{rows:,} x {dim}" for rows, dim in sorted(missing)), False
    gains = [
        max(qps(row) for row in gpu if (row["rows"], row["dim"]) == shape)
        / max(qps(row) for row in cpu if (row["rows"], row["dim"]) == shape)
        for shape in shapes
    ]
    return f"in all {len(shapes)} shapes; the GPU has {min(gains):.1f} to {max(gains):.1f} times its queries/s", True


def found_at_once(report: Report) -> tuple[str, bool]:
    rows = [row for row in report.get("ingest", {}).get("ingest", []) if "found_at_once" in row]
    on_gpu = some([row for row in rows if row["engine"] != "cpu"], "ingest to a GPU")
    late = [f"{row['engine']} {row['index_type']}" for row in on_gpu if not row["found_at_once"]]
    return (f"not with {', '.join(late)}" if late else f"with all {len(on_gpu)}"), not late


def _ratio(ours: Row, theirs: Row, least: float) -> tuple[str, bool]:
    ratio = qps(ours) / qps(theirs)
    reached = (
        f"{ratio:.2f} times: {qps(ours):,.0f}/s ({ours['precision']}, recall {ours['recall']:.4f}) "
        f"against {qps(theirs):,.0f}/s ({theirs['precision']}, recall {theirs['recall']:.4f})"
    )
    return reached, ratio >= least


TARGETS: dict[str, Callable[[Report], tuple[str, bool]]] = {
    "one query, exact, 1M x 768 float16: under 1 ms": time_of_one_query,
    "the same: 60 % or more of the bandwidth of a copy": share_of_bandwidth,
    "1,024 queries, 1M x 384: 2 times faiss-gpu's flat index": against_flat,
    "the same: flashlib's flash_knn": against_flashlib,
    "exact scans: recall@10 of 0.999": recall_of_exact_scans,
    "real queries, exact: recall@10 of 0.999 against the CPU": recall_of_real_queries,
    "lists at recall 0.95, 10M x 384: faiss-gpu's queries/s": against_lists,
    "k-means, 1M x 384, 4,096: no slower than faiss-gpu": training_time,
    "the same: no slower than flashlib": lambda report: training_time(report, "flashlib"),
    "the same: objective within 1 % of faiss-gpu's": training_objective,
    "predicted bytes within 10 % of the card's": predicted_memory,
    "the CPU of the same machine in the same table": cpu_beside,
    "what was stored is found at once": found_at_once,
}


def verdicts(report: Report) -> Iterator[Verdict]:
    """One for each target, in order."""
    machine = report["machine"]
    excuse = "" if machine["device"].startswith("cuda") else "taken on CPU tensors"
    excuse = "taken with --quick" if machine["quick"] else excuse
    for target, judge in TARGETS.items():
        yield Verdict(target, excuse, None) if excuse else _judged(target, judge, report)


def _judged(target: str, judge: Callable[[Report], tuple[str, bool]], report: Report) -> Verdict:
    try:
        return Verdict(target, *judge(report))
    except NotMeasuredError as reason:
        return Verdict(target, str(reason), None)


def as_rows(report: Report) -> list[dict[str, Any]]:
    """For the file of figures."""
    return [asdict(one) for one in verdicts(report)]


def table_of(report: Report) -> str:
    """The table as text."""
    found = list(verdicts(report))
    wide = max(len(one.target) for one in found)
    lines = [f"  {one.word:<13} {one.target:<{wide}}  {one.reached}" for one in found]
    met, missed = (sum(one.met is answer for one in found) for answer in (True, False))
    return "\n".join([f"{met} met, {missed} missed, {len(found) - met - missed} not measured", *lines])


def combined(reports: Sequence[Report]) -> Report:
    """The parts of all of them, the later where two have the same; the rows of all search tables."""
    whole: Report = {}
    table: list[Row] = []
    for report in reports:
        mine = report["machine"]["device_name"]
        others = whole["machine"]["device_name"] if whole else mine
        if mine != others:
            raise SystemExit(f"figures of {mine} and of {others} do not belong together")
        table += report.get("search", {}).get("table", [])
        whole |= report
    return {**whole, "search": {**whole["search"], "table": table}} if table else whole


def read_figures(path: Path) -> Report:
    """A report, as it was written at the end of a run or row by row."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        whole: Report = json.loads(text)
        return whole
    report: Report = {}
    for line in text.splitlines():
        if not line.endswith("}"):
            break  # the last one was cut off
        entry = json.loads(line)
        part, row = entry["part"], entry["row"]
        if part == "search":
            report.setdefault("search", {"table": []})["table"].append(row)
        elif part == "training":
            whole = report.setdefault(part, {**row, "training": {}})
            whole["training"] |= row["training"]
        elif part in ("answers", "memory", "ingest"):
            report.setdefault(part, {part: []})[part].append(row)
        else:
            report[part] = row
    return report


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("figures", type=Path, nargs="+")
    made.add_argument("--json", type=Path, help="where to write all figures with the verdicts")
    args = made.parse_args()
    report = combined([read_figures(path) for path in args.figures])
    if args.json is not None:
        args.json.write_text(json.dumps({**report, "verdicts": as_rows(report)}, indent=1) + "\n", encoding="utf-8")
    print(table_of(report))


if __name__ == "__main__":
    main()
