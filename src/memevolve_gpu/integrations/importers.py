"""Read the files of other vector stores into a store: page by page, resumable, verified id by id.

Each format is read by its own library, imported when it is asked for: chromadb, lancedb, qdrant-client, pyarrow, faiss.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..components.store.base import Progress, StorageBackend
from ..components.store.legacy_import import read_docstore
from ..components.store.units import checked_unit
from ..errors import ConfigurationError, InvalidUnitError, StorageError
from ..types import FloatArray, Json, JsonObject, MemoryUnit
from ..utils.arguments import (
    callback,
    having,
    listed,
    optional_text,
    path_text,
    real_number,
    shown,
    switch,
    whole_number,
    word,
)
from ..utils.drafts import PRIVATE, draft_of
from ..utils.vectors import read_vector

__all__ = ["ImportReport", "Source", "import_into", "open_source", "write_parquet"]

PAGE = 1_000
_TEXTS = ("content", "text", "page_content", "document", "data", "memory")
"""Where other stores keep the text of an entry, the first that is there."""

_VECTORS = ("vector", "embedding")
_SPACES = {"l2": "l2", "euclid": "l2", "cosine": "cosine", "ip": "ip", "dot": "ip"}


class Row(NamedTuple):
    """One entry: a unit with its id, and its vector (dim,); None for those that have to be embedded."""

    unit: MemoryUnit
    vector: FloatArray | None
    expires_at: float | None = None
    """Unix time."""


@dataclass(frozen=True)
class Source:
    """The entries of another store. ``rows`` reads them from the beginning each time, oldest first where known."""

    rows: Callable[[], Iterator[Row]]
    count: int | None = None
    metric: str | None = None

    def dimension(self) -> int | None:
        """Length of the first vector; None where the source has no vectors or no entries."""
        first = next(self.rows(), None)
        return None if first is None or first.vector is None else len(first.vector)


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What :func:`import_into` did and verified."""

    imported: int
    present: int
    """Entries that the store had already."""
    replaced: int
    verified: int
    """Units that were compared with their entry afterwards: all of them."""
    vectors_compared: int
    """Vectors that were compared bit by bit."""
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain JSON values."""
        return asdict(self)


def open_source(kind: str, path: str, collection: str | None = None) -> Source:
    """Open the files of another store for reading.

    Args:
        kind: chroma, lancedb, qdrant, faiss-langchain, mem0, parquet or jsonl.
        path: The folder or file; of qdrant also the address of a server.
        collection: The collection or table; may be left out where there is one only.

    Returns:
        The source.

    Raises:
        ConfigurationError: There are no such files or collection, or the library that reads them is not installed.
        InvalidUnitError: The files cannot be read as that kind.
    """
    word("kind", kind, _READERS, ConfigurationError)
    path, collection = path_text("path", path), optional_text("collection", collection)
    if not (kind == "qdrant" and "://" in path) and not Path(path).exists():
        raise ConfigurationError(f"path: there is no {path!r}; give what {kind} wrote")
    return _READERS[kind](path, collection)


def import_into(
    store: StorageBackend,
    source: Source,
    *,
    replace: bool = False,
    page_size: int = PAGE,
    progress: Progress | None = None,
) -> ImportReport:
    """Store every entry under its own id, and compare the store with the source afterwards, id by id.

    Entries that the store has already are skipped, so an interrupted import continues when it is called again.

    Args:
        store: The store to write.
        source: What :func:`open_source` returned.
        replace: Whether to replace units that have the id of an entry and are different; else they are an error.
        page_size: Entries of one transaction, at most 10,000.
        progress: Called with (stage, share done).

    Returns:
        The report.

    Raises:
        ConfigurationError: The store holds other units under ids of entries; pages before that are stored.
        InvalidUnitError: An entry cannot be stored, or an id occurs twice.
        StorageError: The store differs from the source afterwards.

    Examples:
        >>> from pathlib import Path
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> from memevolve_gpu.integrations.importers import import_into, open_source
        >>> size = Path("old.jsonl").write_text('{"id": "a", "text": "git bisect finds the bad commit"}')
        >>> with VectorStore("new", HashingEmbedder()) as store:
        ...     import_into(store, open_source("jsonl", "old.jsonl")).imported
        1
    """
    having("store", store, "store_batch", "a store")
    if not isinstance(source, Source):
        raise ConfigurationError(f"source must be what open_source returned, got {shown(source)}")
    started, told = time.monotonic(), callback("progress", progress) or (lambda *_: None)
    size = min(whole_number("page_size", page_size, error=ConfigurationError), 10_000)
    replacing, done, seen = (
        switch("replace", replace),
        dict.fromkeys(("imported", "present", "replaced"), 0),
        set[str](),
    )
    for rows in _pages(source, size, "importing", told):
        _refuse_repeated(rows, seen)
        missing, other = _different(store, rows)
        if other and not replacing:
            raise ConfigurationError(
                f"the store holds other units under {len(other)} ids of the source "
                f"({shown(other[0].unit['id'])}, ...); ask to replace them, or import into another store"
            )
        _write(store, [*missing, *other])
        done["imported"] += len(missing)
        done["replaced"] += len(other)
        done["present"] += len(rows) - len(missing) - len(other)
    verified = compared = 0
    for rows in _pages(source, size, "verifying", told):
        missing, other = _different(store, rows)
        if missing or other:
            wrong = shown([*missing, *other][0].unit["id"])
            number = len(missing) + len(other)
            raise StorageError(f"{number} units differ from their entries ({wrong}, ...); import again")
        verified += len(rows)
        compared += sum(row.vector is not None for row in rows)
    return ImportReport(
        **done, verified=verified, vectors_compared=compared, seconds=round(time.monotonic() - started, 3)
    )


def write_parquet(
    path: str,
    rows: Iterable[tuple[MemoryUnit, FloatArray]],
    model: str | None = None,
    expiries: Callable[[list[str]], dict[str, float]] = lambda _ids: {},
) -> int:
    """Write units and vectors to a Parquet file: the columns id, unit (JSON), vector (float32) and expires_at.

    Args:
        path: The file. It is written beside and renamed, so it appears complete or not at all.
        rows: What ``store.export_rows()`` gives.
        model: The name of the embedding model, kept in the file's metadata.
        expiries: ``store.expiries``, for the Unix times at which units expire.

    Returns:
        The number of units.

    Raises:
        ConfigurationError: pyarrow is not installed.
        InvalidUnitError: A row is no pair of a unit and its vector.
    """
    arrow, parquet = _library("pyarrow", "pyarrow"), _library("pyarrow.parquet", "pyarrow")
    fields = [("id", arrow.string()), ("unit", arrow.string()), ("vector", arrow.list_(arrow.float32()))]
    fields.append(("expires_at", arrow.float64()))
    schema = arrow.schema(
        fields, metadata={"memevolve_model": (optional_text("model", model) or "").encode(errors="replace")}
    )
    target = Path(path_text("path", path)).resolve()
    if not isinstance(rows, Iterable):
        raise InvalidUnitError(f"rows must be pairs of a unit and its vector, got {shown(rows)}")
    count, left = 0, map(_pair, rows)
    with draft_of(target, PRIVATE) as draft:
        with parquet.ParquetWriter(draft.path, schema) as writer:
            while page := list(islice(left, PAGE)):
                ids = [unit["id"] for unit, _ in page]
                times = expiries(ids)
                columns = {
                    "id": ids,
                    "unit": [json.dumps(unit, ensure_ascii=False) for unit, _ in page],
                    "vector": [np.asarray(vector) for _, vector in page],
                    "expires_at": [times.get(unit_id) for unit_id in ids],
                }
                writer.write_table(arrow.table(columns, schema=schema))
                count += len(page)
        draft.path.replace(target)
    return count


def _pair(row: Any) -> tuple[MemoryUnit, FloatArray]:
    pair = listed("rows", row, InvalidUnitError)
    if len(pair) != 2 or not isinstance(pair[0], Mapping) or "id" not in pair[0]:
        raise InvalidUnitError(f"rows must be pairs of a unit with an id and its vector, got {shown(row)}")
    return dict(pair[0]), np.asarray(pair[1], np.float32)


def _pages(source: Source, size: int, stage: str, told: Callable[..., Any]) -> Iterator[list[Row]]:
    done = 0
    with closing(source.rows()) as rows:  # type: ignore[type-var]  # generators
        while page := list(islice(rows, size)):
            yield [row for row in page if (row.expires_at or math.inf) > time.time()]
            done += len(page)
            told(stage, min(1.0, done / max(1, source.count or done)))


def _refuse_repeated(rows: Sequence[Row], seen: set[str]) -> None:
    for row in rows:
        if row.unit["id"] in seen:
            raise InvalidUnitError(f"the id {shown(row.unit['id'])} occurs twice in the source; keep one of them")
        seen.add(row.unit["id"])


def _different(store: StorageBackend, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that the store lacks, and those under whose ids it holds something else."""
    held = store.retrieve_batch([row.unit["id"] for row in rows])
    vectors = store.vectors_of(list(held))
    missing = [row for row in rows if row.unit["id"] not in held]
    there = [row for row in rows if row.unit["id"] in held]
    return missing, [row for row in there if not _same(row, held[row.unit["id"]], vectors.get(row.unit["id"]))]


def _same(row: Row, held: MemoryUnit, vector: FloatArray | None) -> bool:
    """The unit is that of the row but for the time stamps of the store, and the vector equals bit by bit."""
    ours = {**held.get("metadata", {}), **row.unit.get("metadata", {})}
    stamped = {**row.unit, "metadata": ours}
    extra = set(ours) - set(row.unit.get("metadata", {})) - {"created_at", "updated_at"}
    if extra or stamped != {**held, "metadata": held.get("metadata", {})}:
        return False
    return row.vector is None or (vector is not None and np.array_equal(row.vector, vector))


def _write(store: StorageBackend, rows: Sequence[Row]) -> None:
    if not rows:
        return
    vectors = [row.vector for row in rows if row.vector is not None]
    if vectors and len(vectors) < len(rows):
        bare = next(row for row in rows if row.vector is None)
        raise InvalidUnitError(f"the entry {shown(bare.unit['id'])} has no vector, and others have one")
    times = [row.expires_at for row in rows]
    if any(times) and "set_expiry" not in store.capabilities:
        raise ConfigurationError(f"the source holds units that expire, and a {type(store).__name__} has no expiry")
    more = {"expires_at": times} if any(times) else {}
    store.store_batch([row.unit for row in rows], *([np.stack(vectors)] if vectors else []), **more)


def _library(name: str, package: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(f"reading this needs {package} ({error}): pip install {package}") from error


def _row(unit_id: Json, text: Json, metadata: Mapping[str, object] | None, vector: Any, **fields: Any) -> Row:
    """An entry as a row; the text may be missing, and what is None in the metadata is left out."""
    kept = {key: value for key, value in (metadata or {}).items() if value is not None}
    unit: MemoryUnit = {"id": str(unit_id), **({"content": text} if text else {}), "metadata": kept, **fields}
    return Row(checked_unit(unit, f"entry {unit_id!r}"), _vector(vector, unit_id))


def _vector(value: Json, unit_id: Json) -> FloatArray | None:
    return None if value is None else read_vector(value, f"entry {unit_id!r}: its vector", InvalidUnitError)


def _object_row(entry: Mapping[str, object], where: str) -> Row:
    """A JSON object or a line of a table: id, text and vector under their usual names, the rest is metadata."""
    if isinstance(entry.get("unit"), (dict, str)) and ("vector" in entry or "expires_at" in entry):  # our export
        if entry.get("namespace"):
            raise InvalidUnitError(f"{where}: it belongs to a namespace; import the file without --from")
        held = entry["unit"]
        unit = checked_unit(json.loads(held) if isinstance(held, str) else held, where)
        until = entry.get("expires_at")
        if until is not None:
            until = real_number("expires_at", until, "a Unix time", -math.inf, math.inf, InvalidUnitError)
        return Row(unit, _vector(entry.get("vector"), unit.get("id")), until)
    if entry.get("id") in (None, ""):
        raise InvalidUnitError(f"{where}: it has no id; ids are needed to continue and to verify an import")
    text = next((name for name in _TEXTS if isinstance(entry.get(name), str)), None)
    vector = next((name for name in _VECTORS if entry.get(name) is not None), None)
    inner = entry.get("metadata")
    rest = {key: value for key, value in entry.items() if key not in ("id", "metadata", text, vector)}
    top = {key: rest.pop(key) for key in ("type", "tags") if rest.get(key) is not None}
    metadata = {**rest, **inner} if isinstance(inner, Mapping) else rest
    return _row(entry["id"], entry.get(text or ""), metadata, entry.get(vector or ""), **top)


def _only(kind: str, names: Sequence[str], chosen: str | None) -> str:
    """The collection that was asked for, or the only one."""
    if chosen is None and len(names) == 1:
        return names[0]
    if chosen not in names:
        listed = ", ".join(map(repr, names)) or "none"
        raise ConfigurationError(f"collection: name one of those that {kind} has here: {listed}")
    return str(chosen)


def _chroma(path: str, collection: str | None) -> Source:
    chroma = _library("chromadb", "chromadb")
    if not (Path(path) / "chroma.sqlite3").is_file():  # the library would make a new one
        raise ConfigurationError(f"path: {path!r} has no chroma.sqlite3; give the folder of a PersistentClient")
    settings = chroma.config.Settings(anonymized_telemetry=False)
    client = chroma.PersistentClient(path=path, settings=settings)
    name = _only("chroma", [one.name for one in client.list_collections()], collection)
    held = client.get_collection(name, embedding_function=None)

    def rows() -> Iterator[Row]:
        for start in range(0, held.count(), PAGE):
            got = held.get(limit=PAGE, offset=start, include=["embeddings", "documents", "metadatas"])
            yield from map(_row, got["ids"], got["documents"], got["metadatas"], got["embeddings"])

    configured = (held.configuration_json or {}).get("hnsw") or {}
    space = configured.get("space") or (held.metadata or {}).get("hnsw:space", "l2")
    return Source(rows, held.count(), _SPACES.get(space))


def _lancedb(path: str, collection: str | None) -> Source:
    database = _library("lancedb", "lancedb").connect(path)
    name = _only("lancedb", list(database.list_tables().tables), collection)
    table = database.open_table(name)
    return _table_source(lambda: table.search().limit(table.count_rows()).to_batches(PAGE), table.count_rows(), path)


def _parquet(path: str, _collection: str | None) -> Source:
    parquet = _library("pyarrow.parquet", "pyarrow")
    rows = parquet.read_metadata(path).num_rows
    return _table_source(lambda: parquet.ParquetFile(path).iter_batches(PAGE), rows, path)


def _table_source(batches: Callable[[], Iterable[Any]], count: int, path: str) -> Source:
    """Record batches of Arrow; the vectors are taken out as they are, without a way through Python's numbers."""

    def rows() -> Iterator[Row]:
        for batch in batches():
            named = next((name for name in _VECTORS if name in batch.schema.names), None)
            vectors = None if named is None else batch.column(named).to_numpy(zero_copy_only=False)
            plain = batch.select([name for name in batch.schema.names if name != named]).to_pylist()
            for position, entry in enumerate(plain):
                vector = None if vectors is None else vectors[position]
                yield _object_row({**entry, **({} if vector is None else {"vector": vector})}, path)

    return Source(rows, count)


def _qdrant(path: str, collection: str | None) -> Source:
    qdrant = _library("qdrant_client", "qdrant-client")
    client = qdrant.QdrantClient(url=path) if "://" in path else qdrant.QdrantClient(path=path)
    name = _only("qdrant", [one.name for one in client.get_collections().collections], collection)
    vectors = client.get_collection(name).config.params.vectors
    if isinstance(vectors, dict) and len(vectors) != 1:
        raise ConfigurationError(f"the collection {name!r} has {len(vectors)} vectors per point; one is needed")
    params = next(iter(vectors.values())) if isinstance(vectors, dict) else vectors

    def rows() -> Iterator[Row]:
        after = None
        while True:
            points, after = client.scroll(name, limit=PAGE, offset=after, with_vectors=True, with_payload=True)
            for point in points:
                vector = next(iter(point.vector.values())) if isinstance(point.vector, dict) else point.vector
                yield _object_row({**(point.payload or {}), "id": str(point.id), "vector": vector}, f"point {point.id}")
            if after is None:
                return

    return Source(rows, client.count(name).count, _SPACES.get(str(params.distance.value).lower()))


def _faiss_langchain(path: str, collection: str | None) -> Source:
    faiss = _library("faiss", "faiss-cpu")
    name = collection or "index"
    documents, ids = read_docstore(Path(path) / f"{name}.pkl")
    file = Path(path) / f"{name}.faiss"
    if not file.is_file():
        raise ConfigurationError(f"path: there is no {file}; give the folder of LangChain's save_local")
    index = faiss.read_index(str(file))
    if index.ntotal != len(ids):
        raise InvalidUnitError(f"{file} has {index.ntotal} vectors for {len(ids)} documents; it is damaged")

    def rows() -> Iterator[Row]:
        for position in range(index.ntotal):
            text, metadata = documents[ids[position]]
            yield _row(ids[position], text, metadata, index.reconstruct(position))

    return Source(rows, index.ntotal, "ip" if index.metric_type == faiss.METRIC_INNER_PRODUCT else "l2")


def _jsonl(path: str, _collection: str | None) -> Source:
    def rows() -> Iterator[Row]:
        with Path(path).open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _object_row(_object(line, f"{path} line {number}"), f"{path} line {number}")

    return Source(rows)


def _object(text: str, where: str) -> JsonObject:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidUnitError(f"{where}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InvalidUnitError(f"{where}: must be a JSON object, got {shown(found)}")
    return found


def _mem0(path: str, _collection: str | None) -> Source:
    """What ``memory.get_all()`` returned, as JSON: texts without vectors, which are embedded again."""
    text = Path(path).read_text(encoding="utf-8-sig")
    listed = re.match(r"\s*\[", text) is not None
    held = _object(f'{{"results": {text}}}' if listed else text, path).get("results")
    if not isinstance(held, list) or not all(isinstance(one, dict) for one in held):
        raise InvalidUnitError(f"{path}: must be what mem0's get_all() returns, a list of memories as 'results'")
    return Source(lambda: (_object_row(one, f"{path}: memory {n}") for n, one in enumerate(held)), len(held))


_READERS: dict[str, Callable[[str, str | None], Source]] = {
    "chroma": _chroma,
    "faiss-langchain": _faiss_langchain,
    "jsonl": _jsonl,
    "lancedb": _lancedb,
    "mem0": _mem0,
    "parquet": _parquet,
    "qdrant": _qdrant,
}
