"""Opening: what is ours, what is not, and what may not be written."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from records_kit import DIM, foreign_connection, put, unit
from support import as_child, each, ended, fork

from memevolve_gpu.errors import (
    ConfigurationError,
    DimensionMismatchError,
    NetworkFilesystemError,
    NewerSchemaError,
    NotAStoreError,
    ReadOnlyError,
    StorageError,
)
from memevolve_gpu.records import MODEL_KEY, Records, StoreInfo, file_lock, opening, schema

SOURCE = Path(__file__).resolve().parents[2] / "src"

MANY = 6
"""Processes that create the same store."""


def test_an_existing_store_needs_no_dimension(records: Records, prefix: Path) -> None:
    put(records, "a")
    with Records.open(prefix) as again:
        assert (again.dim, again.metric, again.store_id) == (DIM, "l2", records.store_id)
        assert again.get("a") == unit("a")
    assert len(records.store_id) == 32
    assert records.path == prefix.with_name("memory.db")
    assert not records.read_only


def test_two_stores_have_two_ids(records: Records, tmp_path: Path) -> None:
    with Records.open(tmp_path / "other", dim=DIM) as other:
        assert other.store_id != records.store_id


def test_the_prefix_keeps_its_dots(tmp_path: Path) -> None:
    with Records.open(tmp_path / "memory.v1.2", dim=DIM) as opened:
        assert opened.path.name == "memory.v1.2.db"


def test_a_linked_prefix_is_the_same_store(records: Records, tmp_path: Path) -> None:
    put(records, "a")
    (tmp_path / "link.db").symlink_to(records.path)
    with Records.open(tmp_path / "link") as linked:
        assert linked.path == records.path
        put(linked, "b")
    assert list(records.ids()) == ["a", "b"]


def test_another_folder_later_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Records.open("here", dim=DIM) as opened:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        put(opened, "a")
        assert opened.get("a") == unit("a")
    assert Records.peek(tmp_path / "here") is not None


def test_peek(prefix: Path) -> None:
    assert Records.peek(prefix) is None
    with Records.open(prefix, dim=7, metric="cosine") as opened:
        assert Records.peek(prefix) == StoreInfo(7, "cosine", opened.store_id, None)
        with opened.write() as tx:
            tx.set_meta(MODEL_KEY, "модель-v1".encode())
        assert Records.peek(prefix) == StoreInfo(7, "cosine", opened.store_id, "модель-v1")
    (prefix.parent / "blank.db").touch()
    assert Records.peek(prefix.parent / "blank") is None


def test_another_dimension_is_refused(records: Records, prefix: Path) -> None:
    with pytest.raises(DimensionMismatchError, match=f"expected {DIM}, got 5"):
        Records.open(prefix, dim=5)


def test_another_metric_is_refused_by_both_names(records: Records, prefix: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'cosine'.*'l2'"):
        Records.open(prefix, metric="cosine")
    with Records.open(prefix, metric=None) as again:
        assert again.metric == "l2"


@each(
    ("wrong", "named"),
    [
        ({"dim": 0}, "dim"),
        ({"dim": -3}, "dim"),
        ({"dim": True}, "dim"),
        ({"dim": 3.0}, "dim"),
        ({"dim": 10**6}, "dim"),
        ({"dim": None}, "dim"),
        ({"metric": "hamming"}, "metric"),
        ({"durability": "off"}, "durability"),
        ({"prefix": ""}, "prefix"),
        ({"prefix": "a\x00b"}, "prefix"),
        ({"prefix": b"bytes"}, "prefix"),
    ],
)
def test_settings_that_cannot_be_used_are_named(prefix: Path, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Records.open(**{"prefix": prefix, "dim": DIM, **wrong})
    assert list(prefix.parent.iterdir()) == []


def test_no_store_and_none_wanted(prefix: Path) -> None:
    with pytest.raises(StorageError, match="there is no store"):
        Records.open(prefix, dim=DIM, create=False)
    prefix.with_name("memory.db").touch()
    with pytest.raises(StorageError, match="there is no store"):
        Records.open(prefix, dim=DIM, create=False)


def test_a_missing_folder_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"folder .*missing.* create it"):
        Records.open(tmp_path / "missing" / "memory", dim=DIM)


def test_a_folder_in_the_files_place(prefix: Path) -> None:
    prefix.with_name("memory.db").mkdir()
    with pytest.raises(StorageError):
        Records.open(prefix, dim=DIM)


@pytest.mark.parametrize("content", [b"x", b"not a database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 2000])
def test_a_foreign_file_is_refused_and_untouched(prefix: Path, content: bytes) -> None:
    file = prefix.with_name("memory.db")
    file.write_bytes(content)
    for entry in (lambda: Records.open(prefix, dim=DIM), lambda: Records.peek(prefix)):
        with pytest.raises(StorageError) as caught:
            entry()
        assert isinstance(caught.value, NotAStoreError) or content.startswith(b"SQLite")
    assert file.read_bytes() == content


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_the_database_of_another_program_is_refused_and_untouched(prefix: Path, mode: str) -> None:
    file = prefix.with_name("memory.db")
    foreign = foreign_connection(file)
    foreign.execute(f"PRAGMA journal_mode = {mode}")
    foreign.execute("CREATE TABLE theirs (x); INSERT INTO theirs VALUES (1)")
    foreign.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    foreign.close()
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir() if not path.name.endswith("-shm")}
    for entry in (lambda: Records.open(prefix, dim=DIM), lambda: Records.peek(prefix)):
        with pytest.raises(NotAStoreError, match="another program"):
            entry()
    for name, content in before.items():
        assert (prefix.parent / name).read_bytes() == content


def test_a_newer_schema_is_refused(records: Records, prefix: Path) -> None:
    records.close()
    con = foreign_connection(records.path)
    con.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    con.close()
    for entry in (lambda: Records.open(prefix), lambda: Records.peek(prefix)):
        with pytest.raises(NewerSchemaError, match="upgrade"):
            entry()


def test_an_older_schema_is_lifted_step_by_step(
    records: Records, prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(records, "a")
    records.close()
    steps = ("CREATE TABLE later (x); INSERT INTO later VALUES (1)", "UPDATE later SET x = x + 1")
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, *steps))
    for module in (schema, opening):
        monkeypatch.setattr(module, "VERSION", 1 + len(schema.MIGRATIONS))
    for _ in range(2):
        with Records.open(prefix) as lifted:
            assert lifted.get("a") == unit("a")
    con = foreign_connection(records.path)
    assert con.execute("SELECT x FROM later").fetchall() == [(2,)]
    assert con.execute("PRAGMA user_version").fetchall() == [(schema.VERSION,)]
    con.close()


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    records: Records, prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(records, "a")
    records.close()
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE later (x)", "nonsense"))
    for module in (schema, opening):
        monkeypatch.setattr(module, "VERSION", 1 + len(schema.MIGRATIONS))
    with pytest.raises(StorageError):
        Records.open(prefix)
    monkeypatch.undo()
    with Records.open(prefix) as again:
        assert list(again.ids()) == ["a"]
        assert again.check() == []


def test_a_creation_that_was_cut_short_is_finished(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("power lost")

    monkeypatch.setattr(opening, "create", crash)
    with pytest.raises(RuntimeError, match="power lost"):
        Records.open(prefix, dim=DIM)
    monkeypatch.undo()
    assert prefix.with_name("memory.db").exists()
    with Records.open(prefix, dim=DIM) as opened:
        put(opened, "a")


@pytest.mark.parametrize("attempt", range(4))
def test_many_may_create_the_same_store_at_once(prefix: Path, attempt: int) -> None:
    script = (
        "import sys, time; from memevolve_gpu.records import Records\n"
        "print('ready', flush=True)\n"
        "moment = float(sys.stdin.readline())\n"
        "while time.time() < moment: pass\n"
        f"r = Records.open({str(prefix)!r}, dim={DIM})\n"
        "with r.write() as tx:\n"
        "    uid = tx.next_auto_id(); tx.put({'id': uid}, bytes(16), uid)\n"
        "print(r.store_id); r.close()\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(MANY)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    moment = f"{time.time() + 0.05}\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(moment)
        worker.stdin.flush()
    answers = {worker.communicate()[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0] * MANY
    assert len(answers) == 1
    with Records.open(prefix) as opened:
        assert sorted(opened.ids()) == [f"unit_{i}" for i in range(MANY)]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that users without rights can reach."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


def without_rights(act: Callable[[], object]) -> int:
    """Run ``act`` in a child that may not override permissions; returns its exit status."""

    def child() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        act()

    return as_child(child)


def read_and_fail_to_write(prefix: Path) -> None:
    with Records.open(prefix) as records:
        assert records.read_only
        assert list(records.ids()) == ["a", "b"]
        assert [found for _, found in records.keyword("content", 5)]
        assert len(records.matching({"type": "lesson"})) == 2
        assert records.check() == []
        acts: list[Callable[[], object]] = [
            records.checkpoint,
            lambda: records.purge(1),
            lambda: records.check(fix=True),
            lambda: put(records, "c"),
        ]
        for act in acts:
            with pytest.raises(ReadOnlyError, match="writable"):
                act()


@pytest.mark.parametrize(
    ("what", "state"),
    [("file", "closed"), ("folder", "closed"), ("both", "closed"), ("file", "in use"), ("both", "in use")],
)
def test_a_read_only_store_reads_and_refuses_to_write(open_folder: Path, what: str, state: str) -> None:
    records = Records.open(open_folder / "memory", dim=DIM)
    put(records, "a")
    put(records, "b")
    if state == "closed":
        records.close()
    for path in open_folder.iterdir():
        path.chmod(0o444 if what in ("file", "both") else 0o666)
    open_folder.chmod(0o555 if what in ("folder", "both") else 0o777)
    try:
        status = without_rights(lambda: read_and_fail_to_write(open_folder / "memory"))
    finally:
        open_folder.chmod(0o755)
        records.close()
    assert status == 0


def test_words_that_a_reader_may_not_make_again_are_refused_by_name(open_folder: Path) -> None:
    """The rest of a store whose keyword index is of an older version can be read."""
    with Records.open(open_folder / "memory", dim=DIM) as records:
        put(records, "a")
        with records.write() as tx:
            tx.delete_meta("tokenizer")

    def read() -> None:
        with Records.open(open_folder / "memory") as reading:
            assert list(reading.ids()) == ["a"]
            with pytest.raises(ReadOnlyError, match="open the store once with the right to write"):
                reading.keyword("content", 5)

    for path in open_folder.iterdir():
        path.chmod(0o444)
    open_folder.chmod(0o555)
    try:
        status = without_rights(read)
    finally:
        open_folder.chmod(0o755)
    assert status == 0
    with Records.open(open_folder / "memory") as records:
        assert [found for _, found in records.keyword("content", 5)] == ["a"]


def test_a_reader_who_may_not_write_to_the_folder_sees_later_writers(open_folder: Path) -> None:
    """The reader opens the closed store once and reads after each stage of its owner's."""
    prefix, expected = open_folder / "memory", [["a"], ["a", "b"], ["b"], ["later"], ["later", "last"]]
    with Records.open(prefix, dim=DIM) as records:
        put(records, "a")
    for path in open_folder.iterdir():
        path.chmod(0o644)
    to_reader, to_owner = os.pipe(), os.pipe()

    def read() -> None:
        with Records.open(prefix) as reading:
            assert reading.read_only
            for ids in expected:
                assert os.read(to_reader[0], 1) == b"x"
                for _ in range(3):
                    assert list(reading.ids()) == ids
                    assert sorted(name for _, name in reading.keyword("content", 5)) == sorted(ids)
                assert reading.check() == []
                os.write(to_owner[1], b"x")

    def read_without_rights() -> None:
        assert without_rights(read) == 0

    pid = fork(read_without_rights)

    def stage_is_read() -> None:
        os.write(to_reader[1], b"x")
        ready, _, _ = select.select([to_owner[0]], [], [], 30)
        assert ready, "the reader failed"
        os.read(to_owner[0], 1)

    stage_is_read()
    with Records.open(prefix) as records:
        put(records, "b")
        stage_is_read()
        with records.write() as tx:
            tx.drop("a")
    stage_is_read()
    with Records.open(prefix) as records, records.write() as tx:
        tx.clear()
        put(tx, "later")
    stage_is_read()

    def kill() -> None:
        put(Records.open(prefix), "last")
        os.kill(os.getpid(), signal.SIGKILL)

    assert as_child(kill) == -signal.SIGKILL
    stage_is_read()
    assert ended(pid) == 0


def test_a_log_that_a_reader_cannot_read_is_refused_with_the_remedy(open_folder: Path) -> None:
    def read() -> None:
        with pytest.raises(ReadOnlyError, match=r"newest writes are in memory.db-wal.*right to write to the folder"):
            Records.open(open_folder / "memory")

    with Records.open(open_folder / "memory", dim=DIM) as records:
        put(records, "a")
        for path in open_folder.iterdir():
            path.chmod(0o644)
        (open_folder / "memory.db-shm").chmod(0o600)
        assert without_rights(read) == 0


def test_a_store_cannot_be_created_in_a_read_only_folder(open_folder: Path) -> None:
    def create() -> None:
        with pytest.raises(ReadOnlyError, match="writable"):
            Records.open(open_folder / "memory", dim=DIM)

    open_folder.chmod(0o555)
    assert without_rights(create) == 0
    assert list(open_folder.iterdir()) == []


@pytest.mark.parametrize("name", ["", "sub/", ".", "sub/.."])
def test_a_prefix_that_names_a_folder_makes_no_hidden_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigurationError, match=r"names a folder; add a name for the store, as in '.*memory'"):
        Records.open(f"{tmp_path}/{name}", dim=DIM)
    assert [one.name for one in tmp_path.rglob("*")] == ["sub"]


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /home/me rw - nfs4 server:/home rw
24 22 0:22 / /home/me/local rw - xfs /dev/vdb rw
25 22 0:23 / /mnt/with\\040space rw - fuse.sshfs me@there:/ rw
26 22 0:24 / /mnt/c rw - 9p drvfs rw
27 22 0:25 / /twice rw - ext4 /dev/vdc rw
28 22 0:26 / /twice rw - cifs //server/share rw
nonsense
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/", "ext4"),
        ("/tmp/deep/down", "ext4"),
        ("/home/me", "nfs4"),
        ("/home/me/x", "nfs4"),
        ("/home/meadow", "ext4"),
        ("/home/me/local/x", "xfs"),
        ("/mnt/with space/x", "fuse.sshfs"),
        ("/mnt/c/Users", "9p"),
        ("/twice/x", "cifs"),
    ],
)
def test_the_file_system_of_a_folder(tmp_path: Path, folder: str, kind: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_lock.filesystem_of(Path(folder), mounts) == kind
    if kind in ("ext4", "xfs"):
        file_lock.refuse_network_filesystem(Path(folder), mounts)
    else:
        with pytest.raises(NetworkFilesystemError, match=rf"{kind}.*local disk"):
            file_lock.refuse_network_filesystem(Path(folder), mounts)


def test_a_sandbox_whose_root_is_9p_is_local(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text("1 1 0:1 / / rw - 9p none rw\n2 1 0:2 / /tmp rw - 9p none rw\n")
    file_lock.refuse_network_filesystem(Path("/tmp/x"), mounts)


def test_without_a_mount_table_nothing_is_refused(tmp_path: Path) -> None:
    file_lock.refuse_network_filesystem(Path("/home"), tmp_path / "absent")


def test_opening_asks_which_file_system_it_is(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "filesystem_of", lambda *_: "lustre")
    with pytest.raises(NetworkFilesystemError, match="lustre"):
        Records.open(prefix, dim=DIM)
    prefix.with_name("memory.db").touch()
    with pytest.raises(NetworkFilesystemError, match="lustre"):
        Records.peek(prefix)
