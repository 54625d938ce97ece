"""Pruning, consolidating, deduplicating and forgetting, on a store and on a plain backend."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_kit import DIM, Given, days_ago, ids_of, open_scratch, store_at, unit
from support import each

from memevolve_gpu import VectorStore
from memevolve_gpu.components.manage import MemoryManager, SimpleManagementStrategy
from memevolve_gpu.components.store import StorageBackend
from memevolve_gpu.errors import (
    ConfigurationError,
    ConflictError,
    EmbeddingError,
    InvalidFilterError,
    InvalidQueryError,
    StorageFullError,
)
from memevolve_gpu.utils.timestamps import parse_stamp

STRATEGY = SimpleManagementStrategy()


@pytest.fixture(params=["store", "plain"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageBackend]:
    if request.param == "plain":
        yield open_scratch()
    else:
        with store_at(tmp_path) as store:
            yield store


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the transactions' effects: "drop" or "put" of each, "commit" where one ends."""
    from memevolve_gpu.records.transaction import Transaction

    seen: list[str] = []

    def watched(name: str, what: str) -> None:
        original = getattr(Transaction, name)

        def call(self: Any, *arguments: Any) -> Any:
            seen.append(what)
            return original(self, *arguments)

        monkeypatch.setattr(Transaction, name, call)

    for name, what in (("drop", "drop"), ("put_many", "put"), ("finish", "finish"), ("end", "end")):
        watched(name, what)
    return seen


def transactions(seen: list[str]) -> list[set[str]]:
    """What each transaction that dropped or put anything did."""
    runs = [set(run) for ends, run in itertools.groupby(seen, lambda what: what == "end") if not ends]
    return [run & {"drop", "put"} for run in runs if run & {"drop", "put"}]


# --- prune ----------------------------------------------------------------------------------------------------------


def aged(backend: StorageBackend) -> None:
    """Ten units, the first nine days old, the last of today."""
    kinds = ["lesson", "skill"]
    backend.store_batch(
        [
            {**unit(f"u{n}"), "type": kinds[n % 2], "metadata": {"created_at": days_ago(9 - n), "part": n}}
            for n in range(10)
        ]
    )


@pytest.mark.parametrize(
    ("criteria", "gone"),
    [
        (None, []),
        ({}, []),
        ({"max_age": None, "type": None}, []),
        ({"max_age": 6.5}, ["u0", "u1", "u2"]),
        ({"max_age": 100}, []),
        ({"max_count": 7}, ["u0", "u1", "u2"]),
        ({"max_count": 10}, []),
        ({"max_count": 0}, [f"u{n}" for n in range(10)]),
        ({"type": "skill"}, ["u1", "u3", "u5", "u7", "u9"]),
        ({"type": ["skill", "lesson"]}, [f"u{n}" for n in range(10)]),
        ({"type": []}, []),
        ({"type": "tool"}, []),
        ({"type": "skill", "max_age": 4.5}, ["u1", "u3"]),
        ({"type": "skill", "max_count": 2}, ["u1", "u3", "u5"]),
        ({"max_age": 6.5, "max_count": 4}, ["u0", "u1", "u2", "u3", "u4", "u5"]),
        ({"max_age": 2.5, "max_count": 9}, ["u0", "u1", "u2", "u3", "u4", "u5", "u6"]),
        ({"filters": {"metadata.part": {"gte": 7}}}, ["u7", "u8", "u9"]),
        ({"filters": {"metadata.part": {"gte": 2}}, "type": "lesson", "max_count": 2}, ["u2", "u4"]),
    ],
)
def test_prune_deletes_what_the_criteria_name(backend: StorageBackend, criteria: Any, gone: list[str]) -> None:
    aged(backend)
    removed = STRATEGY.prune(backend, criteria)
    count, ids = removed
    assert (count, sorted(ids)) == (len(gone), gone)
    assert ids_of(backend) == [f"u{n}" for n in range(10) if f"u{n}" not in gone]
    assert STRATEGY.prune(backend, criteria) == (0, [])


@pytest.mark.parametrize(
    "stamp", [None, "", "yesterday", 1_700_000_000, "2024-13-01", {"at": "2020-01-01"}, ["2020-01-01"], True]
)
def test_a_unit_without_a_readable_time_stamp_is_never_pruned_by_age(backend: StorageBackend, stamp: Any) -> None:
    backend.store(unit("old", metadata={"created_at": days_ago(30)}))
    backend.store(unit("undated", metadata={"created_at": stamp}))
    removed = STRATEGY.prune(backend, {"max_age": 1})
    assert removed.ids == ["old"]
    assert removed.notes == {"undated": 1}
    assert STRATEGY.prune(backend, {"max_count": 0}).ids == ["undated"]


@each(
    ("text", "seconds"),
    [
        ("1970-01-02T00:00:00+00:00", 86_400),
        ("1970-01-02T00:00:00Z", 86_400),
        ("1970-01-02T00:00:00+00:00Z", 86_400),
        ("1970-01-02T02:00:00+02:00", 86_400),
        ("1970-01-02T02:00:00+0200", 86_400),
        ("1970-01-01T22:00:00-0200", 86_400),
        ("1970-01-02T00:00:00", 86_400),
        ("1970-01-02 00:00:00.5", 86_400.5),
        ("1970-01-02T00:00:00.123456789Z", 86_400.123456),
        ("1970-01-02", 86_400),
        (" 1970-01-02 ", 86_400),
        ("0001-01-01T00:00:00+14:00", -62_135_647_200),
        ("Z", None),
    ],
)
def test_time_stamps_are_read_in_their_usual_forms(text: str, seconds: float | None) -> None:
    assert parse_stamp(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("criteria", "says"),
    [
        ({"max_ages": 3}, "'max_ages'"),
        ({"max_age": -1}, "max_age"),
        ({"max_age": "3"}, "max_age"),
        ({"max_age": True}, "max_age"),
        ({"max_age": float("nan")}, "max_age"),
        ({"max_count": 1.5}, "max_count"),
        ({"max_count": -1}, "max_count"),
        ({"filters": "type=skill"}, "filters"),
        ({"type": "skill", "filters": {"type": "tool"}}, "both given"),
    ],
)
def test_criteria_that_cannot_be_meant_are_refused(backend: StorageBackend, criteria: Any, says: str) -> None:
    aged(backend)
    with pytest.raises(ConfigurationError, match=says):
        STRATEGY.prune(backend, criteria)
    assert backend.count() == 10


def test_a_bad_filter_is_named(backend: StorageBackend) -> None:
    with pytest.raises(InvalidFilterError, match="near"):
        STRATEGY.prune(backend, {"filters": {"type": {"near": "x"}}})


def test_the_order_of_writing_is_the_age(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit(name) for name in "abcd"])
        store.update("a", unit("a", "rewritten"))
        assert STRATEGY.prune(store, {"max_count": 2}).ids == ["b", "c"]


# --- every operation ------------------------------------------------------------------------------------------------

Operation = Callable[[StorageBackend, bool], Any]
OPERATIONS: dict[str, Operation] = {
    "prune": lambda backend, dry: STRATEGY.prune(backend, {"max_count": 3}, dry_run=dry),
    "deduplicate": lambda backend, dry: STRATEGY.deduplicate(backend, dry_run=dry),
    "forget": lambda backend, dry: STRATEGY.apply_forgetting(backend, "lru", 3, dry_run=dry),
    "consolidate": lambda backend, dry: STRATEGY.consolidate(backend, dry_run=dry),
}


def twins(backend: StorageBackend) -> None:
    """Eight units, of which each two say the same."""
    backend.store_batch([unit(f"{word}{n}", f"{word} word") for word in "abcd" for n in range(2)])


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_dry_run_says_what_would_be_done_and_changes_nothing(backend: StorageBackend, name: str) -> None:
    twins(backend)
    before = backend.retrieve_all()
    said = OPERATIONS[name](backend, True)
    assert backend.retrieve_all() == before
    done = OPERATIONS[name](backend, False)
    if name == "consolidate":
        assert [one["content"] for one in said] == [one["content"] for one in done]
    else:
        assert said == done
        assert said.notes["dry_run"]
    assert backend.count() == (4 if name in ("consolidate", "deduplicate") else 8 - done[0])


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_empty_memory_is_left_alone(backend: StorageBackend, name: str) -> None:
    assert list(OPERATIONS[name](backend, False)) in ([], [0, []])


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_one_transaction(tmp_path: Path, writes: list[str], name: str) -> None:
    with store_at(tmp_path) as store:
        twins(store)
        writes.clear()
        OPERATIONS[name](store, False)
        assert transactions(writes) == [{"drop", "put"} if name == "consolidate" else {"drop"}]
        assert store.check() == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_reports_itself_to_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    original = VectorStore.register_management_operation

    def register(self: VectorStore, operation: str, details: Any) -> Any:
        heard.append((operation, dict(details)))
        return original(self, operation, details)

    monkeypatch.setattr(VectorStore, "register_management_operation", register)
    with store_at(tmp_path) as store:
        OPERATIONS[name](store, False)
        assert heard == []
        twins(store)
        OPERATIONS[name](store, True)
        assert heard == []
        OPERATIONS[name](store, False)
        ((operation, details),) = heard
        assert operation == name
        assert details["removed"] == {"prune": 5, "forget": 3, "deduplicate": 4, "consolidate": 8}[name]


class Disturbed(VectorStore):
    """A store whose unit ``b0`` is updated by somebody else after it was read and before it is deleted."""

    pending = True

    def _disturb(self) -> None:
        if self.pending:
            self.pending = False
            self.update("b0", unit("b0", "b word and something new"))

    def delete_batch(self, ids: Iterable[str], *, unchanged_since: int | None = None) -> int:
        self._disturb()
        return super().delete_batch(ids, unchanged_since=unchanged_since)

    def replace_batch(self, *arguments: Any, **more: Any) -> list[str]:
        self._disturb()
        return super().replace_batch(*arguments, **more)


@pytest.mark.parametrize("name", ["prune", "deduplicate", "forget", "consolidate"])
def test_what_somebody_changed_meanwhile_is_not_lost(tmp_path: Path, name: str) -> None:
    with Disturbed(tmp_path / "m", Given(), storage_config={"background": False}) as store:
        store.store_batch([unit("b0", "b word"), *(unit(f"a{n}", "a word") for n in range(3)), unit("b1", "b word")])
        if name == "deduplicate":
            store.retrieve("b1")
        operations: dict[str, Callable[[], Any]] = {
            "prune": lambda: STRATEGY.prune(store, {"max_count": 0}),
            "deduplicate": lambda: STRATEGY.deduplicate(store, keep="accessed"),
            "forget": lambda: STRATEGY.apply_forgetting(store, "lru", 5),
            "consolidate": lambda: STRATEGY.consolidate(store),
        }
        result = operations[name]()
        found = store.retrieve("b0")
        assert found is not None
        assert found["content"] == "b word and something new"
        if name == "consolidate":
            assert [one["metadata"]["consolidated_from"] for one in result] == [["a0", "a1", "a2"]]
        else:
            assert "b0" not in result.ids
            assert result.notes["left"] == 1
        assert store.check() == []


def test_a_replacement_is_refused_whole_when_a_source_changed(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit("a"), unit("b"), unit("c")])
        since = store.change_number
        store.update("b", {**unit("b"), "tags": ["edited in place"]})
        store.delete("c")
        for ids in (["a", "b"], ["a", "c"]):
            with pytest.raises(ConflictError) as caught:
                store.replace_batch(ids, [unit("new")], unchanged_since=since)
            assert caught.value.ids == ids[1:]
        assert ids_of(store) == ["a", "b"]
        assert store.replace_batch(["a", "c", "no such"], [unit("new")]) == ["new"]
        assert ids_of(store) == ["b", "new"]
        assert store.replace_batch(["b"], []) == []
        assert ids_of(store) == ["new"]
        assert store.check() == []


def test_a_replacement_needs_no_more_room_than_it_makes(tmp_path: Path) -> None:
    with store_at(tmp_path, max_memory_units=3) as store:
        store.store_batch([unit("a"), unit("b"), unit("c")])
        assert store.replace_batch(["a", "b"], [unit("d"), unit("e")]) == ["d", "e"]
        assert store.replace_batch(["d"], [unit("d", "again")]) == ["d"]
        assert ids_of(store) == ["c", "e", "d"]


# --- deduplicate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_near_duplicates_go_by_cosine_whatever_the_metric_and_the_length(tmp_path: Path, metric: str) -> None:
    vectors = {"a": [1.0, 0], "b": [0.995, 0.0999], "c": [0.9, 0.4359], "d": [0, 1.0], "e": [0, 0, 1.0]}
    lengths = {"a": 1.0, "b": 1.4, "c": 0.8, "d": 1.0, "e": 0.9}
    scaled = {name: [lengths[name] * x for x in row] for name, row in vectors.items()}
    with store_at(tmp_path, Given(scaled), metric=metric) as store:
        store.store_batch([unit(name) for name in "abcde"])
        removed = STRATEGY.deduplicate(store, 0.99, keep="oldest", compare="cosine")
        assert removed == (1, ["b"])
        assert removed.notes == {"groups": 1}
        assert STRATEGY.deduplicate(store, 0.99, keep="oldest", compare="cosine") == (0, [])
        assert STRATEGY.deduplicate(store, 0.89, keep="oldest", compare="cosine") == (1, ["c"])


def test_no_chain_of_small_steps_deletes_what_is_far_from_what_stays(tmp_path: Path) -> None:
    angles = [0.0, 0.2, 0.4, 0.6, 0.8]
    vectors = {f"s{n}": [float(np.cos(angle)), float(np.sin(angle))] for n, angle in enumerate(angles)}
    with store_at(tmp_path, Given(vectors)) as store:
        store.store_batch([unit(name) for name in vectors])
        assert STRATEGY.deduplicate(store, float(np.cos(0.25)), keep="oldest", compare="cosine").ids == ["s1", "s3"]
        assert ids_of(store) == ["s0", "s2", "s4"]


def test_many_copies_become_one_and_the_oldest_or_the_most_accessed_stays(tmp_path: Path) -> None:
    for keep, stays in (("oldest", "n0"), ("accessed", "n77")):
        folder = tmp_path / keep
        folder.mkdir()
        with store_at(folder) as store:
            store.store_batch([unit(f"n{n}", "the same words") for n in range(100)] + [unit("other")])
            for _ in range(3):
                store.retrieve("n77")
            assert STRATEGY.deduplicate(store, 1.0, keep=keep)[0] == 99  # type: ignore[arg-type]
            assert ids_of(store) == [stays, "other"]


def test_of_copies_that_were_read_alike_the_oldest_stays(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit(f"n{n}", "the same words") for n in range(5)])
        assert STRATEGY.deduplicate(store, keep="accessed", dry_run=True).ids == ["n1", "n2", "n3", "n4"]
        store.retrieve("n3")
        store.retrieve("n2")
        assert store.access_counts() == {"n3": 1, "n2": 1}
        assert STRATEGY.deduplicate(store, keep="accessed")[0] == 4
        assert ids_of(store) == ["n2"]


def test_equal_texts_are_duplicates_where_there_are_no_vectors() -> None:
    plain = open_scratch()
    plain.store_batch([unit("a", "Copy  the file"), unit("b", "copy the FILE"), unit("c", "copy the files")])
    assert STRATEGY.deduplicate(plain, 0.5).ids == ["a"]


def test_directionless_vectors_are_no_duplicates(tmp_path: Path) -> None:
    with store_at(tmp_path, Given({"a": [0.0], "b": [0.0], "c": [1.0], "d": [1.0]})) as store:
        store.store_batch([unit(name) for name in "abcd"])
        assert STRATEGY.deduplicate(store, 0.9, keep="oldest", compare="cosine").ids == ["d"]


def test_what_deduplication_finds_in_an_index_agrees_with_comparing_all(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    centres = rng.standard_normal((300, DIM))
    rows = np.repeat(centres, 5, axis=0) + 0.05 * rng.standard_normal((1500, DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with store_at(tmp_path, nlist_min=4) as store:
        store.store_batch([unit(f"n{n}") for n in range(len(rows))], rows.astype(np.float32))
        store.run_maintenance()
        assert store.index.kind != "exact"
        kept: list[int] = []
        for at in range(len(rows)):
            if not kept or float((rows[kept] @ rows[at]).max()) < 0.97:
                kept.append(at)
        removed = STRATEGY.deduplicate(store, 0.97, keep="oldest", compare="cosine")
        missed = len(rows) - len(kept) - removed[0]
        assert {int(name[1:]) for name in removed.ids}.isdisjoint(kept)
        assert 0 <= missed <= 0.02 * len(rows)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, True, "0.9", float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(backend: StorageBackend, threshold: Any) -> None:
    for operation in (STRATEGY.deduplicate, STRATEGY.consolidate):
        with pytest.raises(ConfigurationError, match="similarity_threshold"):
            operation(backend, similarity_threshold=threshold)


def test_unknown_choices_are_refused(backend: StorageBackend) -> None:
    with pytest.raises(ConfigurationError, match="keep"):
        STRATEGY.deduplicate(backend, keep="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="by must"):
        STRATEGY.consolidate(backend, by="tags")  # type: ignore[arg-type]


# --- consolidate ----------------------------------------------------------------------------------------------------


def test_similar_units_become_one_that_says_where_it_comes_from(tmp_path: Path) -> None:
    with store_at(tmp_path, Given({"rebase": [1.0, 0.0], "rebasing": [0.95, 0.3122], "tar": [0, 0, 1.0]})) as store:
        dates = [days_ago(days) for days in (9, 5, 1)]
        store.store_batch(
            [
                unit("a", "rebase rewrites", tags=["git", "x"], metadata={"created_at": dates[0], "score": 1}),
                unit("t", "tar packs", metadata={"created_at": dates[1]}),
                unit("b", "rebasing replays", tags=["git", 7], metadata={"created_at": dates[2], "score": 2, "k": "v"}),
            ]
        )
        (merged,) = STRATEGY.consolidate(store, similarity_threshold=0.9, compare="cosine")
        assert store.retrieve(merged["id"]) == merged
        assert ids_of(store) == ["t", merged["id"]]
        assert merged["content"] == "rebase rewrites\n\nrebasing replays"
        assert (merged["type"], merged["tags"]) == ("lesson", ["git", "x", 7])
        metadata = dict(merged["metadata"])
        assert metadata.pop("consolidated_at") > dates[2]
        assert metadata == {
            "score": 2,
            "k": "v",
            "consolidated_from": ["a", "b"],
            "consolidated_count": 2,
            "created_at": dates[2],
            "first_created_at": dates[0],
            "last_created_at": dates[2],
        }
        assert store.search("rebase rewrites", 1)[0][1] == merged["id"]
        assert store.check() == []


def test_provenance_survives_a_second_merge(backend: StorageBackend) -> None:
    backend.store_batch([unit(name, "same words", metadata={"created_at": days_ago(9)}) for name in "ab"])
    (first,) = STRATEGY.consolidate(backend)
    assert first["content"] == "same words"
    backend.store(unit("c", "same words"))
    (second,) = STRATEGY.consolidate(backend)
    assert second["metadata"]["consolidated_from"] == ["a", "b", "c"]
    assert second["metadata"]["consolidated_count"] == 3
    assert second["metadata"]["first_created_at"] == first["metadata"]["first_created_at"]
    assert backend.count() == 1


def test_units_of_different_types_are_not_merged_by_similarity(backend: StorageBackend) -> None:
    backend.store_batch(
        [unit("a", "x"), unit("b", "x"), {**unit("c", "x"), "type": "skill"}, {"id": "d", "content": "x"}]
    )
    (merged,) = STRATEGY.consolidate(backend, similarity_threshold=0.2)
    assert merged["metadata"]["consolidated_from"] == ["a", "b"]
    assert sorted(ids_of(backend)) == sorted(["c", "d", merged["id"]])


def test_only_the_given_units_are_merged(backend: StorageBackend) -> None:
    backend.store_batch([unit(name, "same words") for name in "abcd"])
    (merged,) = STRATEGY.consolidate(backend, ["d", "b", "no such"])
    assert sorted(merged["metadata"]["consolidated_from"]) == ["b", "d"]
    assert sorted(ids_of(backend)) == sorted(["a", "c", merged["id"]])


def test_by_type_everything_of_a_type_is_joined_up_to_a_length(backend: StorageBackend) -> None:
    backend.store_batch([unit(f"l{n}", f"lesson {n} " + "x" * 20) for n in range(7)])
    backend.store({**unit("s"), "type": "skill"})
    merged = STRATEGY.consolidate(backend, by="type", max_characters=100)
    assert [one["metadata"]["consolidated_from"] for one in merged] == [["l0", "l1", "l2"], ["l3", "l4", "l5"]]
    assert all(len(one["content"]) <= 100 for one in merged)
    assert sorted(ids_of(backend)) == sorted(["l6", "s", *(one["id"] for one in merged)])


def test_nothing_is_deleted_when_the_merged_text_cannot_be_embedded(tmp_path: Path) -> None:
    given = Given()
    with store_at(tmp_path, given) as store:
        store.store_batch([unit(name, "same words") for name in "ab"])

        def fail(text: str) -> Any:
            raise OSError("the service is down")

        given.__class__ = type("Failing", (Given,), {"__call__": lambda self, text: fail(text)})
        with pytest.raises(EmbeddingError, match="the service is down"):
            STRATEGY.consolidate(store, similarity_threshold=0.9, compare="cosine")
        assert ids_of(store) == ["a", "b"]


def test_a_store_that_keeps_changing_is_left_alone(tmp_path: Path) -> None:
    class Restless(VectorStore):
        def replace_batch(self, delete_ids: Iterable[str], *arguments: Any, **more: Any) -> list[str]:
            raise ConflictError(list(delete_ids)[:1])

    with Restless(tmp_path / "m", Given(), storage_config={"background": False}) as store:
        store.store_batch([unit(f"n{n}", "same words") for n in range(20)])
        with pytest.raises(ConflictError, match="changed since"):
            STRATEGY.consolidate(store)
        assert store.count() == 20


# --- forget ---------------------------------------------------------------------------------------------------------


def test_what_was_read_longest_ago_goes_first_and_never_read_units_before_that(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit(f"n{n}") for n in range(6)])
        for name in ("n4", "n1", "n0"):
            store.retrieve(name)
        store.search_units("n1", 1)
        assert store.access_order("lru", 10) == ["n2", "n3", "n5", "n4", "n0", "n1"]
        assert STRATEGY.apply_forgetting(store, "lru", 4) == (4, ["n2", "n3", "n5", "n4"])
        assert ids_of(store) == ["n0", "n1"]


def test_what_was_read_least_often_goes_first(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit(f"n{n}") for n in range(4)])
        for name, times in (("n0", 3), ("n2", 1), ("n1", 2)):
            for _ in range(times):
                store.search(name, 1)
        assert store.access_order("lfu", 10) == ["n3", "n2", "n1", "n0"]
        assert STRATEGY.apply_forgetting(store, "lfu", 2).ids == ["n3", "n2"]


def test_forgetting_at_random_follows_its_seed(backend: StorageBackend) -> None:
    names = [f"n{n}" for n in range(30)]
    backend.store_batch([unit(name) for name in names])
    said = [STRATEGY.apply_forgetting(backend, "random", 5, seed=seed, dry_run=True).ids for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    assert said[0] == random.Random(1).sample(sorted(names), 5)
    STRATEGY.apply_forgetting(backend, "random", 5, seed=1)
    assert set(ids_of(backend)) == set(names) - set(said[0])


@pytest.mark.parametrize(("units", "count", "gone"), [(25, None, 2), (3, None, 1), (5, 0, 0), (5, 9, 5)])
def test_without_a_count_a_tenth_goes(backend: StorageBackend, units: int, count: int | None, gone: int) -> None:
    backend.store_batch([unit(f"n{n}") for n in range(units)])
    removed = STRATEGY.apply_forgetting(backend, count=count)
    assert removed == (gone, [f"n{n}" for n in range(gone)])


def test_a_backend_without_access_figures_forgets_by_age_and_says_so() -> None:
    plain = open_scratch()
    plain.store_batch([unit(f"n{n}") for n in range(3)])
    removed = STRATEGY.apply_forgetting(plain, "lfu", 1)
    assert (removed.ids, removed.notes) == (["n0"], {"by": "age"})


@pytest.mark.parametrize(("strategy", "count"), [("fifo", 1), ("lru", -1), ("lru", 1.5), ("lru", True)])
def test_forgetting_refuses_what_it_does_not_know(backend: StorageBackend, strategy: str, count: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"strategy|count"):
        STRATEGY.apply_forgetting(backend, strategy, count)


# --- access figures -------------------------------------------------------------------------------------------------


def test_reads_are_remembered_over_closing_and_deletion_forgets_them(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit(f"n{n}") for n in range(4)])
        store.retrieve("n0")
        store.retrieve("n1")
        store.search("n2", 1, record=False)
        store.search_vectors([Given()("n3")], 1)
        store.get_metadata("n3")
    with store_at(tmp_path) as store:
        assert store.access_order("lru", 9) == ["n2", "n3", "n0", "n1"]
        store.update("n0", unit("n0", "other words"))
        assert store.access_order("lru", 9) == ["n2", "n3", "n0", "n1"]
        store.delete("n1")
        store.store(unit("n1"))
        assert store.access_order("lru", 9) == ["n2", "n3", "n1", "n0"]
        store.clear()
        store.store_batch([unit("n1"), unit("n0")])
        assert store.access_order("lru", 9) == ["n1", "n0"]


def test_reading_writes_nothing_and_the_next_write_takes_the_reads_along(tmp_path: Path, writes: list[str]) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit(f"n{n}") for n in range(10)])
        writes.clear()
        for _ in range(101):
            store.search("n1", 10)
        assert writes == []
        store.store(unit("late"))
        assert writes.count("end") <= 2
        with store_at(tmp_path) as other:
            assert set(other.access_counts().values()) == {101}


def test_the_background_writes_reads_down(tmp_path: Path) -> None:
    with store_at(tmp_path, background=True) as store, store_at(tmp_path) as other:
        store.store_batch([unit(f"n{n}") for n in range(10)])
        for _ in range(100):
            store.search("n1", 10)
        deadline = time.monotonic() + 30
        while not other.access_counts():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert set(other.access_counts().values()) == {100}


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_reads_count_although_another_writes_just_then(tmp_path: Path, policy: Any) -> None:
    with store_at(tmp_path, auto_prune=policy, max_memory_units=10) as store, store_at(tmp_path) as other:
        store.store_batch([unit(f"n{n}") for n in range(8)])

        def while_another_writes(act: Callable[[], object]) -> object:
            with ThreadPoolExecutor(1) as pool:
                with other._open.records.write():
                    running = pool.submit(act)
                    time.sleep(0.1)
                return running.result()

        store.retrieve("n0")
        assert while_another_writes(lambda: store.access_order(policy, 1)) == ["n1"]
        store.retrieve("n1")
        assert while_another_writes(store.access_counts) == {"n0": 1, "n1": 1}
        store.retrieve("n2")
        while_another_writes(lambda: store.store_batch([unit(f"new{n}") for n in range(3)]))
        assert {"n0", "n1", "n2"} <= set(ids_of(store))


def test_reads_that_cannot_be_written_down_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_at(tmp_path) as store:
        store.store(unit("a"))
        records = store._open.records
        original = records.write

        def full(**_options: Any) -> Any:
            raise StorageFullError("the disk is full")

        monkeypatch.setattr(records, "write", full)
        for _ in range(10_500):
            assert store.retrieve("a") is not None
        assert store.statistics()["event_totals"]["access-lost"] == 1
        monkeypatch.setattr(records, "write", original)
        assert store.access_counts() == {"a": 500}


@pytest.mark.parametrize("background", [False, True])
def test_closing_waits_for_no_other_writer_and_says_what_it_drops(
    tmp_path: Path, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memevolve_gpu")
    with store_at(tmp_path) as other:
        other.store(unit("a"))
        store = store_at(tmp_path, background=background, lock_timeout=10**6)
        for _ in range(1100):
            store.search("a", 1)
        with ThreadPoolExecutor(1) as pool, other._open.records.write():
            pool.submit(store.close).result(timeout=60)
        assert "access-lost: 1 units' access figures: another process was writing" in caplog.text
        assert "queries-unsaved" in caplog.text


def test_an_operation_that_cannot_be_noted_is_done_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_arguments: Any) -> Any:
        raise StorageFullError("the disk is full")

    monkeypatch.setattr(VectorStore, "register_management_operation", full)
    with store_at(tmp_path) as store:
        store.store_batch([unit("a"), unit("b")])
        assert STRATEGY.prune(store, {"max_count": 1}) == (1, ["a"])
    assert "prune is done" in caplog.text


def test_two_processes_add_their_reads_up(tmp_path: Path) -> None:
    with store_at(tmp_path) as one, store_at(tmp_path) as other:
        one.store_batch([unit("a"), unit("b"), unit("c")])
        for store, names in ((one, "aab"), (other, "bbc")):
            for name in names:
                store.retrieve(name)
        other.run_maintenance()
        assert one.access_order("lfu", 3) == ["c", "a", "b"]


def test_a_read_only_store_is_read_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit("a"), unit("b")])
        monkeypatch.setattr(store._open.records, "read_only", True)
        store.retrieve("a")
        assert store.access_order("lru", 2) == ["a", "b"]
        monkeypatch.setattr(store._open.records, "write", None)  # nothing may try


def test_every_id_can_be_read(tmp_path: Path) -> None:
    odd = ['a"b', "a.b", "it's", "back\\slash", "new\nline", "tab\t", "größe", "🙂", "\x01", "[0]", "$", "\u2028", "0"]
    with store_at(tmp_path) as store:
        store.store_batch([unit(name) for name in odd])
        store.record_access(odd)
        store.record_access(["no such", "\ud800", 7])  # type: ignore[list-item]
        assert store.access_counts() == dict.fromkeys(odd, 1)
        assert set(store.vectors_of([*odd, "\ud800"])) == set(odd)
        assert set(store.retrieve_batch([*odd, 7])) == set(odd)  # type: ignore[list-item]
        assert STRATEGY.apply_forgetting(store, "lru", len(odd))[0] == len(odd)


def test_an_order_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        with pytest.raises(InvalidQueryError, match="kind"):
            store.access_order("mru", 1)  # type: ignore[arg-type]
        with pytest.raises(InvalidQueryError, match="limit"):
            store.access_order("lru", -1)


def test_merged_units_are_not_the_first_to_be_forgotten(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit("a", "same"), unit("b", "same"), unit("c"), unit("d")])
        (merged,) = STRATEGY.consolidate(store)
        assert store.access_order("lru", 9)[-1] == merged["id"]


# --- health and the manager -----------------------------------------------------------------------------------------


def test_health_figures(backend: StorageBackend) -> None:
    dates = [days_ago(days) for days in (3, 2, 1)]
    backend.store_batch([unit(f"n{n}", "same", metadata={"created_at": date}) for n, date in enumerate(dates)])
    backend.store({"id": "s", "type": "skill", "content": "other", "metadata": {"created_at": days_ago(0)}})
    backend.store({"id": "x", "content": "more"})
    metrics = STRATEGY.get_health_metrics(backend)
    assert metrics.total_units == 5
    assert metrics.unit_types_distribution == {"lesson": 3, "skill": 1, "unknown": 1}
    assert metrics.oldest_unit_timestamp == dates[0]
    assert metrics.newest_unit_timestamp == (backend.get_metadata("x") or {})["created_at"]
    assert (metrics.duplicate_count, metrics.duplicate_count_is_exact) == (2, True)
    assert metrics.average_unit_size == metrics.total_size_bytes / 5 > 30
    assert metrics.as_dict()["last_operation"] == "metrics"


def test_health_of_nothing(backend: StorageBackend) -> None:
    metrics = STRATEGY.get_health_metrics(backend)
    assert (metrics.total_units, metrics.average_unit_size, metrics.unit_types_distribution) == (0, 0.0, {})
    assert metrics.oldest_unit_timestamp is None


def test_duplicates_of_a_large_memory_are_estimated(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit(f"n{n}", f"text{n % 150}") for n in range(300)])
        metrics = STRATEGY.get_health_metrics(store)
        assert not metrics.duplicate_count_is_exact
        assert metrics.duplicate_count == 150


def test_a_store_describes_itself_without_reading_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit(f"n{n}") for n in range(700)])

        def refuse(*_arguments: Any, **_more: Any) -> None:
            raise AssertionError("units are read")

        for name in ("retrieve_all", "units", "export_rows", "retrieve", "retrieve_batch"):
            monkeypatch.setattr(store, name, refuse)
        for name in ("units", "units_at", "get", "get_many"):
            monkeypatch.setattr(store._open.records, name, refuse)
        assert STRATEGY.get_health_metrics(store).unit_types_distribution == {"lesson": 700}


def test_the_inventory_follows_every_change(tmp_path: Path, rng: np.random.Generator) -> None:
    kinds: list[Any] = ["lesson", "skill", None, 7, ["tool", "skill"], {"a": "b"}]
    with store_at(tmp_path) as store:
        for step in range(60):
            name = f"n{rng.integers(12)}"
            kind = kinds[rng.integers(len(kinds))]
            act = rng.integers(4)
            if act == 0:
                store.delete(name)
            elif act == 1 and store.exists(name):
                store.update(name, {"content": name, "type": kind})
            elif act == 2 and step % 20 == 19:
                store.clear()
            else:
                store.store({"id": name, "content": f"{name} {step}", "type": kind})
            if step % 7 == 0:
                store._open.records.checkpoint()
            expected: dict[str, int] = {}
            for one in store.units():
                listed = one["type"] if isinstance(one["type"], list) else [one["type"]]
                for value in listed:
                    if isinstance(value, str):
                        expected[value] = expected.get(value, 0) + 1
            types = store.inventory()["types"]
            unknown = types.pop("unknown", 0)
            assert types == expected
            assert unknown == max(0, store.count() - sum(expected.values()))


def test_the_manager_remembers_what_it_did(backend: StorageBackend) -> None:
    manager = MemoryManager(backend, STRATEGY)
    twins(backend)
    manager.deduplicate(0.95)
    manager.prune({"max_count": 3})
    manager.apply_forgetting("random", 1, seed=3)
    manager.consolidate(by="type")
    history = manager.get_operation_history()
    assert [entry["operation"] for entry in history] == ["deduplicate", "prune", "forget", "consolidate"]
    assert history[0]["details"]["count"] == 4
    assert history[1]["details"] == {"count": 1, "unit_ids": ["a1"], "criteria": {"max_count": 3}}
    assert history[2]["details"]["seed"] == 3
    assert history[3]["details"]["count"] == 1
    assert manager.get_health_metrics().last_operation == "consolidate"
    assert manager.get_health_metrics().last_operation_time == history[3]["timestamp"]
    manager.clear_history()
    assert manager.get_operation_history() == []


def test_the_manager_s_memory_is_bounded(backend: StorageBackend) -> None:
    manager = MemoryManager(backend, STRATEGY)
    backend.store_batch([unit(f"n{n}") for n in range(300)])
    manager.prune({"max_count": 0})
    assert len(manager.get_operation_history()[0]["details"]["unit_ids"]) == 100
    for _ in range(1200):
        manager.prune()
    assert len(manager.get_operation_history()) == 1000


def test_the_manager_takes_another_strategy() -> None:
    class Timid(SimpleManagementStrategy):
        def prune(self, *arguments: Any, **more: Any) -> Any:
            return 0, []

    plain = open_scratch()
    aged(plain)
    manager = MemoryManager(plain, STRATEGY)
    manager.set_strategy(Timid())
    assert manager.prune({"max_count": 0}) == (0, [])
    assert plain.count() == 10
