"""History, undo and the feed of changes: a store against a list of plain dicts, one for each change number."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import apsw
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import SEED, FakeEmbedder, as_child, ended, fork

from memevolve_gpu import ConflictError, CorruptStoreError, HistoryError, InvalidQueryError, StorageConfig, VectorStore
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.records.records import Records

DIM = 16
DAY = 86_400.0
State = dict[str, dict[str, Any]]


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def store_at(folder: Path, clock: Clock | None = None, **values: Any) -> VectorStore:
    config = StorageConfig(**{"background": False, "min_training_units": 64, **values})
    return VectorStore(folder / "store", FakeEmbedder(DIM), DIM, storage_config=config, clock=clock)


def state_of(store: VectorStore, as_of: Any = None) -> State:
    return {unit["id"]: unit for unit in store.units(as_of=as_of)}


IDS = st.sampled_from([f"id-{number}" for number in range(6)])
WORDS = st.sampled_from(["grün", "blau", "rot", "記憶"])


class HistoryMachine(RuleBasedStateMachine):
    """``states[n]`` is what the store held after change n was committed; ``made`` is
    (operation, ids, state before, state after).
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.store = store_at(self.folder, self.clock)
        self.view = self.store
        self.path: tuple[str, ...] = ()
        self.states: dict[int, tuple[float, State]] = {}
        self.made: list[tuple[int, set[str], State, State]] = []
        self.floor = 0

    @initialize(path=st.sampled_from([(), ("org", "alice")]))
    def choose(self, path: tuple[str, ...]) -> None:
        self.path = path
        self.view = self.store.namespace(*path) if path else self.store
        self.store.namespace("other").store({"id": "id-1", "content": "of another namespace"})
        self.states[self.store.change_number] = (self.clock.now, {})

    def noted(self, before: State, first: int) -> None:
        after = state_of(self.view)
        last = self.store.change_number
        if last >= first:
            touched = {one for one in {*before, *after} if before.get(one) != after.get(one)}
            self.made.append((first, touched, before, after))
            self.states[last] = (self.clock.now, after)

    def act(self, call: Any) -> None:
        self.clock.now += 60.0
        before, first = state_of(self.view), self.store.change_number + 1
        call()
        self.noted(before, first)

    @rule(unit_id=IDS, word=WORDS, number=st.integers(0, 10**9))
    def store_one(self, unit_id: str, word: str, number: int) -> None:
        self.act(lambda: self.view.store({"id": unit_id, "content": word, "metadata": {"n": number}}))

    @rule(ids=st.lists(IDS, unique=True, max_size=4), word=WORDS, number=st.integers(0, 10**9))
    def store_many(self, ids: list[str], word: str, number: int) -> None:
        units = [{"id": one, "content": f"{word} {one}", "metadata": {"n": number}} for one in ids]
        self.act(lambda: self.view.store_batch(units))

    @rule(unit_id=IDS, word=WORDS, number=st.integers(0, 10**9))
    def update(self, unit_id: str, word: str, number: int) -> None:
        self.act(lambda: self.view.update(unit_id, {"content": word, "metadata": {"n": number}}))

    @rule(ids=st.lists(IDS, unique=True, max_size=4))
    def delete(self, ids: list[str]) -> None:
        self.act(lambda: self.view.delete_batch(ids))

    @rule()
    def clear(self) -> None:
        self.act(self.view.clear)

    @rule(count=st.integers(0, 4))
    def prune(self, count: int) -> None:
        self.act(lambda: SimpleManagementStrategy().prune(self.view, {"max_count": count}))

    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        known = [one for one in self.made if one[0] > self.floor]
        if not known:
            return
        operation, touched, before, after = data.draw(st.sampled_from(known))
        state, number = state_of(self.view), self.store.change_number
        changed = {one for one in touched if state.get(one) != after.get(one)}
        if changed:
            with pytest.raises(ConflictError) as caught:
                self.view.undo(operation)
            assert set(caught.value.ids) == changed
            assert (state_of(self.view), self.store.change_number) == (state, number)
            return
        self.act(lambda: self.view.undo(operation))
        now = state_of(self.view)
        assert {one: now.get(one) for one in touched} == {one: before.get(one) for one in touched}

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = store_at(self.folder, self.clock)
        self.view = self.store.namespace(*self.path) if self.path else self.store

    @rule()
    def maintain(self) -> None:
        self.store.run_maintenance()

    @rule()
    def forget(self) -> None:
        """Everything up to now is beyond the retention."""
        self.clock.now += 8 * DAY
        self.store.run_maintenance()
        self.floor = self.store.change_number

    @invariant()
    def answers_as_of_then(self) -> None:
        for number, (at, state) in self.states.items():
            if number >= self.floor:
                assert state_of(self.view, number) == state
                if at >= self.clock.now - 7 * DAY:
                    assert state_of(self.view, at) == state
                for unit_id in ("id-0", "id-1"):
                    assert self.view.retrieve(unit_id, as_of=number) == state.get(unit_id)
            else:
                with pytest.raises(HistoryError, match="outside the history"):
                    self.view.retrieve("id-0", as_of=number)

    @invariant()
    def feed_leads_to_the_state(self) -> None:
        start = max([self.floor, *(number for number in self.states if number <= self.floor)], default=0)
        state = dict(self.states.get(start, (0.0, {}))[1])
        if start not in self.states:
            return
        for change in self.view.changes(start):
            assert change.namespace == self.path
            if change.unit is None:
                del state[change.id]
            else:
                state[change.id] = change.unit
        assert state == state_of(self.view)

    def teardown(self) -> None:
        assert self.store.check() == []
        self.store.close()
        shutil.rmtree(self.folder)


TestHistory = HistoryMachine.TestCase
TestHistory.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def test_every_version_says_when_and_which_operation(tmp_path: Path) -> None:
    clock = Clock()
    with store_at(tmp_path, clock) as store:
        store.store({"id": "a", "content": "one"})
        clock.now += 5
        store.update("a", {"content": "two"})
        store.update("a", {"content": "two", "metadata": {"x": 1}})
        SimpleManagementStrategy().prune(store, {"max_count": 0})
        found = [(one.change, one.kind, one.at, one.unit and one.unit["content"]) for one in store.history("a")]
        assert found == [
            ("put", "store", clock.now - 5, "one"),
            ("put", "update", clock.now, "two"),
            ("edit", "update", clock.now, "two"),
            ("delete", "prune", clock.now, None),
        ]
        assert store.history("never") == []
        assert [one.kind for one in store.operations()] == ["prune", "update", "update", "store"]
        assert [one.kind for one in store.operations(1, before=store.operations()[0].id)] == ["update"]


@pytest.mark.parametrize("operation", ["prune", "consolidate", "deduplicate", "forget"])
def test_a_management_operation_is_one_operation_and_undo_restores_units_and_vectors(
    tmp_path: Path, operation: str
) -> None:
    strategy = SimpleManagementStrategy()
    runs: dict[str, Callable[[VectorStore], Any]] = {
        "prune": lambda store: strategy.prune(store, {"max_count": 3}),
        "consolidate": lambda store: strategy.consolidate(store, by="type"),
        "deduplicate": lambda store: strategy.deduplicate(store, 0.99),
        "forget": lambda store: strategy.apply_forgetting(store, "lru", 4),
    }
    run = runs[operation]
    with store_at(tmp_path) as store:
        store.store_batch([{"id": f"u{i}", "type": "tool", "content": f"word{i // 2}"} for i in range(10)])
        before, vectors = state_of(store), store.vectors_of([f"u{i}" for i in range(10)])
        run(store)
        assert state_of(store) != before
        newest = store.operations()[0]
        assert newest.kind == operation
        embedder: Any = store.embedding_function
        calls = embedder.calls
        done = store.undo(newest.id)
        assert (state_of(store), done.kind) == (before, "undo")
        assert embedder.calls == calls, "nothing is embedded again"
        again = store.vectors_of(list(vectors))
        assert all((again[one] == vectors[one]).all() for one in vectors)
        assert {hit.id for hit in store.search_units("word1", 2)} == {"u2", "u3"}
        store.undo(done.id)
        assert state_of(store) != before
        assert store.check() == []


def test_deleted_namespace_and_expiry_are_undone(tmp_path: Path) -> None:
    clock = Clock()
    with store_at(tmp_path, clock) as store:
        alice = store.namespace("alice")
        alice.store_batch([{"id": "a", "content": "one"}, {"id": "b", "content": "two"}], ttl=100.0)
        before, until = state_of(alice), alice.expiry("a")
        alice.set_expiry(["a"])
        with pytest.raises(HistoryError, match="another namespace"):
            store.undo(alice.operations()[0].id)
        alice.undo(alice.operations()[0].id)
        assert alice.expiry("a") == until
        store.delete_namespace("alice")
        assert store.namespaces() == []
        alice.undo(alice.operations()[0].id)
        assert (state_of(alice), alice.expiry("b")) == (before, until)
        number = store.change_number
        clock.now += 200
        assert state_of(alice) == {}
        store.run_maintenance()
        assert state_of(alice, number) == before
        assert [change.operation for change in store.changes(number, prefix=())] == ["delete", "delete"]


def test_history_off_keeps_nothing_and_says_so(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store({"id": "a", "content": "one"})
        number = store.change_number
    with store_at(tmp_path, history_days=0) as store:
        store.update("a", {"content": "two"})
        store.run_maintenance()
        with pytest.raises(HistoryError, match="outside the history"):
            store.retrieve("a", as_of=number)
        with pytest.raises(HistoryError, match="older than the changes"):
            list(store.changes(number))
        assert store.operations() == []
    with store_at(tmp_path) as store:
        middle = store.change_number
        store.update("a", {"content": "three"})
        assert store.retrieve("a", as_of=middle)["content"] == "two"  # type: ignore[index]


def test_arguments_that_mean_nothing(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store({"id": "a", "content": "one"})
        with pytest.raises(InvalidQueryError, match="zone"):
            store.retrieve("a", as_of=datetime(2026, 1, 1))  # noqa: DTZ001 - what is refused
        with pytest.raises(HistoryError, match="outside the history"):
            store.retrieve("a", as_of=99)
        with pytest.raises(HistoryError, match="beyond the newest"):
            list(store.changes(99))
        with pytest.raises(HistoryError, match="none of that number"):
            store.undo(77)
        assert store.retrieve("a", as_of=datetime.now(timezone.utc)) == store.retrieve("a")


def test_retention_is_purged_in_bounded_steps(tmp_path: Path) -> None:
    clock = Clock()
    with store_at(tmp_path, clock) as store, patch("memevolve_gpu.records.records.PURGED_AT_ONCE", 10):
        store.store_batch([{"id": f"u{i}", "content": f"word{i}"} for i in range(35)])
        clock.now += 8 * DAY
        store.store({"id": "new", "content": "new"})
        assert store._open.records.purge_history(steps=1) == 10
        with pytest.raises(HistoryError, match="none of that number"):
            store.undo(1)
        assert len(list(store.changes(10))) == 26
        store.run_maintenance()
        assert [one.kind for one in store.operations()] == ["store"]
        assert [change.id for change in store.changes(35)] == ["new"]


def kept_vectors(folder: Path) -> int:
    with closing(apsw.Connection(str(folder / "store.db"), flags=apsw.SQLITE_OPEN_READONLY)) as con:
        return len(con.execute("SELECT slot FROM vectors").fetchall())


@pytest.mark.parametrize("end", ["retention", "erasure", "cleared", "off"])
def test_the_vector_of_an_old_version_is_kept_once_and_goes_with_the_version(tmp_path: Path, end: str) -> None:
    clock = Clock()
    with store_at(tmp_path, clock) as store:
        store.store_batch([{"id": f"u{i}", "content": f"word{i}"} for i in range(10)])
        store.delete_batch(["u0", "u1", "u2"])
        store.update("u3", {"content": "other words"})
        store.update("u4", {"content": "word4", "metadata": {"edited": True}})
        assert (kept_vectors(tmp_path), store.check()) == (11, [])
        if end == "retention":
            clock.now += 40 * DAY
            store.store({"id": "new", "content": "new"})
            store.run_maintenance()
        elif end == "erasure":
            store.forget_subject({"content": {"startswith": "word"}})
        elif end == "cleared":
            store.clear()
            assert (kept_vectors(tmp_path), store.check()) == (11, [])
            before = store.operations()[0]
            store.undo(before.id)
            assert store.count() == 7
            clock.now += 40 * DAY
            store.store({"id": "new", "content": "new"})
            store.run_maintenance()
    if end == "off":
        clock.now += 1
        with store_at(tmp_path, clock, history_days=0) as store:
            store.delete("u5")
            store.run_maintenance()
    with store_at(tmp_path, clock) as store:
        assert (kept_vectors(tmp_path), store.check()) == (store.count(), [])


def test_undo_refuses_a_version_whose_vector_is_gone(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store({"id": "a", "content": "one"})
        store.delete("a")
        deletion = store.operations()[0].id
    with closing(apsw.Connection(str(tmp_path / "store.db"))) as con:
        con.execute("DELETE FROM vectors")
    with store_at(tmp_path) as store, pytest.raises(CorruptStoreError, match="vector of 'a'"):
        store.undo(deletion)


def test_a_single_write_changes_few_pages(tmp_path: Path) -> None:
    vectors = np.random.default_rng(SEED).standard_normal((400, 384)).astype(np.float32)
    written = {}
    config = StorageConfig(background=False)
    with VectorStore(tmp_path / "store", FakeEmbedder(384), 384, storage_config=config) as store:
        store.store_batch([{"id": f"u{i}", "content": f"word{i} " * 20} for i in range(400)], vectors)
        log = tmp_path / "store.db-wal"
        frame = 24 + int.from_bytes((tmp_path / "store.db").read_bytes()[16:18], "big")
        for name, change in (
            ("store", lambda i: store.store({"id": f"new{i}", "content": f"word{i} " * 20})),
            ("edit", lambda i: store.update(f"u{i}", {"content": f"word{i} " * 20, "metadata": {"edited": True}})),
            ("delete", lambda i: store.delete(f"u{i}")),
        ):
            store._open.records._session.empty_log()
            for i in range(100):
                change(i)
            written[name] = log.stat().st_size / frame / 100
    print(written)
    assert written["store"] < 7.5, "pages of the log"
    assert written["edit"] < 5.5
    assert written["delete"] < 8


def test_another_process_is_followed_and_reading_resumes(tmp_path: Path) -> None:
    def write() -> None:
        with store_at(tmp_path) as other:
            for number in range(20):
                other.store({"id": f"u{number}", "content": f"word{number}"})

    with store_at(tmp_path) as store:
        store.store({"id": "first", "content": "first"})
        start = store.change_number
        child = fork(write)
        seen = []
        for change in store.watch(start, timeout=20.0):
            seen.append(change)
            if len(seen) == 20:
                break
        assert ended(child) == 0
        assert [change.id for change in seen] == [f"u{number}" for number in range(20)]
        assert [change.seq for change in seen] == sorted(change.seq for change in seen)
        rest = list(store.changes(seen[4].seq, limit=3))
        assert rest == seen[5:8]
        assert list(store.watch(timeout=0.0)) == []


@pytest.mark.parametrize("steps", range(1, 14, 3))
def test_undo_killed_at_a_step_is_done_or_not_begun(tmp_path: Path, steps: int) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([{"id": f"u{i}", "content": f"word{i}"} for i in range(6)])
        before = state_of(store)
        store.delete_batch([f"u{i}" for i in range(5)])
        after, operation = state_of(store), store.operations()[0].id

    def act() -> None:
        from memevolve_gpu.records.transaction import Transaction

        real, left = Transaction._run, [steps]

        def run(self: Transaction, sql: str, parameters: Any) -> Any:
            if sql.lstrip().startswith(("INSERT", "UPDATE", "DELETE")):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(self, sql, parameters)

        with store_at(tmp_path) as store, patch.object(Transaction, "_run", run):
            store.undo(operation)

    as_child(act)
    with store_at(tmp_path) as store:
        assert state_of(store) in (before, after)
        assert store.check() == []
        if state_of(store) == after:
            store.undo(operation)
        assert state_of(store) == before


def test_records_without_history_keep_one_log_entry_for_clear(tmp_path: Path) -> None:
    with Records.open(tmp_path / "plain", dim=DIM) as records:
        with records.write() as tx:
            tx.put({"content": "x"}, bytes(4 * DIM), "a")
            tx.put({"content": "y"}, bytes(4 * DIM), "b")
        with records.write() as tx:
            tx.clear()
        assert records.head().last_seq == 3
    print(f"seed {SEED}")


DAMAGE = {
    "UPDATE changes SET unit = '{broken' WHERE id = 'a' AND unit IS NOT NULL": "damaged_versions",
    "UPDATE changes SET unit = json_set(unit, '$.id', 'b') WHERE id = 'a' AND unit IS NOT NULL": "damaged_versions",
    "UPDATE changes SET unit = replace(unit, 'one', 'two') WHERE id = 'a'": "damaged_versions",
    "UPDATE vectors SET vector = zeroblob(64) WHERE slot NOT IN (SELECT slot FROM units)": "damaged_versions",
    "UPDATE vectors SET vector = x'00' WHERE slot NOT IN (SELECT slot FROM units)": "damaged_versions",
    "UPDATE changes SET unit = NULL WHERE id = 'a' AND unit IS NOT NULL": "damaged_versions",
    "DELETE FROM changes WHERE seq = (SELECT max(seq) FROM changes)": "history",
    "DELETE FROM changes WHERE seq = 3": "history",
    "INSERT INTO changes (seq, op, slot, ns, id) VALUES (99, 1, 9, 0, 'ghost')": "log",
    "UPDATE changes SET op = 1 WHERE seq = (SELECT max(seq) FROM changes)": "history",
    "UPDATE changes SET slot = 99 WHERE seq = (SELECT max(seq) FROM changes)": "log",
    "UPDATE changes SET ns = 7 WHERE seq = 1": "history",
    "UPDATE changes SET operation = NULL": "history",
    "UPDATE changes SET operation = NULL WHERE seq = 1": "history",
    "UPDATE changes SET operation = 2 WHERE seq = 5": "history",
    "UPDATE changes SET kind = NULL WHERE seq = 1": "history",
    "UPDATE changes SET at = 0 WHERE seq > 2": "history",
    "UPDATE history_floor SET seq = 99": "history",
    "DELETE FROM history_floor": "history",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_names_what_is_damaged_in_the_history(tmp_path: Path, damage: str) -> None:
    with store_at(tmp_path) as store:
        for word in ("one", "two"):
            store.store_batch([{"id": name, "content": f"{word} {name}"} for name in ("a", "b")])
        store.update("a", {"content": "two a", "metadata": {"edited": True}})
        store.delete("b")
        before = state_of(store)
        assert store.check() == []
    con = apsw.Connection(str(tmp_path / "store.db"))
    con.execute(damage)
    con.close()
    with store_at(tmp_path) as store:
        found = {finding.code: finding.message for finding in store.check()}
        assert DAMAGE[damage] in found
        if DAMAGE[damage] == "damaged_versions":
            assert list(found) == ["damaged_versions"]
            assert "a (change 3)" in found["damaged_versions"]
        assert all(finding.fixed for finding in store.check(fix=True))
        assert store.check() == []
        assert state_of(store) == before
        assert list(store.changes(store.change_number)) == []
        with pytest.raises(HistoryError):
            list(store.changes(4))
        kept = [one.change for one in store.history("a")]
        assert "erased" in kept if DAMAGE[damage] == "damaged_versions" else kept == ["put"]
        store.store({"id": "c", "content": "new"})
        store.undo(store.operations()[0].id)
        assert store.check() == []


def test_a_version_that_cannot_be_read_is_erased_with_its_subject(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store({"id": "a", "content": "one"})
        store.store({"id": "a", "content": "two"})
        con = apsw.Connection(str(tmp_path / "store.db"))
        con.execute("UPDATE changes SET unit = '{broken' WHERE unit IS NOT NULL")
        con.close()
        assert store.forget_subject({"id": "a"}).units == 1
        assert store.check() == []


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if "'one', 'two'" in damage or "zeroblob" in damage])
def test_undo_brings_back_no_version_that_changed_by_itself(tmp_path: Path, damage: str) -> None:
    """It would get the checksum of the damage, and no check would ever find it again."""
    with store_at(tmp_path) as store:
        for word in ("one", "two"):
            store.store({"id": "a", "content": f"{word} a"})
        before = state_of(store)
    con = apsw.Connection(str(tmp_path / "store.db"))
    con.execute(damage)
    con.close()
    with store_at(tmp_path) as store:
        with pytest.raises(CorruptStoreError, match=r"'a' from before change 2 .*check\(fix=True\)"):
            store.undo(store.operations()[0].id)
        assert state_of(store) == before
        assert [finding.code for finding in store.check()] == ["damaged_versions"]


def test_a_deleted_namespace_is_forgotten_with_the_history_of_its_deletion(tmp_path: Path) -> None:
    clock = Clock()
    with store_at(tmp_path, clock) as store:
        for number in range(3):
            store.namespace("gone", str(number)).store({"content": "one"})
            store.delete_namespace("gone", str(number))
        for name in ("empty", "used"):
            store.namespace(name).store({"content": "one"})
            store.delete_namespace(name)
            store.namespace(name).store({"content": "two"})
        store.namespace("empty").clear()
        store.namespace("cleared").store({"content": "one"})
        store.namespace("cleared").clear()
        assert store.delete_namespace("cleared") == 0
        assert store.check() == []
        clock.now += 6 * DAY
        store.namespace("gone", "2").store({"content": "later"})
        store.delete_namespace("gone", "2")
        clock.now += 3 * DAY
        store.run_maintenance()
        assert store.check() == []
        with apsw.Connection(str(tmp_path / "store.db")) as con:
            paths = con.execute("SELECT path FROM namespaces ORDER BY path").fetchall()
        assert paths == [('["empty"]',), ('["gone", "2"]',), ('["used"]',)]
        assert store.namespace("empty").store({"content": "three"}) == "unit_2"
        store.namespace("gone", "2").undo(store.namespace("gone", "2").operations()[0].id)
        assert store.namespace("gone", "2").count() == 1
        assert store.namespace("gone", "0").store({"content": "again"}) == "unit_0"
        assert store.check() == []


def test_without_a_retention_no_clock_keeps_the_history(tmp_path: Path) -> None:
    clock = Clock()
    with store_at(tmp_path, clock) as store:
        store.store({"id": "a", "content": "one"})
        store.store({"id": "a", "content": "two"})
    clock.now -= 30 * DAY
    with store_at(tmp_path, clock, history_days=0) as store:
        store.run_maintenance()
        assert store.check() == []
    with apsw.Connection(str(tmp_path / "store.db")) as con:
        assert con.execute("SELECT (SELECT count(unit) FROM changes), (SELECT count(*) FROM vectors)").fetchall() == [
            (0, 1)
        ]


def test_an_operation_can_be_undone_after_the_later_ones_were(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([{"id": "a", "content": "rot"}, {"id": "b", "content": "blau"}])
        batch = store.operations(1)[0].id
        store.update("a", {"content": "gelb"})
        store.set_expiry(["b"], ttl=1000)
        later = [one.id for one in store.operations(2)]
        for number in later:
            with pytest.raises(ConflictError, match="undo those changes first"):
                store.undo(batch)
            store.undo(number)
        first = store.undo(batch).id
        assert store.count() == 0
        store.undo(first)
        assert store.search("gelb", 2) == store.search("gelb", 2, {"id": ["a", "b"]})
        store.store_batch([{"id": "a", "content": "rot"}], embeddings=np.ones((1, DIM), np.float32))
        with pytest.raises(ConflictError) as caught:  # the text is the same, its vector is not
            store.undo(batch)
        assert caught.value.ids == ["a"]
