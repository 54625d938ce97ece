"""The table behind GPU_ENGINE=auto, from measured figures: for planner/engine_table.py, or for a store's own settings.

    python benchmarks/gpu/engine_table.py benchmarks/results/gpu/DATE-DEVICE.json
    python benchmarks/gpu/engine_table.py RESULTS.json --json measured.json

The first prints lines of Python. The second writes the file that MEMEVOLVE_STORAGE_GPU_ENGINE_TABLE names.

For each number of rows that was measured, the engines are ordered by the time that they need: the geometric mean of one
query and of a query among 1,024, over all dimensions, each engine by its fastest kind that reaches recall@10 of 0.95.
Between two numbers of rows with different orders the border is their geometric mean.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

ENGINES = ("cpu", "torch", "faiss")
TARGET = 0.95

Band = tuple[int | None, tuple[str, ...]]


def cost(row: dict[str, Any]) -> float:
    """Geometric mean of the milliseconds of a single query and of one among 1,024."""
    return math.sqrt(row["times"]["1"]["ms"] * 1e3 / row["times"]["1024"]["qps"])


def orders(table: list[dict[str, Any]]) -> dict[int, tuple[str, ...]]:
    """Rows to the engines, fastest first; an engine that failed for some dimension comes after those that did not."""
    best: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in table:
        if row["engine"] in ENGINES and "times" in row and row["recall"] >= TARGET:
            own = best[row["rows"]][row["engine"]]
            own[row["dim"]] = min(cost(row), own.get(row["dim"], math.inf))
    found = {}
    for rows, engines in sorted(best.items()):
        dims = {dim for own in engines.values() for dim in own}
        means = {
            name: (len(dims) - len(own), math.exp(sum(map(math.log, own.values())) / len(own)))
            for name, own in engines.items()
        }
        found[rows] = tuple(sorted(means, key=means.__getitem__))
    return found


def bands(by_rows: dict[int, tuple[str, ...]]) -> list[Band]:
    """(up to so many rows, engines in order), the last one for any number."""
    found: list[Band] = []
    counts = sorted(by_rows)
    for at, rows in enumerate(counts):
        last = at == len(counts) - 1
        if last or by_rows[counts[at + 1]] != by_rows[rows]:
            found.append((None if last else round_down(math.sqrt(rows * counts[at + 1])), by_rows[rows]))
    return found


def round_down(number: float) -> int:
    """To two digits: the border is no more exact than that."""
    unit = 10 ** max(0, int(math.log10(number)) - 1)
    return int(number // unit * unit)


def as_python(found: list[Band], source: str) -> str:
    """The lines for planner/engine_table.py."""
    lines = [f"    Band({'None' if rows is None else f'{rows:_}'}, {engines!r})," for rows, engines in found]
    return "\n".join(["BANDS = (", *lines, ")", f'SOURCE = "{source}"', "MEASURED = True"]).replace("'", '"')


def as_json(found: list[Band], source: str) -> str:
    """The file for MEMEVOLVE_STORAGE_GPU_ENGINE_TABLE. An engine that was not measured is not in it."""
    bands = [[rows, [*engines, *(["cpu"] if "cpu" not in engines else [])]] for rows, engines in found]
    return json.dumps({"bands": bands, "source": source}, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table of a store's settings")
    args = parser.parse_args()
    path = args.results
    report = json.loads(path.read_text(encoding="utf-8"))
    found = bands(orders(report.get("search", {}).get("table", [])))
    if not found:
        raise SystemExit(f"{path} holds no searches that reach recall {TARGET}")
    machine = report["machine"]
    unfit = machine["quick"] or not machine["device"].startswith("cuda")
    if args.json and unfit:
        raise SystemExit(f"{path} is of no use for a table: these figures were not taken on a GPU, or with --quick")
    if args.json:
        args.json.write_text(as_json(found, f"{path.name}, {machine['device_name']}, {machine['date']}"), "utf-8")
        return
    source = f"benchmarks/results/gpu/{path.name}, {machine['device_name']}, {machine['date']}"
    if unfit:
        print("# Not for planner/engine_table.py: these figures were not taken on a GPU, or with --quick.")
    print(as_python(found, source))


if __name__ == "__main__":
    main()
