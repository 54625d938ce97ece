"""Pages of the database file: their size fits the vectors, and nothing depends on it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import apsw
import numpy as np
import pytest
from records_kit import foreign_connection, unit
from support import as_child

from memevolve_gpu.errors import CorruptStoreError
from memevolve_gpu.records import Records


def filled(prefix: Path, dim: int, names: range) -> Records:
    """Store units one by one and leave the store open."""
    records = Records.open(prefix, dim=dim)
    for n in names:
        with records.write() as tx:
            tx.put(unit(f"u{n}"), f"text {n}", np.full(dim, n, "<f4").tobytes(), f"u{n}")
    return records


def filled_and_killed(prefix: Path, dim: int, names: range) -> None:
    def kill() -> None:
        kept = filled(prefix, dim, names)
        os.kill(os.getpid(), signal.SIGKILL)
        kept.close()

    assert as_child(kill) == -signal.SIGKILL


def page_size(file: Path) -> object:
    con = foreign_connection(file)
    try:
        return con.execute("PRAGMA page_size").fetchall()[0][0]
    finally:
        con.close()


@pytest.mark.parametrize(("dim", "size"), [(4, 4096), (384, 8192), (512, 8192), (768, 4096), (1024, 4096)])
def test_pages_are_large_where_more_vectors_fit_and_every_copy_keeps_that(tmp_path: Path, dim: int, size: int) -> None:
    with filled(tmp_path / "a", dim, range(3)) as records:
        records.backup(tmp_path / "b.db")
    assert page_size(tmp_path / "a.db") == page_size(tmp_path / "b.db") == size


@pytest.mark.parametrize("dim", [128, 384, 512, 768])
def test_the_size_that_is_chosen_takes_no_more_room_than_the_other(tmp_path: Path, dim: int) -> None:
    count = 200
    with filled(tmp_path / "a", dim, range(1)) as records, records.write() as tx:
        rows = ((unit(f"v{n}"), "", np.full(dim, n, "<f4").tobytes(), f"v{n}") for n in range(count))
        tx.put_many(rows)
    chosen = page_size(tmp_path / "a.db")
    with apsw.Connection(":memory:") as other:
        other.execute(f"PRAGMA page_size = {8192 if chosen == 4096 else 4096}")
        other.execute("CREATE TABLE vectors (slot INTEGER PRIMARY KEY, vector BLOB NOT NULL) STRICT")
        same = ((n, np.full(dim, n, "<f4").tobytes()) for n in range(count + 1))
        other.executemany("INSERT INTO vectors VALUES (?, ?)", same)
        taken = "SELECT sum(pgsize) FROM dbstat WHERE name = 'vectors'"
        alone = other.execute(taken).fetchall()[0][0]
    con = foreign_connection(tmp_path / "a.db")
    held = con.execute(taken).fetchall()[0][0]
    con.close()
    assert isinstance(held, int)
    assert isinstance(alone, int)
    assert held <= 1.1 * alone


def test_a_killed_writer_and_a_foreign_log_are_recognised_with_large_pages(tmp_path: Path) -> None:
    prefix, copy = tmp_path / "a", tmp_path / "copy"
    filled(prefix, 384, range(20)).close()
    shutil.copyfile(tmp_path / "a.db", copy)
    filled_and_killed(prefix, 384, range(20, 40))
    with Records.open(prefix) as records:
        assert records.count() == 40
        assert records.check() == []
    filled_and_killed(prefix, 384, range(40, 50))
    shutil.copyfile(copy, tmp_path / "a.db")
    with pytest.raises(CorruptStoreError, match="does not belong"):
        Records.open(prefix)
    with Records.open(prefix) as records:
        assert records.count() == 20
        assert records.check() == []
