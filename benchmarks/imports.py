"""Import collections of other stores and compare every unit with what was put into them, id by id.

    python benchmarks/imports.py [--units 10000] [--out benchmarks/results/imports.json]

Needs chromadb and lancedb. Each collection is written by the other store's own client; the imported store is compared
with the data that was written, not with what the reader said: ids, texts, metadata, and vectors bit by bit. The second
import must find everything there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine

from memevolve_gpu import VectorStore
from memevolve_gpu.integrations.importers import import_into, open_source

SEED, DIM, PAGE = 20_240_607, 384, 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "command": f"python benchmarks/imports.py --units {arguments.units}"}
    found |= {"units": arguments.units, "dim": DIM, "seed": SEED, "imports": {}}
    vectors = np.random.default_rng(SEED).standard_normal((arguments.units, DIM)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        for kind, write in (("chroma", write_chroma), ("lancedb", write_lancedb)):
            found["imports"][kind] = measured(kind, write, vectors, Path(folder))
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def measured(kind: str, write: Any, vectors: np.ndarray, folder: Path) -> dict[str, Any]:
    write(folder / kind, vectors)
    source = open_source(kind, str(folder / kind))
    with VectorStore(folder / f"{kind}-imported", None, DIM, storage_config={"background": False}) as store:
        report = import_into(store, source)
        again = import_into(store, source)
        checked = 0
        for number, (unit, vector) in enumerate(store.export_rows()):
            wanted = entry(int(unit["id"].removeprefix("id-")))
            own = {name: unit["metadata"].get(name) for name in wanted["metadata"]}
            if {**unit, "metadata": own} != wanted or vector.tobytes() != vectors[int(unit["id"][3:])].tobytes():
                raise SystemExit(f"{kind}: unit {number} is not what was written: {unit}")
            checked += 1
        if checked != len(vectors) or store.count() != len(vectors) or again.present != len(vectors):
            raise SystemExit(f"{kind}: {checked} of {len(vectors)} units, {again.present} found again")
    package = "chromadb" if kind == "chroma" else kind
    return {
        "version": version(package),
        "imported": report.imported,
        "compared_with_the_data_written": checked,
        "vectors_equal_bit_by_bit": checked,
        "again": {"imported": again.imported, "present": again.present},
        "seconds": report.seconds,
    }


def entry(number: int) -> dict[str, Any]:
    metadata = {"number": number, "user": f"user{number % 7}", "score": number / 4}
    return {"id": f"id-{number}", "content": f"the text of entry {number}", "metadata": metadata}


def write_chroma(folder: Path, vectors: np.ndarray) -> None:
    import chromadb

    settings = chromadb.config.Settings(anonymized_telemetry=False)
    held = chromadb.PersistentClient(str(folder), settings).create_collection("units", embedding_function=None)
    for start in range(0, len(vectors), PAGE):
        page = [entry(number) for number in range(start, min(start + PAGE, len(vectors)))]
        held.add(
            ids=[one["id"] for one in page],
            documents=[one["content"] for one in page],
            metadatas=[one["metadata"] for one in page],
            embeddings=vectors[start : start + PAGE],
        )


def write_lancedb(folder: Path, vectors: np.ndarray) -> None:
    import lancedb
    import pyarrow as pa

    page = [entry(number) for number in range(len(vectors))]
    columns = {
        "id": [one["id"] for one in page],
        "text": [one["content"] for one in page],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM),
        **{name: [one["metadata"][name] for one in page] for name in ("number", "user", "score")},
    }
    lancedb.connect(folder).create_table("units", pa.table(columns))


if __name__ == "__main__":
    main()
