"""Backup, check and repair."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest
from records_kit import DIM, facts, foreign_connection, put, unit, vector

from memevolve_gpu.errors import CorruptStoreError, StorageError
from memevolve_gpu.records import Records, backup
from memevolve_gpu.types import Op


@pytest.fixture
def stocked(records: Records) -> Records:
    """Rows folded and pending, live and dropped, replaced and edited."""
    with records.write() as tx:
        for number in range(8):
            put(tx, f"u{number}", f"word{number}", tags=[f"t{number % 2}"])
        tx.merge_pending()
        tx.drop("u0")
        put(tx, "u1", "word1 again", tags=["t1"])
        tx.edit("u2", unit("u2", tags=["edited"]))
        put(tx, "late", "latecomer", tags="alone")
    return records


def test_a_backup_holds_everything_and_is_a_store_of_its_own(stocked: Records, tmp_path: Path) -> None:
    made = stocked.backup(tmp_path / "copy")
    assert made == tmp_path / "copy.db"
    with Records.open(tmp_path / "copy") as copy:
        assert copy.head() == stocked.head()
        assert facts(copy) == facts(stocked)
        assert copy.vectors_of(list(copy.ids())) == stocked.vectors_of(list(stocked.ids()))
        assert copy.keyword("word3 latecomer", 5) == stocked.keyword("word3 latecomer", 5)
        assert copy.check() == []
        assert copy.store_id != stocked.store_id
        put(copy, "only here")
    assert not stocked.exists("only here")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("copy")) == ["copy.db", "copy.lock"]


def test_a_backup_refuses_what_exists(stocked: Records, tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_text("precious")
    for target in (tmp_path / "copy.db", tmp_path / "copy", stocked.path, tmp_path / "missing" / "copy"):
        with pytest.raises(StorageError, match=r"exists|create it"):
            stocked.backup(target)
    assert (tmp_path / "copy.db").read_text() == "precious"
    assert facts(stocked)
    put(stocked, "still works")


def test_a_backup_never_shows_an_unfinished_copy(
    stocked: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(backup, "_publish", fail)
    with pytest.raises(StorageError, match="no space"):
        stocked.backup(tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []


def test_a_backup_is_one_moment_while_others_write(records: Records, tmp_path: Path) -> None:
    with records.write() as tx:
        tx.put_many((unit(f"u{n}", content="x" * 500), "x", vector(), f"u{n}") for n in range(3000))
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            with records.write() as tx:
                put(tx, f"a{number}")
                put(tx, f"b{number}")
            number += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while records.count() < 3010:
            pass
        first, second = records.backup(tmp_path / "one"), records.backup(tmp_path / "two")
    finally:
        stop.set()
        thread.join()
    counts = []
    for made in (first, second):
        with Records.open(str(made).removesuffix(".db")) as copy:
            ids = set(copy.ids())
            assert {one.replace("a", "b") for one in ids if one[0] == "a"} == {one for one in ids if one[0] == "b"}
            assert copy.check() == []
            counts.append(len(ids))
    assert 3010 <= counts[0] <= counts[1] <= records.count()


BREAKAGES: dict[str, tuple[str, bool]] = {
    "DELETE FROM units WHERE id = 'u3'": ("orphan_vectors", True),
    "INSERT INTO vectors VALUES (7777, x'00')": ("orphan_vectors", True),
    "DELETE FROM vectors WHERE slot = 4": ("missing_vectors", False),
    "UPDATE vectors SET vector = x'0011' WHERE slot = 4": ("wrong_vectors", False),
    "UPDATE units SET unit = '{broken' WHERE id = 'u4'": ("unreadable_units", False),
    "UPDATE units SET unit = '[1]' WHERE id = 'u4'": ("unreadable_units", False),
    "UPDATE vectors SET vector = zeroblob(16) WHERE slot = 4": ("wrong_checksums", False),
    "UPDATE units SET unit = replace(unit, 'ontent', 'oNtent') WHERE id = 'u4'": ("wrong_checksums", False),
    "UPDATE units SET unit = json_set(unit, '$.id', 'x') WHERE id = 'u4'": ("renamed_units", True),
    "UPDATE units SET unit = json_remove(unit, '$.id') WHERE id = 'late'": ("renamed_units", True),
    "UPDATE counters SET count = 77": ("counters", True),
    "UPDATE counters SET last_slot = 3": ("counters", True),
    "UPDATE counters SET last_seq = 3": ("counters", True),
    "UPDATE counters SET backlog = 12": ("counters", True),
    "UPDATE units SET id = 'unit_41', unit = json_set(unit, '$.id', 'unit_41'), unit_crc = NULL WHERE id = 'u4'": (
        "counters",
        True,
    ),
    "UPDATE counters SET horizon = 5": ("log", True),
    "DELETE FROM changes WHERE seq = 4": ("log", True),
    "UPDATE changes SET slot = 2 WHERE seq = 5": ("log", True),
    "DELETE FROM changes": ("log", True),
    f"UPDATE changes SET op = {Op.EDIT} WHERE op = {Op.DROP}": ("log", True),
    "DELETE FROM words WHERE rowid = 4": ("words", True),
    "INSERT INTO words (rowid, text) VALUES (999, 'ghost')": ("words", True),
    "DELETE FROM stale": ("words", True),
    "UPDATE counters SET folded = 0": ("words", True),
    "DELETE FROM terms WHERE slot = 4": ("terms", True),
    "INSERT INTO terms VALUES ('tags', 'ghost', 5)": ("terms", True),
    "UPDATE words_data SET block = zeroblob(3) WHERE id > 100": ("damaged_file", True),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_check_finds_and_fixes(stocked: Records, breakage: str) -> None:
    code, fixable = BREAKAGES[breakage]
    assert stocked.check() == []
    con = foreign_connection(stocked.path)
    con.execute(breakage)
    con.close()
    assert code in [finding.code for finding in stocked.check()]
    watermark = stocked.head().last_seq
    fixed = {finding.code: finding.fixed for finding in stocked.check(fix=True)}
    assert fixed[code] is fixable
    left = stocked.check()
    assert (code in [finding.code for finding in left]) is not fixable
    if fixable:
        head = stocked.head()
        assert head.horizon > watermark or head.horizon == head.last_seq
        assert left == stocked.check(fix=True) == []
        assert put(stocked, "new") > head.last_slot


def test_repair_keeps_every_unit_and_finds_it_again(stocked: Records) -> None:
    units = facts(stocked)
    con = foreign_connection(stocked.path)
    con.execute(
        "DROP TABLE words; DELETE FROM terms; DELETE FROM changes; UPDATE counters SET count = 0, last_slot = 1"
    )
    con.close()
    codes = [finding.code for finding in stocked.check()]
    assert {"counters", "log", "words", "terms"} <= set(codes)
    findings = stocked.check(fix=True)
    assert all(finding.fixed for finding in findings)
    assert facts(stocked) == units
    assert {found for _, found in stocked.keyword("lesson", 99)} == set(units)
    assert stocked.matching({"tags": "edited"}).tolist() == [3]
    assert stocked.check() == []


def test_the_default_text_holds_what_is_worth_finding(stocked: Records) -> None:
    con = foreign_connection(stocked.path)
    con.execute("DELETE FROM words")
    con.close()
    assert [finding.fixed for finding in stocked.check(fix=True)] == [True]
    assert [found for _, found in stocked.keyword("edited", 5)] == ["u2"]
    assert len(stocked.keyword("lesson", 99)) == stocked.count()


def damage(path: Path, con: apsw.Connection, table: str) -> None:
    """Overwrite the root page of a table with noise."""
    root = con.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchall()[0][0]
    size = con.execute("PRAGMA page_size").fetchall()[0][0]
    con.close()
    assert isinstance(root, int)
    assert isinstance(size, int)
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xa5" * size)


@pytest.mark.parametrize(
    ("table", "act"),
    [
        ("units", lambda records: records.get("u1")),
        ("units", lambda records: list(records.ids())),
        ("vectors", lambda records: records.scan(0, 99, 99)),
        ("changes", lambda records: records.read_after(0, 99)),
        ("counters", lambda records: records.head()),
        ("counters", lambda records: put(records, "x")),
    ],
)
def test_damaged_pages_are_reported_as_such(
    stocked: Records, prefix: Path, table: str, act: Callable[[Records], object]
) -> None:
    stocked.checkpoint()
    stocked.close()
    damage(stocked.path, foreign_connection(stocked.path), table)
    with Records.open(prefix) as broken:
        with pytest.raises(CorruptStoreError, match="check"):
            act(broken)
        findings = broken.check()
        assert "damaged_file" in [finding.code for finding in findings]


def test_findings_are_sentences(stocked: Records) -> None:
    con = foreign_connection(stocked.path)
    con.execute("DELETE FROM vectors WHERE slot IN (3, 4, 5)")
    con.close()
    (finding,) = stocked.check()
    assert finding.code == "missing_vectors"
    assert not finding.fixed
    assert "3 units without a vector" in finding.message
    assert "u2, u3, u4" in finding.message


def test_check_sees_what_another_store_changed(stocked: Records, prefix: Path) -> None:
    assert stocked.check() == []
    with Records.open(prefix, dim=DIM) as other:
        with other.write() as tx:
            tx.clear()
            put(tx, "fresh")
            tx.merge_pending()
        assert stocked.check() == []
        assert stocked.check(fix=True) == []
        assert other.check() == []
