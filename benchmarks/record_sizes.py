"""Measure the bytes of a unit on disk: the database with its log purged, and the snapshot of the index.

    python benchmarks/record_sizes.py [--data ../shared/data] [--out benchmarks/results/record_sizes.json]

``json_bytes_per_unit`` is the mean length of a unit as JSON, ``other_bytes_per_unit`` the rest of the database
without the vector: full-text index, ids, indexes, log, partly filled pages.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from harness import load, machine, publish, rounded

from memevolve_gpu import VectorStore

__all__ = ["measure"]


def measure(folder: Path) -> dict[str, Any]:
    data = load(folder)
    count, dim = data.vectors.shape
    with tempfile.TemporaryDirectory() as place:
        prefix = Path(place) / "m"
        with VectorStore(prefix, None, dim, storage_config={"background": False, "max_memory_units": 10**6}) as store:
            for start in range(0, count, 5000):
                store.store_batch(data.units[start : start + 5000], data.vectors[start : start + 5000])
            store.run_maintenance()
            json_bytes = sum(len(json.dumps(unit, ensure_ascii=False).encode()) for unit in store.units()) / count
        database, snapshot = (Path(f"{prefix}.{ending}").stat().st_size / count for ending in ("db", "snapshot"))
    return {
        "data": data.name,
        "units": count,
        "dim": dim,
        "database_bytes_per_unit": database,
        "json_bytes_per_unit": json_bytes,
        "vector_bytes_per_unit": 4 * dim,
        "other_bytes_per_unit": database - json_bytes - 4 * dim,
        "snapshot_bytes_per_unit": snapshot,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = rounded({"machine": machine(), "command": "python benchmarks/record_sizes.py", **measure(options.data)})
    publish(found, options.out)


if __name__ == "__main__":
    main()
