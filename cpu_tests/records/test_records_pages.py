"""Pages of the database file: nothing depends on their size."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

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
            tx.put(unit(f"u{n}", content=f"text {n}"), np.full(dim, n, "<f4").tobytes(), f"u{n}")
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


def with_large_pages(file: Path) -> None:
    """As builds made them that gave vectors of 384 to 767 columns larger pages."""
    con = foreign_connection(file)
    con.execute("PRAGMA journal_mode = delete; PRAGMA page_size = 8192; VACUUM").fetchall()
    con.close()


@pytest.mark.parametrize("dim", [4, 384, 1536])
def test_new_files_have_pages_of_4_kib(tmp_path: Path, dim: int) -> None:
    filled(tmp_path / "a", dim, range(1)).close()
    assert page_size(tmp_path / "a.db") == 4096


def test_large_pages_stay_in_the_file_and_in_its_copies(tmp_path: Path) -> None:
    filled(tmp_path / "a", 384, range(3)).close()
    with_large_pages(tmp_path / "a.db")
    with filled(tmp_path / "a", 384, range(3, 6)) as records:
        records.rewrite(1.0)
        records.backup(tmp_path / "b.db")
        assert records.check() == []
    assert page_size(tmp_path / "a.db") == page_size(tmp_path / "b.db") == 8192
    with Records.open(tmp_path / "b") as copy:
        assert copy.count() == 6


def test_a_killed_writer_and_a_foreign_log_are_recognised_with_large_pages(tmp_path: Path) -> None:
    prefix, copy = tmp_path / "a", tmp_path / "copy"
    filled(prefix, 384, range(20)).close()
    with_large_pages(tmp_path / "a.db")
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
