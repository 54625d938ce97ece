"""Compute the size of one machine and of a Milvus cluster, from a million units to a billion.

    python benchmarks/sizing.py [--dim 384] [--write docs/explanation/scaling.md]

Pure arithmetic: nothing is measured here. Measured constants are read from ``benchmarks/results``, the others name
their source; ``docs/explanation/scaling.md`` explains the columns, and a test compares its tables with this module. GB
are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memevolve_gpu.planner.device_plan import plan_bytes
from memevolve_gpu.planner.nlist import adaptive_nlist
from memevolve_gpu.types import IndexPlan

__all__ = ["COUNTS", "DIMS", "INDEXES", "cluster", "latency_ms", "node_count", "one_machine", "tables", "written"]

COUNTS = (10**6, 10**7, 10**8, 10**9)
DIMS = (384, 1024)

# One machine


def _measured(name: str) -> Any:
    return json.loads((Path(__file__).with_name("results") / f"{name}.json").read_text(encoding="utf-8"))


_RECORDS, _MILLION = _measured("record_sizes"), _measured("million")

UNIT_BYTES: int = round(_RECORDS["json_bytes_per_unit"] + _RECORDS["other_bytes_per_unit"])
"""Bytes of a unit in the database without its vector: JSON, full-text index, log. Longer texts add their length
about twice."""

MEASURED_AT = 1_000_000
"""Units of the three figures below: embeddings given, two cores, index_type auto, target recall 0.95."""

STORED_PER_SECOND: float = _MILLION["stored_per_s"]
"""Units written and indexed on the way there."""

_TRAINED = [event for event in _MILLION["events"] if "(train)" in event["cause"]][-1]
BUILD_SECONDS: float = _TRAINED["seconds"] * MEASURED_AT / int(re.findall(r"of (\d+) rows", _TRAINED["cause"])[0])
"""Training and building the index over all rows with two threads: the last one on the way there, by its rows."""

SEARCH_MS: float = _MILLION["search"]["median_ms"]
"""Median of one search. Above that size a search is taken to grow with the number of units: too high where
more lists are skipped, too low where the codes exceed the processor's cache."""

# A cluster


@dataclass(frozen=True)
class Node:
    """What searches: its memory in bytes, and bytes a second that it reads, both as its maker states them."""

    name: str
    memory: float
    bandwidth: float


CPU = Node("256 GB, 8 channels of DDR4-3200", 256e9, 8 * 25.6e9)
"""25.6 GB/s a channel: 3,200 million transfers of 8 bytes (JEDEC DDR4-3200)."""
GPU = Node("H200, 141 GB", 141e9, 4.8e12)
"""NVIDIA's data sheet of the H200."""

USABLE = 0.7
"""Share of the memory that indexes may fill; an assumption. The rest is for growing segments, a second copy while a new
index is loaded, working memory of searches, and the units of a lost node."""
REACHED = 0.5
"""Share of the bandwidth that a scan reaches; an assumption."""
REPLICAS = 2
"""Two, so that a lost node leaves one that answers."""
OVERHEAD_MS = 10.0
"""A search through client, proxy and query node, on a small collection: rounded up from the 5 to 6 ms of
``results/milvus.json`` (Milvus 2.3.5 on two cores). With Strong consistency it was about 200."""
PROBED = 0.32
"""Share of the lists that is read for recall@10 of 0.95: what ``MilvusStore`` probes, measured with questions out of
distribution over 39,320 units (``milvus/plan.py``); others are found with less."""
GRAPH_READS = 128 * 32
"""Vectors that a walk over one graph reads for recall 0.95: a beam of 128, 32 neighbours each, as ``MilvusStore`` asks
of GPU_CAGRA; about as many for HNSW. An estimate."""
SEGMENT = 512 * 2.0**20
"""Bytes of raw vectors in a full segment, each of which has its own lists and its own graph
(``dataCoord.segment.maxSize``; 1,024 MB from Milvus 2.4 on)."""


@dataclass(frozen=True)
class Index:
    """An index type of Milvus: bytes of a vector of ``dim`` in memory, and those that one query reads of ``n`` here."""

    name: str
    node: Node
    bytes_each: Callable[[int], float]
    bytes_read: Callable[[float, int], float]


def _probed(bytes_each: Callable[[int], float]) -> Callable[[float, int], float]:
    return lambda n, dim: PROBED * n * bytes_each(dim)


def _walked(n: float, dim: int) -> float:
    return max(1.0, n * 4.0 * dim / SEGMENT) * min(GRAPH_READS, n) * 4.0 * dim


def _raw(dim: int) -> float:
    return 4.0 * dim + 8


def _one_byte(dim: int) -> float:
    return dim + 8.0


def _codes(dim: int) -> float:
    return dim / 4 + 8


INDEXES = (
    Index("IVF_FLAT", CPU, _raw, _probed(_raw)),  # the vector and a 64-bit id
    Index("IVF_SQ8", CPU, _one_byte, _probed(_one_byte)),  # a byte a dimension
    Index("HNSW, M=32", CPU, lambda dim: 4.0 * dim + 2 * 32 * 4 + 8, _walked),  # faiss: d * 4 + M * 2 * 4 bytes
    Index("GPU_IVF_FLAT", GPU, _raw, _probed(_raw)),  # Milvus: as the data
    Index("GPU_CAGRA", GPU, lambda dim: 1.8 * 4 * dim, _walked),  # Milvus: about 1.8 times the data
    Index("GPU_IVF_PQ, d/4 bytes", GPU, _codes, _probed(_codes)),  # cuVS: n * (pq_dim * pq_bits / 8 + id)
)


def node_count(index: Index, n: int, dim: int) -> int:
    """Nodes (or GPUs) that hold ``n`` vectors of ``dim`` dimensions in REPLICAS copies."""
    return REPLICAS * math.ceil(n * index.bytes_each(dim) / (USABLE * index.node.memory))


def latency_ms(index: Index, n: int, dim: int) -> float:
    """The least that one search takes: the overhead, and what one node of a copy reads at the bandwidth it reaches.

    All nodes of a copy read at the same time; one that holds many segments walks the graph of each.
    """
    share = n / (node_count(index, n, dim) / REPLICAS)
    return OVERHEAD_MS + index.bytes_read(share, dim) / (REACHED * index.node.bandwidth) * 1e3


def one_machine(n: int, dim: int) -> dict[str, float]:
    """``memory``, ``mapped`` and ``disk`` in bytes; ``search_ms``; ``fill_s`` to write n units, ``build_s`` to build
    the index; ``gpu`` bytes and ``gpu_ms`` of an exact scan of float16 vectors on GPU.

    The index is IVF over 4-bit codes; its float32 vectors are mapped from the snapshot.
    """
    memory, mapped = plan_bytes(IndexPlan("ivf", adaptive_nlist(n)), n, dim), 4 * n * dim
    return {
        "memory": float(memory),
        "mapped": float(mapped),
        "disk": float(n * (4 * dim + UNIT_BYTES) + memory + mapped),
        "search_ms": SEARCH_MS * n / MEASURED_AT * dim / 384,
        "fill_s": n / STORED_PER_SECOND,
        "build_s": BUILD_SECONDS * n / MEASURED_AT * dim / 384,
        "gpu": 2.0 * n * dim,
        "gpu_ms": 2.0 * n * dim / (REACHED * GPU.bandwidth) * 1e3,
    }


def cluster(n: int, dim: int) -> list[tuple[str, float, int, float]]:
    """(index type, bytes of one copy, nodes for all copies, ms of a search at the least) of each index type."""
    return [
        (index.name, n * index.bytes_each(dim), node_count(index, n, dim), latency_ms(index, n, dim))
        for index in INDEXES
    ]


# Tables


def tables(dim: int) -> str:
    """Both tables as Markdown."""
    return "\n\n".join((_machine_table(dim), _cluster_table(dim)))


def written(document: str) -> str:
    """The document with its tables made again, each between ``<!-- sizing DIM -->`` and ``<!-- end -->``."""
    return re.sub(
        r"(?s)(<!-- sizing (\d+) -->\n).*?(\n<!-- end -->)",
        lambda found: f"{found[1]}\n{tables(int(found[2]))}\n{found[3]}",
        document,
    )


def _machine_table(dim: int) -> str:
    rows = []
    for n in COUNTS:
        need = one_machine(n, dim)
        rows.append(
            [
                f"{n:,}",
                _bytes(need["memory"]),
                _bytes(need["disk"]),
                _ms(need["search_ms"]),
                _time(need["fill_s"]),
                _time(need["build_s"]),
                _on_gpu(need["gpu"], need["gpu_ms"]),
            ]
        )
    return _table(("units, one machine", "memory", "disk", "search", "filling", "building", "one GPU"), rows)


def _on_gpu(size: float, least: float) -> str:
    return f"{_bytes(size)}, {_ms(least)}" if size <= USABLE * GPU.memory else f"{_bytes(size)}: too much"


def _cluster_table(dim: int) -> str:
    rows = []
    for index in INDEXES:
        cells = [f"{index.name} ({'GPU' if index.node is GPU else 'CPU'})"]
        for n in COUNTS:
            size, nodes, least = n * index.bytes_each(dim), node_count(index, n, dim), latency_ms(index, n, dim)
            cells.append(f"{_bytes(size)}, {nodes}, {_ms(least)}")
        rows.append(cells)
    return _table(("Milvus: one copy, nodes, search", *(f"{n:,}" for n in COUNTS)), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _two(value: float) -> str:
    """Two significant digits: arithmetic gives no more."""
    return f"{float(f'{value:.2g}'):,.10g}"


def _bytes(value: float) -> str:
    return f"{_two(value / 1e9)} GB" if value < 1e12 else f"{_two(value / 1e12)} TB"


def _ms(value: float) -> str:
    return f"{_two(value)} ms" if value < 1000 else f"{_two(value / 1000)} s"


def _time(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{_two(seconds / length)} {unit}"
    return f"{_two(seconds)} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dim", type=int, action="append")
    parser.add_argument("--write", type=Path, help="a document whose tables to update")
    options = parser.parse_args()
    if options.write:
        options.write.write_text(written(options.write.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"{dim} dimensions\n\n{tables(dim)}" for dim in options.dim or DIMS))


if __name__ == "__main__":
    main()
