"""Makes the golden file of today's formats: four small stores, and what a reader must find in them.

    python cpu_tests/golden/make.py [FOLDER]

Run it once for each new schema or snapshot version, and commit what it writes; a file that is committed is never made
again, because it stands for the stores that people have. The script is deterministic: on one machine, with the same
versions of faiss, numpy and SQLite, it writes the same bytes. On others training gives other centroids, so a test reads
the file and does not compare it with a new one.

Each store has the index of its name, tombstones in its snapshot, and a log that goes on after the snapshot: units
stored, replaced, edited and deleted. Part of its words is in the full-text index, part still waits in the notes.
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from memevolve_gpu import StorageConfig, VectorStore, __version__
from memevolve_gpu.index.snapshot_file import FORMAT_VERSION, read_info
from memevolve_gpu.records.schema import VERSION

__all__ = ["DIM", "FILTERS", "KEYWORDS", "KINDS", "TOP_K", "Kind", "filled", "make", "settings"]

DIM = 8
COUNT = 60
TOP_K = 10
SEED = 20_260_701
NOW = 1_782_900_000.5
"""Unix time of everything that happens."""
KEYWORDS = "grün Straße zweiundvierzig"
FILTERS: dict[str, dict[str, Any] | None] = {
    "all": None,
    "type": {"type": "lesson"},
    "tags": {"tags": ["drei", "タグ"]},
    "range": {"metadata.score": {"gte": 0.25, "lt": 0.75}, "type": {"ne": "tool"}},
}

Vectors = npt.NDArray[np.float32]


class Kind(NamedTuple):
    """A store: the name of its index, and the settings that lead to it."""

    name: str
    metric: str
    index_type: str
    precision: str


KINDS = (
    Kind("exact", "l2", "flat", "float32"),
    Kind("two_stage", "l2", "hnsw", "float32"),  # a graph does not fit, so codes take its place
    Kind("ivf", "ip", "ivf", "float32"),
    Kind("hnsw", "cosine", "hnsw", "float32"),
)


class Embedder:
    """Gives the vector that it is told to give next."""

    model_name = "golden-8"
    dimension = DIM

    def __init__(self) -> None:
        self.next: Vectors = np.zeros(DIM, np.float32)

    def __call__(self, _text: str) -> Vectors:
        return self.next


def settings(kind: Kind) -> StorageConfig:
    """Such that sixty units have the index of ``kind``, and go on having it."""
    return StorageConfig(
        background=False,
        metric=kind.metric,
        index_type=kind.index_type,
        precision=kind.precision,
        device="cpu",
        max_memory_mb=0.016 if kind.name == "two_stage" else 16.0,
        min_training_units=40,
        vectors_per_centroid=15,
        nlist_min=4,
        max_memory_units=1000,
    )


def drawn(rng: np.random.Generator, count: int) -> Vectors:
    """Float32 (count, DIM) whose every bit is the same on every machine: multiples of 2**-12."""
    return (rng.integers(-8192, 8192, (count, DIM)) / 4096).astype(np.float32)


def unit(number: int) -> dict[str, Any]:
    """A unit with an id, texts and metadata of many scripts and JSON types."""
    ids = ("plain-{}", "grün/Straße {}", "メモ-{}", "🧠{}", "o\u0308{}", "quote'\"{}\\")
    tags: tuple[list[str], ...] = (["eins"], ["zwei", "drei"], ["タグ", "drei"], [])
    return {
        "id": ids[number % len(ids)].format(number),
        "type": ("skill", "lesson", "tool")[number % 3],
        "content": f"{('grün', 'blau', 'σοφία', '記憶')[number % 4]} Nummer {number}, Straße {number % 7}",
        "tags": tags[number % len(tags)],
        "metadata": {
            "created_at": f"2026-07-01T00:{number % 60:02}:00+00:00",
            "score": number % 8 / 8,
            "nested": {"none": None, "yes": True, "big": 2**53 + 1, "list": [1, -0.5, "ü", {}]},
        },
        "own": f"\t{number}\n",
    }


@contextmanager
def stopped_clocks(number: int) -> Iterator[None]:
    """Times, and the ids of stores, are always the same; little data is trained on as if it were much."""
    names = {
        "time.time": lambda: NOW,
        "uuid.uuid4": lambda: uuid.UUID(int=number),
        "memevolve_gpu.training.calibration.time": SimpleNamespace(perf_counter=lambda: 0.0),
        "memevolve_gpu.live.rebuild.source_for": lambda _count: "existing",
        "memevolve_gpu.components.store.base.MetadataMixin._generate_timestamp": lambda _self: "2026-07-02T00:00:00Z",
    }
    with ExitStack() as stack:
        for name, stand_in in names.items():
            stack.enter_context(patch(name, stand_in))
        yield


def filled(prefix: Path, kind: Kind) -> dict[str, Any]:
    """Make the store at ``prefix``, and return what a reader must find in it."""
    rng = np.random.default_rng(SEED)
    embedder = Embedder()
    with VectorStore(prefix, embedder, DIM, storage_config=settings(kind)) as store:
        store.store_batch([unit(i) for i in range(COUNT)], drawn(rng, COUNT))
        store.run_maintenance()
        store.snapshot()  # the exact index is built only now
        store.delete_batch([unit(i)["id"] for i in (7, 8, 30)])
        store._open.records.checkpoint()
        store.snapshot()
        told(store, embedder, rng)
        store.register_management_operation("prune", {"removed": 3, "why": "künstlich"})
        store.record_access([unit(9)["id"]] * 2 + [unit(10)["id"]])
    with VectorStore(prefix, None, storage_config=settings(kind)) as store:
        return expected(store, kind, drawn(rng, 16))


def told(store: VectorStore, embedder: Embedder, rng: np.random.Generator) -> None:
    """What happens behind the snapshot: new units, a new vector for an old one, an edit, deletions, an id by number."""
    new = drawn(rng, 6)
    store.store_batch([unit(i) for i in range(COUNT, COUNT + 4)], new[:4])
    embedder.next = new[4]
    store.update(unit(11)["id"], {**unit(11), "content": "zweiundvierzig, neu geschrieben"})
    edited = unit(12)
    store.update(edited["id"], {**edited, "metadata": {**edited["metadata"], "score": 0.5}})
    store.delete(unit(13)["id"])
    store.delete(unit(COUNT)["id"])
    embedder.next = new[5]
    store.store({"content": "named by the store", "type": "tool", "metadata": {"created_at": "2026-07-03"}})


def expected(store: VectorStore, kind: Kind, queries: Vectors) -> dict[str, Any]:
    """Everything that a reader finds, as plain JSON; arrays in base64 of little-endian numbers."""
    found = {name: store.search_vectors(queries, TOP_K, chosen) for name, chosen in FILTERS.items()}
    statistics, rows = store.statistics(), list(store.export_rows())
    info = read_info(Path(f"{store.index_file}.snapshot"))
    return {
        "kind": kind._asdict(),
        "store_id": statistics["store_id"],
        "embedding_model": statistics["embedding_model"],
        "index": statistics["index"],
        "tail_rows": statistics["tail_rows"],
        "tombstones": statistics["tombstones"],
        "log": statistics["log"],
        "snapshot": {"watermark": info.watermark, "rows": info.count, "generation": info.generation},
        "queries_sampled": statistics["queries_sampled"],
        "management": statistics["management"],
        "accesses": store.access_counts(),
        "units": [kept for kept, _ in rows],
        "vectors": text_of(np.stack([vector for _, vector in rows])),
        "queries": text_of(queries),
        "found": {name: {"ids": ids, "distances": text_of(distances)} for name, (distances, ids) in found.items()},
        "keywords": store.search_keywords(KEYWORDS, TOP_K),
        "next_id": "unit_1",
    }


def text_of(array: Vectors) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def make(folder: Path) -> Path:
    """Write the golden file of today's versions into ``folder``; FileExistsError when it is there already."""
    target = folder / f"schema-{VERSION}-snapshot-{FORMAT_VERSION}.zip"
    contents: dict[str, Any] = {"schema_version": VERSION, "snapshot_version": FORMAT_VERSION, "made_by": __version__}
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(target, "x") as archive:
        contents["stores"] = {}
        for number, kind in enumerate(KINDS, start=1):
            prefix = Path(name) / kind.name
            with stopped_clocks(number):
                contents["stores"][kind.name] = filled(prefix, kind)
            for end in ("db", "snapshot"):
                put(archive, f"{kind.name}.{end}", Path(f"{prefix}.{end}").read_bytes())
        put(archive, "expected.json", json.dumps(contents, ensure_ascii=False, indent=1).encode())
    return target


def put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).resolve().parent)
    written = make(parser.parse_args().folder)
    print(f"{written}: {written.stat().st_size} bytes")


if __name__ == "__main__":
    main()
