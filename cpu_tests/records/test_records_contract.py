"""What each method of Records and Transaction promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from records_kit import DIM, facts, put, unit, vector

from memevolve_gpu.errors import (
    DimensionMismatchError,
    InvalidFilterError,
    InvalidUnitError,
    InvalidVectorError,
    StorageError,
    StoreClosedError,
)
from memevolve_gpu.records import Records, Stored
from memevolve_gpu.records.fulltext_buffer import FOLD_AT
from memevolve_gpu.types import Change, Head, Op, Row


def test_a_new_store_is_empty(records: Records) -> None:
    assert records.head() == Head(last_seq=0, horizon=0, last_slot=0, count=0)
    assert records.count() == 0
    assert records.read_after(0, 10) == []
    assert records.scan(0, 10**9, 10) == []
    assert list(records.ids()) == []
    assert list(records.units()) == []
    assert records.get("a") is None
    assert not records.exists("a")
    assert records.keyword("anything", 5) == []
    assert records.matching({}).tolist() == []
    assert records.check() == []


def test_what_was_put_is_read_back_by_every_door(records: Records) -> None:
    made = unit("a", tags=["x"], metadata={"score": 0.5, "empty": None}, other="ключ 🙂 \x00 \u2028")
    with records.write() as tx:
        assert tx.put(made, vector(7), "a") == 1
    assert records.head() == Head(1, 0, 1, 1)
    assert records.get("a") == made
    assert records.get_many(["b", "a"]) == {"a": made}
    assert records.units_at([1, 2]) == {1: made}
    assert records.vectors_of(["a", "b"]) == {"a": vector(7)}
    assert records.exists("a")
    assert records.read_after(0, 10) == [Change(1, Op.PUT, 1, "a", vector(7))]
    assert records.scan(0, 1, 10) == [Row(1, "a", vector(7))]
    assert list(records.ids()) == ["a"]
    assert list(records.units()) == [made]
    assert records.matching({"tags": "x"}).tolist() == [1]
    assert [found for _, found in records.keyword("CONTENT", 5)] == ["a"]


def test_get_many_keeps_the_order_that_was_asked_for(records: Records) -> None:
    with records.write() as tx:
        for name in "abc":
            put(tx, name)
    assert list(records.get_many(["c", "x", "a", "b"])) == ["c", "a", "b"]


def test_units_at_takes_an_array(records: Records) -> None:
    put(records, "a")
    assert records.units_at(np.array([1], dtype=np.int64)) == {1: unit("a")}


def test_the_unit_takes_the_id_of_its_row(records: Records) -> None:
    given = {"content": "x"}
    with records.write() as tx:
        tx.put(given, vector(), "a")
    assert records.get("a") == {"content": "x", "id": "a"}
    assert given == {"content": "x"}


def test_replacing_takes_a_new_slot_and_logs_the_old_ones_end(records: Records) -> None:
    put(records, "a", "first")
    put(records, "b")
    with records.write() as tx:
        assert tx.put(unit("a", content="second"), vector(2), "a") == 3
        assert tx.count == 2
    assert records.head() == Head(4, 0, 3, 2)
    assert records.read_after(0, 10) == [
        Change(1, Op.PUT, 1, None, None),
        Change(2, Op.PUT, 2, "b", vector()),
        Change(3, Op.DROP, 1, None, None),
        Change(4, Op.PUT, 3, "a", vector(2)),
    ]
    assert records.get("a") == unit("a", content="second")
    assert records.units_at([1, 2, 3]) == {2: unit("b"), 3: unit("a", content="second")}
    assert records.keyword("first", 5) == []
    assert [found for _, found in records.keyword("second", 5)] == ["a"]


def test_edit_keeps_slot_and_vector(records: Records) -> None:
    put(records, "a", tags=["old"])
    with records.write() as tx:
        assert tx.edit("a", unit("a", tags=["new"]))
        assert not tx.edit("b", unit("b"))
        assert tx.find("a") == Stored(1, unit("a", tags=["new"]))
    assert records.read_after(1, 10) == [Change(2, Op.EDIT, 1, "a", vector())]
    assert records.get("a") == unit("a", tags=["new"])
    assert records.matching({"tags": "new"}).tolist() == [1]
    assert records.matching({"tags": "old"}).tolist() == []
    assert [found for _, found in records.keyword("content", 5)] == ["a"]


def test_drop_and_drop_many(records: Records) -> None:
    with records.write() as tx:
        for name in "abcd":
            put(tx, name)
    with records.write() as tx:
        assert tx.drop("a")
        assert not tx.drop("a")
        assert tx.drop_many(["b", "x", "b", "c"]) == 2
        assert tx.count == 1
        assert tx.find("b") is None
    assert facts(records) == {"d": unit("d")}
    assert records.head() == Head(7, 0, 4, 1)
    assert records.vectors_of(["a", "d"]) == {"d": vector()}


def test_clear_is_one_log_entry_and_slots_go_on(records: Records) -> None:
    with records.write() as tx:
        for name in "abc":
            put(tx, name)
    with records.write() as tx:
        assert tx.clear() == 3
        assert tx.clear() == 0
        assert tx.count == 0
        assert put(tx, "a", "again") == 4
    assert records.read_after(3, 10) == [Change(4, Op.CLEAR, 3, None, None), Change(5, Op.PUT, 4, "a", vector())]
    assert list(records.ids()) == ["a"]
    assert [found for _, found in records.keyword("again", 5)] == ["a"]
    assert records.check() == []


@pytest.mark.parametrize("count", [1, 3, 1000, 1001, 2500])
def test_put_many_is_put_one_by_one(records: Records, count: int) -> None:
    with records.write() as tx:
        tx.put_many((unit(f"u{n}", content=f"number {n}"), f"number {n}", vector(n), f"u{n}") for n in range(count))
        assert tx.count == count
    assert records.head() == Head(count, 0, count, count)
    assert [row.id for row in records.scan(0, count, count)] == [f"u{n}" for n in range(count)]
    assert [change.seq for change in records.read_after(0, count)] == list(range(1, count + 1))
    assert records.vectors_of([f"u{count - 1}"]) == {f"u{count - 1}": vector(count - 1)}
    assert [found for _, found in records.keyword(f"{count - 1}", 1)] == [f"u{count - 1}"]
    assert records.check() == []


def test_put_many_replaces_and_a_repeated_id_ends_as_its_last(records: Records) -> None:
    put(records, "a", n=0)
    with records.write() as tx:
        tx.put_many((unit(name, n=n), name, vector(n), name) for n, name in enumerate("bacab"))
        assert tx.count == 3
    assert facts(records) == {"c": unit("c", n=2), "a": unit("a", n=3), "b": unit("b", n=4)}
    puts = sum(change.op == Op.PUT for change in records.read_after(0, 100))
    drops = sum(change.op == Op.DROP for change in records.read_after(0, 100))
    assert (puts, drops) == (6, 3)
    assert records.check() == []


def test_put_many_of_a_generator_that_fails_writes_nothing(records: Records) -> None:
    def rows() -> Iterator[tuple[dict[str, object], str, bytes, str]]:
        for n in range(1500):
            yield unit(f"u{n}"), "", vector(), f"u{n}"
        raise RuntimeError("the source ended badly")

    with pytest.raises(RuntimeError, match="ended badly"), records.write() as tx:
        tx.put_many(rows())
    assert records.head() == Head(0, 0, 0, 0)


def test_an_exception_rolls_everything_back(records: Records) -> None:
    put(records, "a")
    before = records.head()

    def change_my_mind() -> None:
        with records.write() as tx:
            put(tx, "b")
            tx.drop("a")
            tx.set_meta("key", b"value")
            tx.next_auto_id()
            raise KeyError("changed my mind")

    with pytest.raises(KeyError):
        change_my_mind()
    assert records.head() == before
    assert list(records.ids()) == ["a"]
    assert records.get_meta("key") is None
    put(records, "c")
    assert records.head().last_seq == before.last_seq + 1


def test_reads_of_the_store_see_the_state_before_an_open_transaction(records: Records) -> None:
    with records.write() as tx:
        put(tx, "a")
        assert tx.head == Head(0, 0, 0, 0)
        assert tx.find("a") == Stored(1, unit("a"))
        assert records.head().count == 0
        assert records.get("a") is None
    assert records.get("a") is not None


def test_a_transaction_ends_with_its_block(records: Records) -> None:
    with records.write() as tx:
        put(tx, "a")
    with pytest.raises(StorageError, match="transaction has ended"):
        tx.drop("a")
    with pytest.raises(StorageError, match="transaction has ended"):
        tx.merge_pending()


def test_write_inside_write_is_refused_and_harms_nothing(records: Records) -> None:
    with records.write() as tx:
        put(tx, "a")
        with pytest.raises(StorageError, match="inside write"), records.write():
            pytest.fail("a second transaction began")
        with pytest.raises(StorageError, match="inside write"):
            records.checkpoint()
        with pytest.raises(StorageError, match="inside write"):
            records.close()
        put(tx, "b")
    assert list(records.ids()) == ["a", "b"]


def test_automatic_ids_never_collide_and_never_return(records: Records) -> None:
    with records.write() as tx:
        assert [tx.next_auto_id(), tx.next_auto_id()] == ["unit_0", "unit_1"]
        put(tx, "unit_5")
        put(tx, "unit_007")
        put(tx, "unit_x")
        put(tx, "unit_-3")
        put(tx, "unit_٣")
        assert tx.next_auto_id() == "unit_6"
    with records.write() as tx:
        tx.drop("unit_5")
        tx.put_many([(unit("unit_9"), "", vector(), "unit_9")])
    with records.write() as tx:
        tx.clear()
        assert tx.next_auto_id() == "unit_10"


def test_a_huge_explicit_number_does_not_use_up_the_automatic_ids(records: Records) -> None:
    with records.write() as tx:
        put(tx, "unit_" + "9" * 30)
        put(tx, f"unit_{10**12}")
        assert tx.next_auto_id() == "unit_0"
        put(tx, f"unit_{10**12 - 1}")
        assert tx.next_auto_id() == f"unit_{10**12 + 1}"


def test_purge_records_the_horizon_and_keeps_the_rows(records: Records) -> None:
    for name in "abc":
        put(records, name)
    assert records.purge(2) == 2
    assert records.purge(1) == 0
    assert records.head() == Head(3, 2, 3, 3)
    assert [change.seq for change in records.read_after(0, 10)] == [3]
    assert records.purge(10**9) == 1
    assert records.head() == Head(3, 3, 3, 3)
    assert records.read_after(0, 10) == []
    assert put(records, "d") == 4
    assert records.read_after(3, 10) == [Change(4, Op.PUT, 4, "d", vector())]
    assert sorted(records.ids()) == ["a", "b", "c", "d"]
    assert records.check() == []


def test_read_after_and_scan_page(records: Records) -> None:
    with records.write() as tx:
        for n in range(10):
            put(tx, f"u{n}")
        tx.drop("u4")
    assert [change.seq for change in records.read_after(3, 4)] == [4, 5, 6, 7]
    assert [row.slot for row in records.scan(3, 8, 10)] == [4, 6, 7, 8]
    assert [row.slot for row in records.scan(3, 8, 2)] == [4, 6]


@pytest.mark.parametrize("page_size", [1, 2, 5, 6, 100])
def test_iteration_in_pages_sees_every_row_once(records: Records, page_size: int) -> None:
    with records.write() as tx:
        for n in range(5):
            put(tx, f"u{n}", n=n)
    assert list(records.ids(page_size)) == [f"u{n}" for n in range(5)]
    assert [one["n"] for one in records.units(page_size, {"n": {"gt": 1}})] == [2, 3, 4]


def test_iteration_may_go_on_while_rows_change(records: Records) -> None:
    with records.write() as tx:
        for n in range(6):
            put(tx, f"u{n}")
    seen = []
    for unit_id in records.ids(page_size=2):
        seen.append(unit_id)
        with records.write() as tx:
            tx.drop(unit_id)
    assert seen == [f"u{n}" for n in range(6)]
    assert records.count() == 0


def test_units_refuses_a_bad_filter_at_once(records: Records) -> None:
    with pytest.raises(InvalidFilterError):
        records.units(filters={"a": {"near": 1}})


def test_meta_values_live_in_the_transaction(records: Records) -> None:
    assert records.get_meta("key") is None
    with records.write() as tx:
        tx.set_meta("key", b"one")
        tx.set_meta("key", b"\x00two")
        assert tx.get_meta("key") == b"\x00two"
        assert records.get_meta("key") is None
    assert records.get_meta("key") == b"\x00two"
    assert records.head().last_seq == 0


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ({"vector": b"abc"}, DimensionMismatchError),
        ({"vector": vector() + vector()}, DimensionMismatchError),
        ({"vector": [1.0] * DIM}, InvalidVectorError),
        ({"unit_id": ""}, InvalidUnitError),
        ({"unit_id": 7}, InvalidUnitError),
        ({"unit_id": "\ud800"}, InvalidUnitError),
        ({"unit": {"content": "\udfff"}}, InvalidUnitError),
        ({"unit": {"content": float("nan")}}, InvalidUnitError),
        ({"unit": {"content": {1, 2}}}, InvalidUnitError),
    ],
)
def test_rows_that_cannot_be_kept_are_refused_whole(records: Records, bad: dict[str, object], kind: type) -> None:
    good = {"unit": {"content": "x"}, "text": "x", "vector": vector(), "unit_id": "b"}
    with records.write() as tx:
        put(tx, "a")
        with pytest.raises(kind):
            tx.put(**{name: one for name, one in {**good, **bad}.items() if name != "text"})  # type: ignore[arg-type]
        with pytest.raises(kind):
            tx.put_many([tuple({**good, **bad}.values())])  # type: ignore[list-item]
    assert list(records.ids()) == ["a"]
    assert records.check() == []


def test_a_unit_nested_too_deep_for_filters_is_refused(records: Records) -> None:
    def nested(depth: int) -> dict[str, object]:
        value: dict[str, object] = {}
        for _ in range(depth):
            value = {"in": value}
        return value

    with records.write() as tx:
        put(tx, "wide", wide=[[n] for n in range(2000)])
        put(tx, "deep", deep=nested(800))
        with pytest.raises(InvalidUnitError, match="nested"):
            put(tx, "deeper", deep=nested(950))
    assert records.matching({"deep": {"exists": True}}).tolist() == [2]


def test_ids_that_cannot_exist_are_not_found(records: Records) -> None:
    assert records.get("\ud800") is None
    assert not records.exists("\ud800")
    assert records.get_many(["\ud800", "a\x00b"]) == {}
    with records.write() as tx:
        put(tx, "a\x00b")
        assert tx.find("\ud800") is None
        assert not tx.drop("\ud800")
    assert records.exists("a\x00b")
    assert not records.exists("a")
    assert list(records.get_many(["a\x00b", "a"])) == ["a\x00b"]


def test_after_close_every_call_says_so(records: Records) -> None:
    put(records, "a")
    pages = records.ids(page_size=1)
    records.close()
    records.close()
    calls: list[Callable[[], object]] = [
        records.head,
        records.count,
        lambda: records.read_after(0, 1),
        lambda: records.get("a"),
        lambda: records.matching({}),
        lambda: records.keyword("a", 1),
        lambda: records.get_meta("a"),
        lambda: records.purge(1),
        records.checkpoint,
        records.check,
        lambda: records.check(fix=True),
        lambda: next(pages),
        lambda: put(records, "b"),
        lambda: records.backup("elsewhere"),
    ]
    for call in calls:
        with pytest.raises(StoreClosedError, match="open it again"):
            call()


def test_what_was_committed_is_there_after_reopening(records: Records) -> None:
    with records.write() as tx:
        tx.put_many((unit(f"u{n}"), "text", vector(n), f"u{n}") for n in range(2 * FOLD_AT + 3))
    put(records, "late", "latecomer")
    head, prefix = records.head(), str(records.path).removesuffix(".db")
    records.close()
    with Records.open(prefix) as again:
        assert again.head() == head
        assert again.store_id == records.store_id
        assert [found for _, found in again.keyword("latecomer", 5)] == ["late"]
        assert again.check() == []


def test_file_bytes_and_checkpoint(records: Records) -> None:
    with records.write() as tx:
        tx.put_many((unit(f"u{n}"), "text", vector(n), f"u{n}") for n in range(1000))
    before = records.file_bytes()
    assert before["wal"] > 0
    records.checkpoint()
    after = records.file_bytes()
    assert after["wal"] == 0
    assert after["database"] > 100_000
    assert records.count() == 1000
