"""Stores that earlier versions wrote stay readable: the golden files, opened as copies with today's code."""

from __future__ import annotations

import base64
import json
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import numpy as np
import numpy.typing as npt
import pytest
from golden import make

from memevolve_gpu import HistoryError, ModelMismatchError, VectorStore
from memevolve_gpu.index.snapshot_file import (
    FORMAT_VERSION,
    READABLE_VERSIONS,
    read_info,
    read_snapshot,
    write_snapshot,
)
from memevolve_gpu.live.index_stats import IndexStats
from memevolve_gpu.records.fulltext_buffer import tokenizer_of
from memevolve_gpu.records.schema import VERSION
from memevolve_gpu.records.tokenizer import STEMMING, TOKENIZER
from memevolve_gpu.types import SearchParams
from memevolve_gpu.utils.vectors import normalize_rows

FOLDER = Path(__file__).resolve().parent
FILES = sorted(FOLDER.glob("schema-*-snapshot-*.zip"))
MOST_BYTES = 600_000

WHAT_TO_DO = (
    "The format on disk has changed. Stores that people have must stay readable, so: (1) keep every golden file that "
    "is there; (2) for the database, raise its version by a script in MIGRATIONS of records/schema.py; for the "
    "snapshot, raise FORMAT_VERSION of index/snapshot_file.py (older snapshots stay readable while READABLE_VERSIONS "
    "names them; the index is built again from the records otherwise); (3) run: python cpu_tests/golden/make.py, and "
    "commit the new file beside the old ones."
)

EPSILON = 1e-5
"""Error of a distance, relative to the lengths of the vectors."""

CONDITIONS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "all": lambda _unit: True,
    "type": lambda unit: unit["type"] == "lesson",
    "tags": lambda unit: bool({"drei", "タグ"} & set(unit.get("tags", []))),
    "range": lambda unit: 0.25 <= unit["metadata"].get("score", -1) < 0.75 and unit["type"] != "tool",
}
"""What the filters of the golden stores mean."""

ENGINES: dict[str, list[Callable[[Any, npt.NDArray[np.float32]], Any]]] = {
    "exact": [],
    "two_stage": [lambda index, queries: index._codes.search(queries, make.TOP_K, SearchParams(rerank=30), None)],
    "ivf": [lambda index, queries: index._whole.search(queries, make.TOP_K, SearchParams(rerank=30), None)],
    "hnsw": [lambda index, queries: index._walk(queries, make.TOP_K, 60, None)],
}
"""How to ask what faiss kept; over so few rows a search would scan the vectors instead."""


class Copy(NamedTuple):
    """A store taken out of a golden file, to be opened and changed at will."""

    prefix: Path
    kind: make.Kind
    expected: dict[str, Any]
    schema_version: int
    snapshot_version: int

    def opened(self, function: Any = None) -> VectorStore:
        return VectorStore(self.prefix, function, storage_config=make.settings(self.kind))

    @property
    def snapshot(self) -> Path:
        return Path(f"{self.prefix}.snapshot")

    @property
    def queries(self) -> npt.NDArray[np.float32]:
        return floats(self.expected["queries"], make.DIM)


@pytest.fixture(scope="session")
def made_now(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes today; it is held to the same as the files."""
    return make.make(tmp_path_factory.mktemp("golden"))


@pytest.fixture(params=[*(path.stem for path in FILES), "made now"])
def golden(request: pytest.FixtureRequest) -> Path:
    made: Path = request.getfixturevalue("made_now") if request.param == "made now" else FOLDER / f"{request.param}.zip"
    return made


@pytest.fixture(params=make.KINDS, ids=lambda kind: kind.name)
def copy(request: pytest.FixtureRequest, golden: Path, tmp_path: Path) -> Copy:
    kind = request.param
    with zipfile.ZipFile(golden) as archive:
        contents = json.loads(archive.read("expected.json"))
        archive.extractall(tmp_path, [f"{kind.name}.db", f"{kind.name}.snapshot"])
    expected = contents["stores"][kind.name]
    return Copy(tmp_path / kind.name, kind, expected, contents["schema_version"], contents["snapshot_version"])


def floats(text: str, width: int) -> npt.NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, width)


# The files


def test_the_newest_golden_file_has_the_versions_of_the_code() -> None:
    name = f"schema-{VERSION}-snapshot-{FORMAT_VERSION}.zip"
    assert name in [path.name for path in FILES], f"{name} is missing. {WHAT_TO_DO}"


def test_every_schema_version_has_a_golden_file() -> None:
    found = {int(path.stem.split("-")[1]) for path in FILES}
    assert found == set(range(1, VERSION + 1)), WHAT_TO_DO


def test_golden_files_are_small_and_never_overwritten(made_now: Path) -> None:
    assert sum(path.stat().st_size for path in FILES) < MOST_BYTES
    with pytest.raises(FileExistsError):
        make.make(made_now.parent)


def test_the_files_carry_the_versions_of_their_names(copy: Copy, golden: Path) -> None:
    with apsw.Connection(f"{copy.prefix}.db", flags=apsw.SQLITE_OPEN_READONLY) as con:
        schema = con.pragma("user_version")
        assert con.pragma("application_id") == 0x4D456756  # "MEgV"
    assert (schema, header(copy.snapshot)[0]) == (copy.schema_version, copy.snapshot_version)
    assert golden.stem == f"schema-{copy.schema_version}-snapshot-{copy.snapshot_version}"


def test_the_files_hold_something_of_everything(copy: Copy) -> None:
    """Else a part of the format would be kept by nobody."""
    log = "log" if copy.schema_version < 4 else "changes"
    tables = ("meta", "units", "vectors", log, "terms", "access", "stale", "words")
    with apsw.Connection(f"{copy.prefix}.db", flags=apsw.SQLITE_OPEN_READONLY) as con:
        assert [name for name in tables if not con.execute(f"SELECT count(*) FROM {name}").get] == []
        assert {"embedding_model", "index_type", "query_sample"} <= {
            key for (key,) in con.execute("SELECT key FROM meta")
        }
        assert {op for (op,) in con.execute(f"SELECT op FROM {log}")} >= {1, 2, 3}
    assert "dead" in [section["name"] for section in header(copy.snapshot)[1]["sections"]]
    assert copy.expected["tail_rows"] > 0
    assert copy.expected["log"]["last_seq"] > copy.expected["snapshot"]["watermark"]


# What a reader finds


def test_every_unit_and_vector_is_read_back(copy: Copy) -> None:
    with copy.opened() as store:
        assert store.check() == []
        rows = list(store.export_rows())
        assert [unit for unit, _ in rows] == copy.expected["units"]
        assert np.array_equal(np.stack([vector for _, vector in rows]), floats(copy.expected["vectors"], make.DIM))
        for unit in copy.expected["units"]:
            assert store.retrieve(unit["id"]) == unit
        for name, holds in CONDITIONS.items():
            assert list(store.units(make.FILTERS[name])) == [unit for unit in copy.expected["units"] if holds(unit)]


def test_everything_else_that_the_database_knows_is_read_back(copy: Copy) -> None:
    with copy.opened() as store:
        statistics = store.statistics()
        for name in ("store_id", "embedding_model", "log", "management", "queries_sampled"):
            assert statistics[name] == copy.expected[name], name
        assert store.access_counts() == copy.expected["accesses"]
        assert (store.embedding_dim, store.metric) == (make.DIM, copy.kind.metric)


def test_what_was_deleted_comes_back_with_its_vector(copy: Copy) -> None:
    """Early files of version 2 keep the vector in the history, later ones leave it in its table; version 1 has none."""
    gone = {make.unit(number)["id"]: number for number in (7, 8, 30)}
    given = make.drawn(np.random.default_rng(make.SEED), make.COUNT)
    with copy.opened() as store:
        deletions = [one.id for one in store.operations() if one.kind == "delete_batch"]
        assert len(deletions) == (copy.schema_version > 1)
        for deletion in deletions:
            store.undo(deletion)
            assert {unit_id: vector.tolist() for unit_id, vector in store.vectors_of(list(gone)).items()} == {
                unit_id: given[number].tolist() for unit_id, number in gone.items()
            }
            assert store.delete_batch(list(gone)) == len(gone)
        assert store.check() == []


def test_the_history_of_an_old_file_goes_on(copy: Copy) -> None:
    """Past states, versions and the feed agree, and later changes and an erasure leave those of others as they were."""
    embedder = make.Embedder()
    embedder.next = np.ones(make.DIM, np.float32)
    with copy.opened(embedder) as store:
        if copy.schema_version == 1:
            with pytest.raises(HistoryError, match="older than the changes that are kept"):
                next(store.changes(0))
            return
        state: dict[str, dict[str, Any]] = {}
        states = {}
        for change in store.changes(0):
            state.pop(change.id, None)
            if change.unit is not None:
                state[change.id] = change.unit
            states[change.seq] = dict(state)
        assert len(states) > make.COUNT
        assert states[max(states)] == {unit["id"]: unit for unit in copy.expected["units"]}
        edited, removed, gone = make.unit(12)["id"], make.unit(20)["id"], make.unit(13)["id"]
        versions = store.history(edited)
        for _ in range(2):
            for seq, units in states.items():
                assert {unit["id"]: unit for unit in store.units(as_of=seq)} == units, seq
            store.update(edited, {"content": "of today"})
            store.delete(removed)
            store.store({"id": gone, "content": "again"})
        assert store.history(edited)[: len(versions)] == versions
        assert [one.change for one in store.history(removed)] == ["put", "delete"]
        assert [one.change for one in store.history(gone)][:3] == ["put", "delete", "put"]
        store.undo(next(one.id for one in store.operations() if one.kind == "delete"))
        assert store.retrieve(removed) == states[max(states)][removed]
        store.forget_subject({"id": gone})
        assert store.history(gone) == []
        assert store.history(edited)[: len(versions)] == versions
        assert store.check() == []


def test_words_are_found(copy: Copy) -> None:
    """Also where another tokenizer made the words, which are made again then; only the scores may differ."""
    with apsw.Connection(f"{copy.prefix}.db", flags=apsw.SQLITE_OPEN_READONLY) as con:
        same = tokenizer_of(con) == f"{TOKENIZER} {STEMMING}"
    with copy.opened() as store:
        found = store.search_keywords(make.KEYWORDS, make.TOP_K)
    assert [unit_id for _, unit_id in found] == [unit_id for _, unit_id in copy.expected["keywords"]]
    if same:
        assert [score for score, _ in found] == pytest.approx([score for score, _ in copy.expected["keywords"]])
    with apsw.Connection(f"{copy.prefix}.db", flags=apsw.SQLITE_OPEN_READONLY) as con:
        assert tokenizer_of(con) == f"{TOKENIZER} {STEMMING}"


def test_the_snapshot_is_used_and_the_log_behind_it_applied(copy: Copy) -> None:
    """Or, where it is of an older format, refused and replaced."""
    loaded = copy.snapshot_version in READABLE_VERSIONS
    with copy.opened() as store:
        statistics = store.statistics()
    assert ("snapshot-refused" in statistics["event_totals"]) is not loaded, statistics["events"]
    if loaded:
        assert statistics["event_totals"] == {"snapshot-loaded": 1}
        assert statistics["index"] == copy.expected["index"]
        assert statistics["index"]["kind"] == copy.kind.name
        for name in ("tail_rows", "tombstones"):
            assert statistics[name] == copy.expected[name], name
        assert statistics["generation"] == copy.expected["snapshot"]["generation"]


def test_searches_find_what_they_found_when_the_file_was_made(copy: Copy) -> None:
    with copy.opened() as store:
        found = {name: store.search_vectors(copy.queries, make.TOP_K, make.FILTERS[name]) for name in make.FILTERS}
    for name, (distances, ids) in found.items():
        before = copy.expected["found"][name]
        if copy.snapshot_version in READABLE_VERSIONS:  # older ones rounded the vectors of some indexes
            assert ids == before["ids"], name
            np.testing.assert_allclose(distances, floats(before["distances"], make.TOP_K), rtol=1e-4, atol=1e-5)
        truth, names = nearest(copy, CONDITIONS[name])
        np.testing.assert_allclose(distances, truth, atol=EPSILON * longest(copy))
        assert ids == names, name


def nearest(copy: Copy, holds: Callable[[dict[str, Any]], bool]) -> tuple[npt.NDArray[np.float64], list[list[str]]]:
    """Distances and ids of the nearest units, computed from what the golden file says of them."""
    units = copy.expected["units"]
    kept = [at for at, unit in enumerate(units) if holds(unit)]
    vectors = floats(copy.expected["vectors"], make.DIM)[kept].astype(np.float64)
    queries = copy.queries.astype(np.float64)
    products = queries @ vectors.T
    if copy.kind.metric == "l2":
        distances = ((queries[:, None] - vectors[None]) ** 2).sum(axis=2)
    elif copy.kind.metric == "ip":
        distances = -products
    else:
        distances = 1 - products / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)
    order = np.argsort(distances, axis=1)[:, : make.TOP_K]
    names = [[units[kept[at]]["id"] for at in row] for row in order.tolist()]
    return np.take_along_axis(distances, order, axis=1), names


def longest(copy: Copy) -> float:
    """The largest product of a query and a vector; 1 for directions."""
    if copy.kind.metric == "cosine":
        return 1.0
    vectors = floats(copy.expected["vectors"], make.DIM)
    return float(np.linalg.norm(vectors, axis=1).max() * np.linalg.norm(copy.queries, axis=1).max())


def test_what_faiss_kept_is_read_back(copy: Copy) -> None:
    if copy.snapshot_version not in READABLE_VERSIONS:
        assert copy.snapshot_version < FORMAT_VERSION
        return
    index, info = read_copy(copy)
    assert (index.kind, index.n, info.watermark) == (copy.kind.name, info.count, copy.expected["snapshot"]["watermark"])
    assert sum(index.list_sizes) == (index.n if index.nlist else 0)
    queries = normalize_rows(copy.queries) if copy.kind.metric == "cosine" else copy.queries
    _, truth = index.search(queries, make.TOP_K, SearchParams(exact=True))
    for ask in ENGINES[copy.kind.name]:
        _, found = ask(index, queries)
        hits = sum(len({*mine} & {*true}) for mine, true in zip(found.tolist(), truth.tolist(), strict=True))
        assert hits / truth.size >= 0.9


def test_what_was_measured_on_the_body_is_read_back(copy: Copy) -> None:
    if copy.snapshot_version not in READABLE_VERSIONS:
        assert copy.snapshot_version < FORMAT_VERSION
        return
    index, info = read_copy(copy)
    stats = IndexStats.from_dict(info.extra, index)
    assert_kept(info.extra, json.loads(json.dumps(stats.to_dict())))
    assert (stats.calibration is not None, stats.quality is not None) == (copy.kind.name != "exact",) * 2


def read_copy(copy: Copy) -> tuple[Any, Any]:
    return read_snapshot(
        copy.snapshot, store_id=copy.expected["store_id"], dim=make.DIM, metric=read_info(copy.snapshot).metric
    )


# What a writer does with it


def test_an_old_store_goes_on(copy: Copy) -> None:
    embedder = make.Embedder()
    embedder.next = np.ones(make.DIM, np.float32)
    count = len(copy.expected["units"])
    with copy.opened(embedder) as store:
        assert store.store({"content": "of today"}) == copy.expected["next_id"]
        assert store.count() == count + 1
        store.retrain()
        assert store.delete(copy.expected["units"][0]["id"])
        store.snapshot()
    with copy.opened(embedder) as store:
        assert store.check() == []
        assert store.count() == count
        assert store.statistics()["event_totals"] == {"snapshot-loaded": 1}
        assert store.index.kind in (copy.kind.name, "exact")


def test_vectors_of_another_model_are_refused(copy: Copy) -> None:
    embedder = make.Embedder()
    embedder.model_name = "another"
    with pytest.raises(ModelMismatchError):
        copy.opened(embedder)


def test_tables_are_those_of_a_new_store(copy: Copy, tmp_path: Path) -> None:
    """What migrations make of an old file is what a new file has; and no table changes without a new version."""
    with copy.opened():
        old = tables(Path(f"{copy.prefix}.db"))
    with VectorStore(tmp_path / "new", None, make.DIM, storage_config=make.settings(copy.kind)):
        new = tables(tmp_path / "new.db")
    assert old == new, WHAT_TO_DO


def tables(path: Path) -> dict[str, Any]:
    """Name to kind, flags and columns; of virtual tables the statement that made them, of indexes the columns."""
    found: dict[str, Any] = {}
    with apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY) as con:
        made = con.execute("SELECT name, type, sql FROM sqlite_schema").fetchall()
        for name, kind, sql in [tuple(map(str, row)) for row in made]:
            flags = con.execute("SELECT type, wr, strict FROM pragma_table_list WHERE name = ?", (name,)).fetchall()
            columns = con.execute("SELECT * FROM pragma_table_xinfo(?)", (name,)).fetchall()
            keys = con.execute("SELECT * FROM pragma_index_xinfo(?)", (name,)).fetchall()
            virtual = " ".join(sql.split()) if flags and flags[0][0] == "virtual" else None
            found[name] = (kind, flags, columns, keys, virtual)
    return found


def test_snapshots_are_written_as_the_golden_one_was(copy: Copy, tmp_path: Path) -> None:
    """The layout does not change without a new version; facts may be added, and are read as absent from older files.

    The header says in which order the sections are, and every release reads every order. What faiss writes is its own
    affair, and it checks it by itself.
    """
    if copy.snapshot_version != FORMAT_VERSION:
        assert copy.snapshot_version < FORMAT_VERSION
        return
    index, info = read_copy(copy)
    write_snapshot(tmp_path / "again", index, info)
    (version, before), (now, after) = header(copy.snapshot), header(tmp_path / "again")
    assert now == version
    assert after.keys() == before.keys(), WHAT_TO_DO
    assert_kept(before["info"], after["info"])
    written = {section["name"]: section for section in after["sections"]}
    assert sorted(written) == sorted(section["name"] for section in before["sections"])
    for old in before["sections"]:
        new = written[old["name"]]
        of_faiss = old["name"] in ("faiss", "whole")
        assert (new["dtype"] if of_faiss else new) == (old["dtype"] if of_faiss else old), WHAT_TO_DO


def assert_kept(old: Any, new: Any) -> None:
    """All of the JSON value ``old`` is in ``new``, whose objects may have more keys."""
    if isinstance(old, dict):
        assert old.keys() <= new.keys(), WHAT_TO_DO
        for key, value in old.items():
            assert_kept(value, new[key])
    elif isinstance(old, list):
        assert len(old) == len(new), WHAT_TO_DO
        for one, other in zip(old, new, strict=True):
            assert_kept(one, other)
    else:
        assert old == new, WHAT_TO_DO


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """Format version and header of a snapshot, by its documented layout and not by the code; its sections fill it."""
    raw = path.read_bytes()
    magic, version, length, _ = struct.unpack_from("<8sIII", raw)
    assert magic == b"MEVSNAP\n"
    document: dict[str, Any] = json.loads(raw[20 : 20 + length])
    end = 20 + length
    for section in document["sections"]:
        size = math.prod(section["shape"]) * np.dtype(section["dtype"]).itemsize
        apart = {"vectors"} if version == 2 else {"vectors", "centroids"} if version > 2 else set()
        step = 65536 if section["name"] in apart else 4096
        end = -(-end // step) * step + size
    assert end == len(raw)
    return version, document
