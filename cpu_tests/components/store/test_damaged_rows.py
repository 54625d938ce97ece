"""Damage in any row of any table comes out as CorruptStoreError, whatever is read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest
from support import FakeBatchEmbedder

from memevolve_gpu import CorruptStoreError, MemEvolveError, StorageConfig, VectorStore
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.components.retrieve import HybridRetrievalStrategy, KeywordRetrievalStrategy
from memevolve_gpu.training import training_set

DIM = 8
CONFIG = {"background": False, "min_training_units": 100, "durability": "normal"}


def opened(prefix: Path) -> VectorStore:
    return VectorStore(prefix, FakeBatchEmbedder(DIM), DIM, storage_config=StorageConfig(**CONFIG))


def made(prefix: Path) -> None:
    """Ten folded units and five that are not, a log, access figures, meta values of every kind, no snapshot."""
    with opened(prefix) as store:
        units = [
            {"id": f"u{n}", "content": f"word{n} common text", "type": "lesson", "tags": ["t", f"t{n}"]}
            for n in range(10)
        ]
        store.store_batch(units)
        store._open.records.checkpoint()
        store.store_batch([{**unit, "id": f"p{n}"} for n, unit in enumerate(units[:5])])
        store.delete("u9")
        store.retrieve("u1")
        store.search("word1", 3)
        store.register_management_operation("prune", {"n": 1})
        with store._open.records.write() as tx:
            tx.set_meta("embedding_model", b"a model")
            tx.set_meta("service_samples/0", b'\x05\0\0\0["a"]' + bytes(4 * DIM))
    for ending in (".snapshot", ".damage"):
        prefix.with_name(prefix.name + ending).unlink(missing_ok=True)


READS: dict[str, Callable[[VectorStore, Path], Any]] = {
    "retrieve": lambda s, _: s.retrieve("u3"),
    "retrieve pending": lambda s, _: s.retrieve("p3"),
    "retrieve_batch": lambda s, _: s.retrieve_batch(["u3", "p3"]),
    "retrieve_all": lambda s, _: s.retrieve_all(),
    "units": lambda s, _: list(s.units()),
    "units by type": lambda s, _: list(s.units({"type": "lesson"})),
    "units by field": lambda s, _: list(s.units({"content": {"exists": True}})),
    "exists": lambda s, _: s.exists("u3"),
    "count": lambda s, _: s.count(),
    "get_metadata": lambda s, _: s.get_metadata("u3"),
    "search": lambda s, _: s.search("word3 common text", 20),
    "search by type": lambda s, _: s.search("word3", 20, {"type": "lesson"}),
    "search by field": lambda s, _: s.search("word3", 20, {"content": {"exists": True}}),
    "search_units": lambda s, _: s.search_units("word3 common text", 20),
    "search_vectors": lambda s, _: s.search_vectors(np.ones((1, DIM), np.float32), 20),
    "search_keywords": lambda s, _: s.search_keywords("word3 common", 20),
    "search_keywords by field": lambda s, _: s.search_keywords("word3 common", 20, {"content": {"exists": True}}),
    "export_rows": lambda s, _: list(s.export_rows()),
    "vectors_of": lambda s, _: s.vectors_of(["u3", "p3"]),
    "sample_vectors": lambda s, _: s.sample_vectors(20),
    "inventory": lambda s, _: s.inventory(),
    "similarities": lambda s, _: s.similarities("word3", ["u3", "p3"]),
    "access_order": lambda s, _: (s.access_order("lru", 20), s.access_order("lfu", 20)),
    "access_counts": lambda s, _: s.access_counts(),
    "change_number": lambda s, _: s.change_number,
    "health": lambda s, _: s.get_storage_health(),
    "statistics": lambda s, _: s.statistics(),
    "check": lambda s, _: s.check(),
    "data": lambda s, _: (dict(s.data), len(s.data), "u3" in s.data, s.data.get("u3")),
    "index": lambda s, _: (s.index.ntotal, s.index.kind, repr(s)),
    "save_state": lambda s, _: s.save_state(),
    "backup": lambda s, folder: s.backup(folder / f"backup{len(list(folder.iterdir()))}"),
    "maintenance": lambda s, _: s.run_maintenance(),
    "retrain": lambda s, _: s.retrain(samples=True),
    "keywords strategy": lambda s, _: KeywordRetrievalStrategy().retrieve("word3 common", s, top_k=20),
    "hybrid strategy": lambda s, _: HybridRetrievalStrategy().retrieve("word3 common", s, top_k=20),
    "management": lambda s, _: SimpleManagementStrategy().get_health_metrics(s),
    "update": lambda s, _: s.update("u3", {"content": "other"}),
    "store": lambda s, _: s.store({"content": "new"}),
    "delete": lambda s, _: s.delete("p3"),
    "delete_batch": lambda s, _: s.delete_batch(["u3"]),
}

BAD_TEXT = "CAST(x'ff8041' AS TEXT)"
DAMAGE = {
    "unit cut": "UPDATE units SET unit = substr(unit, 1, 20) WHERE id IN ('u3', 'p3')",
    "unit empty": "UPDATE units SET unit = '' WHERE id IN ('u3', 'p3')",
    "unit no object": "UPDATE units SET unit = '[1]' WHERE id IN ('u3', 'p3')",
    "unit no utf-8": f"UPDATE units SET unit = {BAD_TEXT} WHERE id IN ('u3', 'p3')",
    "unit deep": "UPDATE units SET unit = replace(hex(zeroblob(2000)), '00', '[') WHERE id IN ('u3', 'p3')",
    "unit null": "UPDATE units SET unit = NULL WHERE id IN ('u3', 'p3')",
    "unit number": "UPDATE units SET unit = 7 WHERE id IN ('u3', 'p3')",
    "unit blob": "UPDATE units SET unit = x'ff00' WHERE id IN ('u3', 'p3')",
    "odd fields": """UPDATE units SET unit = '{"id": 1, "metadata": 3, "tags": {}}' WHERE id IN ('u3', 'p3')""",
    "id no utf-8": f"UPDATE units SET id = {BAD_TEXT} WHERE id = 'u3'",
    "id number": "UPDATE units SET id = 7 WHERE id = 'u3'",
    "id null": "UPDATE units SET id = NULL WHERE id = 'u3'",
    "slot negative": "UPDATE units SET slot = -5 WHERE id = 'u3'",
    "slot huge": "UPDATE units SET slot = 9223372036854775807 WHERE id = 'u3'",
    "vector short": "UPDATE vectors SET vector = substr(vector, 1, 12) WHERE slot IN (4, 14)",
    "vector odd": "UPDATE vectors SET vector = x'010203' WHERE slot IN (4, 14)",
    "vector long": "UPDATE vectors SET vector = zeroblob(4000) WHERE slot IN (4, 14)",
    "vector empty": "UPDATE vectors SET vector = x'' WHERE slot IN (4, 14)",
    "vector text": "UPDATE vectors SET vector = 'text' WHERE slot IN (4, 14)",
    "vector bad text": f"UPDATE vectors SET vector = {BAD_TEXT} WHERE slot IN (4, 14)",
    "vector null": "UPDATE vectors SET vector = NULL WHERE slot IN (4, 14)",
    "vector nan": f"UPDATE vectors SET vector = x'{'0000c07f' * DIM}' WHERE slot = 4",
    "vector gone": "DELETE FROM vectors WHERE slot IN (4, 14)",
    "vectors gone": "DELETE FROM vectors",
    "units gone": "DELETE FROM units",
    "log slot": "UPDATE changes SET slot = -7 WHERE seq = 4",
    "log slot text": "UPDATE changes SET slot = 'x' WHERE seq IN (4, 14)",
    "log op": "UPDATE changes SET op = 99 WHERE seq IN (4, 14)",
    "log op text": f"UPDATE changes SET op = {BAD_TEXT} WHERE seq IN (4, 14)",
    "log op null": "UPDATE changes SET op = NULL WHERE seq IN (4, 14)",
    "log hole": "DELETE FROM changes WHERE seq IN (4, 14)",
    "log end": "DELETE FROM changes WHERE seq > 13",
    "log gone": "DELETE FROM changes",
    "counters gone": "DELETE FROM counters",
    "counters negative": "UPDATE counters SET last_seq = -1, horizon = -4, last_slot = -9, count = -3",
    "counters huge": "UPDATE counters SET last_seq = 9223372036854775807, last_slot = 9223372036854775807",
    "counters count huge": "UPDATE counters SET count = 9223372036854775807",
    "counters zero": "UPDATE counters SET last_seq = 0, last_slot = 0, count = 0, folded = 0, backlog = 0",
    "counters horizon": "UPDATE counters SET horizon = last_seq + 10",
    "counters text": f"UPDATE counters SET count = 'x', last_seq = {BAD_TEXT}",
    "counters null": "UPDATE counters SET count = NULL, last_seq = NULL, next_auto = NULL, folded = NULL",
    "counters link": "UPDATE counters SET link = x'00'",
    "counters link text": "UPDATE counters SET link = 'text'",
    "counters auto": "UPDATE counters SET next_auto = -1",
    "store gone": "DELETE FROM store",
    "store dim": "UPDATE store SET dim = 0",
    "store dim huge": "UPDATE store SET dim = 9223372036854775807",
    "store dim text": "UPDATE store SET dim = 'x'",
    "store metric": "UPDATE store SET metric = 'taxicab'",
    "store metric no utf-8": f"UPDATE store SET metric = {BAD_TEXT}",
    "store id": "UPDATE store SET store_id = 7",
    "store id no utf-8": f"UPDATE store SET store_id = {BAD_TEXT}",
    "meta cut": "UPDATE meta SET value = substr(value, 1, length(value) / 2)",
    "meta empty": "UPDATE meta SET value = x''",
    "meta bits": "UPDATE meta SET value = x'ff80ff80ff80ff80'",
    "meta text": "UPDATE meta SET value = 'text'",
    "meta null": "UPDATE meta SET value = NULL",
    "meta number": "UPDATE meta SET value = 8",
    "terms": "UPDATE terms SET value = CAST(x'ff' || value AS TEXT), slot = -slot",
    "terms slot text": "UPDATE terms SET slot = 'x' || slot",
    "terms gone": "DELETE FROM terms",
    "stale text": f"UPDATE stale SET unit = {BAD_TEXT}",
    "stale cut": "UPDATE stale SET unit = '{'",
    "stale null": "UPDATE stale SET unit = NULL",
    "access": "UPDATE access SET last_access = 1e308, count = -9223372036854775807",
    "access text": f"UPDATE access SET last_access = 'x', count = {BAD_TEXT}",
    "access null": "UPDATE access SET last_access = NULL, count = NULL",
    "access id": "UPDATE access SET id = CAST(x'ff' || id AS TEXT)",
    "words": "DELETE FROM words_data",
    "words data": "UPDATE words_data SET block = x'ff'",
    "words docsize": "DELETE FROM words_docsize",
    "words config": "DELETE FROM words_config",
}
TABLES = ("units", "vectors", "changes", "counters", "store", "meta", "terms", "stale", "access")


def damage(path: Path, sql: str) -> None:
    """Change the database as no writer would: without the types and constraints of its tables."""
    with apsw.Connection(str(path)) as con:
        con.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 0)
        con.execute("PRAGMA writable_schema = ON; PRAGMA ignore_check_constraints = ON")
        for word in ("STRICT, ", " STRICT", " NOT NULL"):
            con.execute(
                f"UPDATE sqlite_schema SET sql = replace(sql, '{word}', '') WHERE type = 'table' AND name IN {TABLES}"
            )
        con.execute("PRAGMA writable_schema = RESET")
        con.execute(sql)
    con.close()


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training without queries take a tenth of its samples: to make them takes longer than everything else here."""
    monkeypatch.setattr(training_set, "SERVICE_TOTAL", 200)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database file of the store that is damaged."""
    prefix = tmp_path_factory.mktemp("sound") / "store"
    made(prefix)
    return prefix.with_name("store.db")


def walked(prefix: Path, walk: Mapping[str, Callable[[VectorStore, Path], Any]]) -> dict[str, BaseException]:
    """What each read ended with that did not succeed, by name; opening itself is the read \"open\"."""
    found: dict[str, BaseException] = {}
    try:
        with opened(prefix) as store:
            for name, act in walk.items():
                try:
                    act(store, prefix.parent)
                except Exception as error:  # noqa: BLE001 - judged by the caller
                    found[name] = error
    except Exception as error:  # noqa: BLE001 - likewise
        found["open"] = error
    return found


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_of_any_kind_comes_out_as_our_errors(sound: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(sound, tmp_path / "store.db")
    damage(tmp_path / "store.db", DAMAGE[name])
    found = walked(tmp_path / "store", READS)
    assert {read: error for read, error in found.items() if not isinstance(error, MemEvolveError)} == {}
    if name in NAMED:
        assert found
        for read, error in found.items():
            if read not in ("backup", "retrain"):
                assert isinstance(error, CorruptStoreError), read
                assert re.search("'[up]3'|slot (4|14)", str(error)), (read, error)
    with VectorStore(tmp_path / "other", None, DIM) as other:
        assert other.count() == 0  # nothing of it stays in this process


NAMED = {
    name
    for name in DAMAGE
    if name.startswith(("unit ", "vector ")) and name not in ("vector nan", "vector gone", "vector bad text")
}
"""Damage of single rows: every read that fails says which unit it is."""


def test_the_store_that_is_damaged_is_sound(sound: Path, tmp_path: Path) -> None:
    shutil.copy(sound, tmp_path / "store.db")
    assert walked(tmp_path / "store", READS) == {}


def test_a_unit_that_is_damaged_is_replaced_by_storing_it_again(tmp_path: Path) -> None:
    """While everything fits, nothing is read to find out how many units are new."""
    prefix = tmp_path / "memory"
    made(prefix)
    con = apsw.Connection(f"{prefix}.db")
    con.execute("UPDATE units SET unit = '{broken' WHERE id IN ('u3', 'u4')")
    con.close()
    with opened(prefix) as store:
        store.store({"id": "u3", "content": "new"})
        store.store_batch([{"id": "u4", "content": "new too"}])
        found = store.retrieve_batch(["u3", "u4"])
    assert [found[one]["content"] for one in ("u3", "u4")] == ["new", "new too"]
