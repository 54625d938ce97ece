"""Erasure for good: afterwards no byte of what was erased is in any file of the store, wherever it was killed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import apsw
import numpy as np
import pytest
from support import SEED, FakeEmbedder, as_child

from memevolve_gpu import InvalidFilterError, StorageConfig, VectorStore
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.errors import StorageError
from memevolve_gpu.live.maintenance import Maintenance
from memevolve_gpu.live.query_sample import QuerySample
from memevolve_gpu.records import erasure, writer
from memevolve_gpu.records.records import Records
from memevolve_gpu.records.transaction import Transaction
from memevolve_gpu.records.writer import Session

DIM = 32
CANARIES = 1000
WORD = "qanary"
SUBJECT = {"metadata.user": f"{WORD}-alice"}
VECTORS = np.random.default_rng(SEED).standard_normal((CANARIES, DIM)).astype(np.float32)


def opened(folder: Path) -> VectorStore:
    config = StorageConfig(background=False, min_training_units=200, max_memory_units=10**5)
    return VectorStore(folder / "store", FakeEmbedder(DIM), DIM, storage_config=config)


def fill(store: VectorStore) -> None:
    """Canaries that are alive, rewritten, edited, deleted and pruned, in units, index, snapshot, notes and history."""
    store.store_batch([{"id": f"kept-{i}", "content": f"kept number {i}"} for i in range(300)])
    store.store_batch(
        [
            {
                "id": f"{WORD}-{i}",
                "content": f"{WORD}text{i} of a subject",
                "tags": [f"{WORD}tag"],
                "metadata": {"user": SUBJECT["metadata.user"], "secret": f"{WORD}meta{i}"},
            }
            for i in range(CANARIES)
        ],
        VECTORS,
    )
    store.store({"id": "reused", "content": f"{WORD} once", "metadata": {"user": SUBJECT["metadata.user"]}})
    store.store({"id": "reused", "content": "of nobody"})
    store.run_maintenance()
    store.snapshot()
    for i in range(20):
        store.update(f"{WORD}-{i}", {"content": f"{WORD} rewritten {i}", "metadata": {"user": f"{WORD}-alice"}})
        store.update(f"{WORD}-{i + 20}", {"content": f"{WORD}text{i + 20} of a subject", "tags": [f"{WORD}tag"]})
    store.delete_batch([f"{WORD}-{i}" for i in range(50, 90)])
    SimpleManagementStrategy().prune(store, {"filters": {"metadata.secret": f"{WORD}meta99"}})
    store.search_vectors(VECTORS[:50], 3)
    store.search_units(f"{WORD}text300", 3)
    store.record_access([f"{WORD}-300"])


def remains(folder: Path) -> dict[str, int]:
    """How often each file of the store holds the word or a vector of the canaries."""
    found = {}
    needles = [VECTORS[i].tobytes()[:24] for i in range(0, CANARIES, 7)]
    for file in sorted(folder.iterdir()):
        raw = file.read_bytes()
        number = raw.count(WORD.encode()) + sum(raw.count(needle) for needle in needles)
        if number:
            found[file.name] = number
    return found


def terms_of(folder: Path) -> list[str]:
    """The words of the keyword indexes, which compress them, so that a scan of bytes could miss some."""
    con = apsw.Connection(str(folder / "store.db"))
    for table in ("words", "space_words"):
        con.execute(f"CREATE VIRTUAL TABLE temp.{table}_terms USING fts5vocab('main', '{table}', 'row')")
    sql = "SELECT term FROM temp.words_terms UNION SELECT term FROM temp.space_words_terms"
    found = [row[0] for row in con.execute(sql)]
    con.close()
    return found


def is_erased(folder: Path) -> None:
    with opened(folder) as store:
        assert store.count() == 301 + 20  # the edited canaries lost their user, and are not the subject's any more
        store.forget_subject({"tags": f"{WORD}tag"})
        assert (store.count(), store.check()) == (301, [])
        assert store.retrieve("reused", as_of=store.change_number) == store.retrieve("reused")
        assert all(version.unit is None or WORD not in str(version.unit) for version in store.history("reused"))
        assert {hit.id for hit in store.search_units("kept number 7", 1)} == {"kept-7"}
        assert remains(folder) == {}
    assert remains(folder) == {}
    assert not [term for term in terms_of(folder) if WORD in term]


def test_no_byte_of_a_thousand_canaries_is_left(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        fill(store)
        assert {"store.db-wal", "store.snapshot"} <= set(remains(tmp_path))
        last = store.change_number
        done = store.forget_subject(SUBJECT)
        assert done.units == CANARIES - 40 - 1 - 20
        assert done.versions > 0
        assert done.seq > last
        assert {Path(file).name for file in done.files} >= {"store.db", "store.db-wal", "store.snapshot"}
        assert done.not_erased == ()
        with pytest.raises(LookupError, match="read the store again"):
            list(store.changes(last))
        assert list(store.changes(done.seq)) == []
    is_erased(tmp_path)


STEPS: dict[str, tuple[Any, str]] = {
    "dropping": (Transaction, "merge_pending"),
    "before the commit": (Session, "commit"),
    "after the commit": (erasure, "damage_path"),
    "before the rewriting": (Session, "rewrite"),
    "before the log is emptied": (writer, "try_to_empty_log"),
    "before the note goes": (Transaction, "delete_meta"),
    "before the new snapshot": (Maintenance, "snapshot"),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a store with the canaries."""
    folder = tmp_path_factory.mktemp("filled")
    with opened(folder) as store:
        fill(store)
    return folder


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step_the_next_opening_finishes(filled: Path, tmp_path: Path, step: str) -> None:
    for file in filled.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    held = 300 + CANARIES + 1 - 40 - 1

    def die(*_args: Any, **_more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def act() -> None:
        store = opened(tmp_path)
        owner, name = STEPS[step]
        with patch.object(owner, name, die):
            store.forget_subject(SUBJECT)

    assert as_child(act) == -signal.SIGKILL
    with opened(tmp_path) as store:
        if step in ("dropping", "before the commit"):
            assert store.count() == held
            store.forget_subject(SUBJECT)
        assert store.count() < held
        assert not erasure.is_unfinished(store._open.records)
    is_erased(tmp_path)


def test_other_processes_drop_what_they_hold(tmp_path: Path) -> None:
    with opened(tmp_path) as other, opened(tmp_path) as store:
        fill(store)
        assert other.search_vectors(VECTORS[300:301], 1)[1] == [[f"{WORD}-300"]]
        store.forget_subject(SUBJECT)
        assert not other.exists(f"{WORD}-300")
        assert all(not str(one).startswith(f"{WORD}-3") for one in other.search_vectors(VECTORS[300:301], 3)[1][0])


def test_a_reader_that_does_not_end_is_named_and_the_rest_is_done_later(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        fill(store)
        reader = apsw.Connection(str(tmp_path / "store.db"))
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM units").fetchall()
        with pytest.raises(StorageError, match="a reader of another process"):
            store.forget_subject(SUBJECT, timeout=0.1)
        reader.execute("ROLLBACK")
        reader.close()
        assert erasure.is_unfinished(store._open.records)
    is_erased(tmp_path)


def test_a_namespace_is_erased_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for name in ("a", "b"):
            store.namespace(name).store({"id": "one", "content": f"{name} text", "metadata": {"user": "x"}})
        assert store.namespace("a").forget_subject({"metadata.user": "x"}).units == 1
        assert [store.namespace(name).count() for name in ("a", "b")] == [0, 1]
        assert store.forget_subject({"metadata.user": "x"}, prefix=()).units == 1
        with pytest.raises(InvalidFilterError, match="whose units"):
            store.forget_subject({})


@pytest.mark.parametrize("days", [7.0, 0.0])
def test_the_certificate_counts_what_the_history_held(tmp_path: Path, days: float) -> None:
    with opened(tmp_path) as store:
        store.store({"id": "old", "content": "one", "metadata": {"user": "alice"}})
        store.store({"id": "old", "content": "two", "metadata": {"user": "alice"}})
    config = StorageConfig(background=False, history_days=days)
    with VectorStore(tmp_path / "store", FakeEmbedder(DIM), DIM, storage_config=config) as store:
        store.store({"id": "new", "content": "three", "metadata": {"user": "alice"}})
        done = store.forget_subject({"metadata.user": "alice"})
        assert (done.units, done.versions) == (2, 1)
        assert store.check() == []


def noted(store: VectorStore, first: int) -> None:
    """Have a filter and queries of the subject noted, and kept with the records."""
    store.count({f"metadata.{WORD}field": 1})
    store.search_vectors(VECTORS[first : first + 70], 1)
    store.run_maintenance()
    store._open.live.save_fields(1.0)


def test_another_opening_does_not_write_again_what_was_erased(tmp_path: Path) -> None:
    """Each opening remembers the fields of its filters and a sample of its queries, and keeps them when it closes."""
    with opened(tmp_path) as other, opened(tmp_path) as store:
        fill(store)
        noted(other, 0)
        noted(store, 70)
        noted(other, 140)
        store.forget_subject(SUBJECT)
        assert other.count({"metadata.harmless": 1}) == 0
        other.search_vectors(np.ones((70, DIM)), 1)
        other.run_maintenance()
    is_erased(tmp_path)


def test_what_the_background_keeps_during_an_erasure_is_erased_too(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        fill(store)
        noted(store, 0)
        live = store._open.live
        store.count({f"metadata.{WORD}other": 1})
        store.search_vectors(VECTORS[200:270], 1)
        forget, write = QuerySample.forget, Records.write

        def late(sample: QuerySample) -> None:
            """The background saves between the erasure and its end; it waits for the transaction at most so long."""
            thread = threading.Thread(target=lambda: sample.save(0.2))
            thread.start()
            thread.join()
            forget(sample)

        def first_erase(records: Records, *arguments: Any, **named: Any) -> Any:
            with patch.object(Records, "write", write), patch.object(QuerySample, "forget", late):
                store.forget_subject(SUBJECT)
            return write(records, *arguments, **named)

        with patch.object(Records, "write", first_erase):
            live.save_fields(1.0)
    is_erased(tmp_path)
