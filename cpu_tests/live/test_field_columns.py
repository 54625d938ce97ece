"""Columns of fields: filters follow every kind of change, and stay exact when they cannot be kept."""

from __future__ import annotations

import json
import time
import zlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
from filter_oracle import means
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import HANGS

from memevolve_gpu import VectorStore
from memevolve_gpu.live import column_file, field_columns, foresight
from memevolve_gpu.records.records import Records
from memevolve_gpu.records.schema import FIELDS_KEY
from memevolve_gpu.utils.drafts import draft_of

DIM = 4
VALUES = st.one_of(
    st.integers(-2, 2),
    st.sampled_from([0.5, True, None, "x", "y", "2026-01-01T00:00:00Z", [1, "x"], [], {"a": 1}, 2**60]),
)
FILTERS: list[Any] = [
    {"n": {"gte": 1}},
    {"n": 2**60},
    {"n": {"not": {"in": ["x", None, 0.5]}}},
    {"n": {"contains": "x"}},
    {"n": {"lt": "2026-06-01T00:00:00Z"}},
    {"or": [{"n": {"size": 0}}, {"m": {"exists": True}, "n": {"is_null": True}}]},
    {"id": ["u1", "u3"], "m": {"ne": 1}},
    {"n.a": 1},
    {"long": {"startswith": "q"}, "n": {"ne": 1}},
]


class Changes(RuleBasedStateMachine):
    """A store and a dictionary, changed and asked in the same way."""

    folder: Path
    number = 0

    @initialize()
    def make(self) -> None:
        Changes.number += 1
        self.open()
        self.model: dict[str, dict[str, Any]] = {}

    def open(self) -> None:
        self.store = VectorStore(
            self.folder / f"s{Changes.number}", None, DIM, storage_config={"background": False, "index_type": "flat"}
        )

    @rule(snapshot=st.booleans())
    def reopen(self, snapshot: bool) -> None:
        """The columns are in their file, and followed from there."""
        if snapshot:
            self.store._open.maintenance.snapshot()
        self.store.close()
        self.open()

    @rule()
    def save(self) -> None:
        self.store._open.live.save_fields(1.0)

    @rule(which=st.integers(0, 7), n=VALUES, m=st.none() | VALUES)
    def store_one(self, which: int, n: Any, m: Any) -> None:
        unit = {"id": f"u{which}", "content": "c", "n": n, "long": "q" * 400 * (which % 2)}
        unit |= {} if m is None else {"m": m}
        self.store.store_batch([unit], np.ones((1, DIM), dtype=np.float32))
        self.model[unit["id"]] = unit

    @rule(which=st.integers(0, 7), n=VALUES, how=st.sampled_from(["store", "edit", "delete"]), late=st.booleans())
    def foresee(self, which: int, n: Any, how: str, late: bool) -> None:
        """Fields are read in the background; a unit changes just before or after the values were read."""
        records, done = self.store._open.records, list[bool]()
        read = records.field_values

        def change() -> None:
            if done:
                return
            done.append(True)
            if how == "store":
                self.store_one(which, n, n)
            elif how == "edit":
                self.edit(which, n)
            else:
                self.store.delete(f"u{which}")
                self.model.pop(f"u{which}", None)

        def meddling(*given: Any, **named: Any) -> Any:
            if not late:
                change()
            found = read(*given, **named)
            change()
            return found

        columns = self.store._open.live._masks.columns
        columns.clear()
        self.store._open.live._masks._entries.clear()
        columns.wants_foresight = True
        with patch.object(records, "field_values", meddling):
            self.store._open.live.foresee({})

    @rule(which=st.integers(0, 7), n=VALUES)
    def edit(self, which: int, n: Any) -> None:
        unit = {"id": f"u{which}", "content": "c", "n": n}
        if self.store.update(unit["id"], unit):
            self.model[unit["id"]] = unit

    @rule(which=st.integers(0, 7))
    def delete(self, which: int) -> None:
        assert self.store.delete(f"u{which}") is (self.model.pop(f"u{which}", None) is not None)

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.model.clear()

    @rule()
    def forget_masks(self) -> None:
        self.store._open.live._masks._entries.clear()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        for filters in FILTERS:
            _, ids = self.store.search_vectors(np.ones((1, DIM), dtype=np.float32), 20, filters)
            expected = {unit_id for unit_id, unit in self.model.items() if means(filters, unit)}
            assert {unit_id for unit_id in ids[0] if unit_id is not None} == expected, filters

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


@pytest.mark.parametrize("kept", [0, 3, 2_000])
def test_filters_follow_every_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(field_columns, "_FRESH_ROWS", kept)
    monkeypatch.setattr(field_columns, "SAVED_FROM", 1 if kept else 2_000)
    monkeypatch.setattr(Changes, "folder", tmp_path, raising=False)
    machine = Changes.TestCase
    machine.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
    machine().runTest()


def test_declared_fields_have_an_index_and_are_read_by_the_background(tmp_path: Path) -> None:
    units = [{"content": "c", "metadata": {"score": n / 10, "at": "2026-01-01T00:00:00Z"}} for n in range(20)]
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": False}) as store:
        store.store_batch(units, np.ones((20, DIM), dtype=np.float32))
    settings = {"indexed_fields": "metadata.score:number,metadata.at:time", "background": False}

    def indexes(store: VectorStore) -> list[str]:
        con = store._open.records._pool.take()
        names = con.execute("SELECT name FROM sqlite_schema WHERE name LIKE 'field:%' ORDER BY name").fetchall()
        plan = con.execute('EXPLAIN QUERY PLAN SELECT slot, unit -> \'$."metadata"."score"\' FROM units').fetchall()
        store._open.records._pool.give(con)
        assert ("COVERING INDEX" in str(plan)) is bool(names)
        return [str(name) for (name,) in names]

    both = ['field:$."metadata"."at"', 'field:$."metadata"."score"']
    with VectorStore(tmp_path / "m", None, DIM, storage_config=settings) as store:
        assert indexes(store) == both
        assert len(store.search_vectors(np.ones((1, DIM)), 30, {"metadata.score": {"lt": 0.55}})[1][0]) == 30
        store._open._background_round()
        assert store._open.live._masks.columns.holds([("metadata", "score"), ("metadata", "at")])
        assert store.check() == []
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": False}) as store:
        assert indexes(store) == both
    with VectorStore(tmp_path / "m", None, DIM, storage_config={**settings, "indexed_fields": "none"}) as store:
        assert indexes(store) == []


def test_the_background_reads_the_usual_fields_once_filters_are_in_use(tmp_path: Path) -> None:
    units = [
        {
            "content": "c" * 300,
            "type": "skill",
            "tags": ["a", "b"],
            "metadata": {"n": n, "long": "q" * 300, "deep": {"x": n}},
        }
        for n in range(500)
    ]
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": True}) as store:
        store.store_batch(units, np.ones((500, DIM), dtype=np.float32))
        live, query = store._open.live, np.ones((1, DIM), dtype=np.float32)
        columns = live.columns
        store.search_vectors(query, 3)
        assert not live.columns.wants_foresight
        assert not columns.holds([("type",)])
        store.search_vectors(query, 3, {"type": "skill"})
        until = time.monotonic() + HANGS
        while not columns.holds([("tags",), ("metadata", "n"), ("metadata", "deep", "x"), ("metadata", "created_at")]):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert columns._columns.get(("metadata", "long")) is None
        with patch.object(store._open.records, "field_values", None):  # nothing is read
            assert store.count({"metadata.n": {"lt": 7}, "tags": "b", "metadata.deep.x": {"gte": 2}}) == 5


def test_columns_stay_within_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_columns, "LEAST_BYTES", 30_000)
    units = [{"content": "c", **{f"f{field}": f"{field} {n}" for field in range(20)}} for n in range(300)]
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": False}) as store:
        store.store_batch(units, np.ones((300, DIM), dtype=np.float32))
        for field in range(20):
            found = store.search_vectors(np.ones((1, DIM)), 30, {f"f{field}": [f"{field} 7", f"{field} 8"]})[1][0]
            assert sum(one is not None for one in found) == 2
            assert store._open.live._masks.columns.nbytes <= 30_000 + 300 * 100


def test_a_unit_that_is_stored_while_fields_are_read_ahead_is_not_of_their_rows_yet(tmp_path: Path) -> None:
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": False}) as store:
        units = [{"id": str(n), "content": "c", "n": n} for n in range(50)]
        store.store_batch(units, np.ones((50, DIM), dtype=np.float32))
        live, more = store._open.live, iter(range(50, 100))

        def log() -> field_columns.Log:
            made = live._log(live.catch_up())

            def changed(seq: int) -> Any:  # another thread stores a unit, and publishes a view with it
                store.store_batch([{"id": str(next(more)), "content": "c", "n": 7}], np.ones((1, DIM), np.float32))
                live.catch_up()
                return made.changed(seq)

            return made._replace(changed=changed)

        live._masks.foresight.read(log, {("n",): False})
        assert live.columns.holds([("n",)])
        assert store.count({"n": 7}) == 1 + store.count() - 50


def wait_until_held(store: VectorStore, *fields: tuple[str, ...]) -> None:
    until = time.monotonic() + HANGS
    while not store._open.live._masks.columns.holds(fields):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_fields_of_past_filters_are_read_before_the_first_filter_after_an_opening(tmp_path: Path) -> None:
    """Rare fields, which are not among those that the newest units have."""
    units = [
        {"id": str(n), "content": "c", "when": "2026-01-01T00:00:00Z", **({"rare": {"deep": n}} if n < 50 else {})}
        for n in range(500)
    ]
    query = np.ones((1, DIM), dtype=np.float32)
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": False}) as store:
        store.store_batch(units, np.ones((500, DIM), dtype=np.float32))
        store.search_vectors(query, 3, {"rare.deep": {"lt": 7}, "id": ["1"]})
        store.count({"when": {"lt": datetime(2026, 1, 2, tzinfo=timezone.utc)}})
        for number in range(30):
            store.count({"gone": {"exists": number % 2 == 0}})
    for _ in range(2):  # names outlive an opening that uses none of them
        with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": True}) as store:
            wait_until_held(store, ("rare", "deep"), ("gone",))
            columns: Any = store._open.live._masks.columns._columns
            assert columns.get(("when",)).read.has_moments
            assert not columns.get(("rare", "deep")).read.has_moments
            with patch.object(store._open.records, "field_values", None):  # nothing is read
                assert store.count({"rare.deep": {"lt": 7}, "gone": {"exists": False}}) == 7
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": False}) as store:
        for number in range(field_columns.MOST_COLUMNS):
            store.count({f"field{number}": 1})
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": True}) as store:
        wait_until_held(store, ("field0",))
        assert not store._open.live._masks.columns.holds([("rare", "deep")])
        assert store.count({"rare.deep": {"lt": 7}}) == 7


@pytest.mark.parametrize("least", [1, 1000])
def test_an_erasure_forgets_which_fields_were_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr(field_columns, "SAVED_FROM", least)
    canary = "alice-7f3a90c1"
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": False}) as store:
        units: list[dict[str, Any]] = [{"id": "a", "content": "one", canary: 1}, {"id": "b", "content": "two"}]
        store.store_batch(units, np.ones((2, DIM), dtype=np.float32))
        assert store.count({canary: 1}) == 1
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": False}) as store:
        assert store.count({canary: 1}) == 1
        store.forget_subject({canary: 1})
    for file in tmp_path.iterdir():
        assert canary.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("damaged", [b"\xff\xfe[", b"[[", b"{}", b'[["a"]]', b"[[7, true]]", b"[" * 100_000])
@pytest.mark.parametrize("background", [False, True])
def test_damaged_names_of_fields_keep_no_store_from_opening(tmp_path: Path, damaged: bytes, background: bool) -> None:
    with Records.open(tmp_path / "m", dim=DIM) as records, records.write() as tx:
        tx.set_meta(FIELDS_KEY, damaged)
    for _ in range(2):
        with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": background}) as store:
            store.store_batch([{"id": "a", "content": "one", "color": "red"}], np.ones((1, DIM), dtype=np.float32))
            assert store.count({"color": "red"}) == 1
            assert store.statistics()["event_totals"].get("maintenance-failed", 0) == 0
    with VectorStore(tmp_path / "m", None, DIM, storage_config={"background": True}) as store:
        wait_until_held(store, ("color",))


QUERY = np.ones((1, DIM), dtype=np.float32)
ASKED: list[tuple[dict[str, Any], int]] = [
    ({"metadata.n": {"lt": 7}}, 7),
    ({"tags": "b"}, 500),
    ({"metadata.at": {"gte": "2026-01-01T00:00:00Z"}, "metadata.n": 2**60}, 0),
    ({"metadata.word": "wärme 3", "metadata.big": 2**60 + 3}, 1),
]


def opened(path: Path, *, background: bool = False) -> VectorStore:
    return VectorStore(path, lambda _: [1.0] * DIM, DIM, storage_config={"background": background})


def filled(path: Path, *, background: bool = False) -> VectorStore:
    """500 units with every kind of value."""
    store = opened(path, background=background)
    store.store_batch(
        [
            {
                "id": str(n),
                "content": "c",
                "tags": ["a", "b"],
                "metadata": {"n": n, "at": "2026-01-01T00:00:00Z", "word": f"wärme {n}", "big": 2**60 + n},
            }
            for n in range(500)
        ],
        np.ones((500, DIM), dtype=np.float32),
    )
    return store


def asked(store: VectorStore) -> list[int]:
    return [store.count(one) for one, _ in ASKED]


def test_a_process_that_opens_the_store_again_has_the_columns_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    with filled(tmp_path / "m") as store:
        assert asked(store) == [count for _, count in ASKED]
    assert (tmp_path / "m.columns").stat().st_mode & 0o777 == (tmp_path / "m.db").stat().st_mode & 0o777
    for again in range(2):
        with opened(tmp_path / "m") as store:
            records = store._open.records
            with patch.object(records, "field_values", Mock(wraps=records.field_values)) as read:
                assert asked(store) == [count for _, count in ASKED]
            rows = {tuple(call.args[1].tolist()) for call in read.call_args_list}
            assert rows == ({(501, 502, 503)} if again else set())  # those that changed since the file was written
            assert store._open.live.columns.nbytes <= 64 * 500 + 8_000  # the large numbers; the rest is mapped
            assert store.update("3", {"content": "c", "metadata": {"n": 3}})
            store.delete("4")
            assert asked(store) == [6, 498, 0, 0]
            assert store.update(
                "3", {"content": "c", "tags": ["a", "b"], "metadata": {"n": 3, "word": "wärme 3", "big": 2**60 + 3}}
            )
            store.store_batch([{"id": "4", "content": "c", "tags": ["b"], "metadata": {"n": 4}}], QUERY)
            assert asked(store) == [count for _, count in ASKED]
            assert [found for found, _ in store.facets("metadata.word", limit=1)] != []


def test_the_background_reads_the_usual_fields_of_a_large_store_before_any_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    monkeypatch.setattr(foresight, "PAGE_SLOTS", 64)
    monkeypatch.setattr(foresight, "PASS_VALUES", 1500)  # three fields in a pass
    with filled(tmp_path / "m", background=True) as store:
        wait_until_held(
            store, ("metadata", "n"), ("tags",), ("metadata", "at"), ("metadata", "word"), ("metadata", "big")
        )
        with patch.object(store._open.records, "field_values", None):
            assert asked(store) == [count for _, count in ASKED]


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "other", "folder"])
def test_a_damaged_file_of_columns_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    filled(tmp_path / "other").close()
    with filled(tmp_path / "m") as store:
        asked(store)
    file = tmp_path / "m.columns"
    good = file.read_bytes()
    for at in range(0, len(good), 997) if how == "flip" else [0]:
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "flip":
            file.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        else:
            file.write_bytes({"cut": good[:-100], "empty": b"", "other": good.replace(b"0", b"1")}[how])
        with opened(tmp_path / "m") as store:
            assert asked(store) == [count for _, count in ASKED], at
        if how != "folder":
            good = file.read_bytes()


def test_columns_of_newer_records_are_not_used_for_an_older_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database goes back in time, and as many other changes follow."""
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    path = tmp_path / "m.db"
    with filled(tmp_path / "m") as store:
        assert store.count({"metadata.n": 1000}) == 0
    old = path.read_bytes()
    with opened(tmp_path / "m") as store:
        for number in range(60):
            store.update(str(number), {"content": "c", "metadata": {"n": 1000}})
        columns = store._open.live.columns
        columns.clear()
        assert store.count({"metadata.n": 1000}) == 60
    path.write_bytes(old)
    with opened(tmp_path / "m") as store:
        for number in range(100, 160):
            store.update(str(number), {"content": "c", "metadata": {"n": 2000}})
        assert store.count({"metadata.n": 1000}) == 0
        assert store.count({"metadata.n": 2000}) == 60


@pytest.mark.parametrize(("limit", "most"), [("FORESEEN_TEXTS", 400), ("FORESEEN_BYTES", 0)])
def test_foresight_is_bounded_and_filters_find_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    monkeypatch.setattr(foresight, "PASS_VALUES", 1)
    monkeypatch.setattr(foresight, limit, most)
    with filled(tmp_path / "m") as store:
        live = store._open.live
        live.foresee({}, lambda: False)
        held = {path for path in (("metadata", "word"), ("metadata", "n"), ("tags",)) if live.columns.holds([path])}
        assert held == ({("metadata", "n"), ("tags",)} if most else set())
        assert asked(store) == [count for _, count in ASKED]


def test_a_round_of_maintenance_leaves_no_columns_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    with filled(tmp_path / "m") as store:
        assert store.count({"metadata.n": {"lt": 7}}) == 7
        store._open.live.foresee({})
        held = store.get_storage_health()["memory_usage_mb"]
        store.run_maintenance()
        assert held - store.get_storage_health()["memory_usage_mb"] > 500 * 8 / 1e6
        assert store.count({"metadata.n": {"lt": 8}}) == 8


def test_a_round_of_maintenance_reads_the_usual_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    with filled(tmp_path / "m") as store:
        store.run_maintenance()
        monkeypatch.setattr(Records, "field_values", Mock(side_effect=AssertionError("read again")))
        assert asked(store) == [count for _, count in ASKED]


def test_a_file_of_columns_that_cannot_be_written_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    (tmp_path / "m.columns").mkdir()
    store = filled(tmp_path / "m")
    assert asked(store) == [count for _, count in ASKED]
    session = store._open
    store.close()
    assert session.events.totals()["fields-unsaved"] == 1


def test_a_file_of_columns_holds_one_moment_whatever_is_asked_and_stored_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is newer than the file has no place in it; a column grows when it is asked for moments."""
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    steps = list[int]()

    def meddle() -> None:
        steps.append(len(steps))
        unit = {"id": f"new {len(steps)}", "content": "c", "metadata": {"n": 7, "at": "2026-01-02T00:00:00Z"}}
        store.store_batch([unit], QUERY)
        assert store.count({"metadata.n": 7}) == 1 + len(steps)
        if len(steps) == 3:
            assert store.count({"metadata.at": {"gt": "2026-01-01T00:00:00Z"}}) == 3

    def drafted(*given: Any) -> Any:
        meddle()
        return draft_of(*given)

    def summed(*given: Any) -> int:
        if len(steps) < 4:
            meddle()
        return zlib.crc32(*given)

    with filled(tmp_path / "m") as store:
        assert store.count({"metadata.at": {"exists": True}, "metadata.n": 7}) == 1
        with patch.object(field_columns, "draft_of", drafted), patch.object(column_file, "zlib", Mock(crc32=summed)):
            store._open.live.save_fields(1.0)
        assert len(steps) == 4
        token = json.loads(store._open.records.get_meta(FIELDS_KEY) or b"")["columns"]
        file = column_file.open_columns(store._open.records.columns_path, token)
        assert file is not None
        taken = file.take(("metadata", "n"))
        assert taken is not None
        assert (len(file.slots), taken.fresh) == (500, {})
        assert store.count({"metadata.n": 7}) == 5


def test_two_openings_write_the_file_in_turns_and_stay_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_columns, "SAVED_FROM", 400)
    monkeypatch.setattr(field_columns, "_FRESH_ROWS", 5)
    monkeypatch.setattr(field_columns, "_FRESH_SHARE", 0.0)
    filled(tmp_path / "m").close()
    with opened(tmp_path / "m") as one, opened(tmp_path / "m") as other:
        for number in range(0, 40, 8):
            for store in (one, other):
                for at in range(number, number + 8):
                    assert store.update(str(at), {"content": "c", "metadata": {"n": 1000 + at}})
                assert store.count({"metadata.n": {"gte": 1000}}) == number + 8
                store._open.live.save_fields(1.0)
                assert [each.count({"metadata.n": {"lt": 500}}) for each in (one, other)] == [492 - number] * 2
    with opened(tmp_path / "m") as store:
        assert store.count({"metadata.n": {"gte": 1000}}) == 40
        assert store.count({"metadata.n": {"lt": 500}}) == 460
