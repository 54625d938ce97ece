"""The sizing of ``docs/explanation/scaling.md``: its tables are computed, from what was measured."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from support import each

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import sizing

from memevolve_gpu.milvus.plan import search_params

INDEX_BYTES = sum(sizing.one_machine(10**6, 384)[name] for name in ("memory", "mapped"))
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_tables_of_the_document_are_the_arithmetics(repository: Path) -> None:
    document = (repository / "docs" / "explanation" / "scaling.md").read_text(encoding="utf-8")
    assert [int(dim) for dim in re.findall(r"<!-- sizing (\d+) -->", document)] == list(sizing.DIMS)
    assert document == sizing.written(document), "run: python benchmarks/sizing.py --write docs/explanation/scaling.md"
    assert sizing.written(document.replace("| 1,000,000 |", "| 2,000,000 |", 1)) == document


@pytest.mark.parametrize(
    ("assumed", "name", "path"),
    [
        (sizing.STORED_PER_SECOND, "million", ("stored_per_s",)),
        (sizing.one_machine(10**6, 384)["search_ms"], "million", ("search", "median_ms")),
        (sizing.UNIT_BYTES + 4 * 384, "record_sizes", ("database_bytes_per_unit",)),
        (sizing.one_machine(10**6, 384)["memory"] / 2**20, "million", ("counted_mb",)),
        (INDEX_BYTES / 10**6, "record_sizes", ("snapshot_bytes_per_unit",)),
    ],
)
def test_the_arithmetic_starts_from_what_was_measured(assumed: float, name: str, path: tuple[str, ...]) -> None:
    """Within a factor of two: a benchmark may be run again on another machine without a new document."""
    measured = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for key in path:
        measured = measured[key]
    assert 0.5 < measured / assumed < 2


def test_the_table_shows_what_was_measured_at_a_million() -> None:
    million = json.loads((RESULTS / "million.json").read_text(encoding="utf-8"))
    assert million["index"]["rows"] == sizing.MEASURED_AT == sizing.COUNTS[0]
    (row,) = (line for line in sizing.tables(384).splitlines() if line.startswith("| 1,000,000 |"))
    assert f"| {million['search']['median_ms']:.1f} ms |" in row
    trained = next(event for event in reversed(million["events"]) if "(train)" in event["cause"])
    (rows,) = re.findall(r"two_stage of (\d+) rows", trained["cause"])
    assert f"| {trained['seconds'] * 1e6 / int(rows):.0f} s |" in row


def test_lists_are_probed_about_as_the_backend_probes_them() -> None:
    probed = search_params("IVF_FLAT", 10_000, 0.95, 10)["nprobe"] / 10_000
    assert 0.5 < probed / sizing.PROBED < 2


@each("dim", sizing.DIMS)
@each("index", sizing.INDEXES)
def test_a_cluster_holds_its_data_and_grows_with_it(index: sizing.Index, dim: int) -> None:
    nodes = [sizing.node_count(index, n, dim) for n in sizing.COUNTS]
    assert nodes == sorted(nodes)
    for n, count in zip(sizing.COUNTS, nodes, strict=True):
        assert count % sizing.REPLICAS == 0
        copy = n * index.bytes_each(dim)
        assert copy <= count / sizing.REPLICAS * sizing.USABLE * index.node.memory
        assert count == sizing.REPLICAS or copy > (count / sizing.REPLICAS - 1) * sizing.USABLE * index.node.memory
        assert sizing.latency_ms(index, n, dim) > sizing.OVERHEAD_MS


def test_known_figures() -> None:
    """By hand: 10^9 vectors of 384 float32 are 1.536 TB; with ids, over 179.2 GB a node, nine nodes a copy."""
    (flat,) = (index for index in sizing.INDEXES if index.name == "IVF_FLAT")
    assert 10**9 * flat.bytes_each(384) == 1.544e12
    assert sizing.node_count(flat, 10**9, 384) == 18
    assert sizing.latency_ms(flat, 10**9, 384) == pytest.approx(10 + 0.32 * 1.544e12 / 9 / 102.4e9 * 1e3)
    assert sizing.one_machine(10**6, 384)["gpu_ms"] == pytest.approx(0.32)
    assert [row[:3] for row in sizing.cluster(10**9, 384)][4] == ("GPU_CAGRA", 1.8 * 4 * 384 * 1e9, 58)
