"""Copying a store into another one: nothing is lost, whatever happens on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import COMMAND, Forks
from support import FakeEmbedder

from memevolve_gpu.components.store import VectorStore
from memevolve_gpu.components.store.copy import PAGE, copy_store
from memevolve_gpu.errors import CapacityError, ConfigurationError, DimensionMismatchError, StorageError

DIM = 12

Open = Callable[..., VectorStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    stores: list[VectorStore] = []

    def make(name: str, dim: int = DIM, **settings: Any) -> VectorStore:
        config = {"background": False, "max_memory_units": 5_000, **settings}
        stores.append(VectorStore(tmp_path / name, FakeEmbedder(dim), storage_config=config))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def filled(store: VectorStore, count: int, start: int = 0) -> VectorStore:
    units = [
        {"id": f"u{i}", "type": "skill", "content": f"fact {i} of {i % 7}", "tags": [f"t{i % 3}"], "metadata": {"n": i}}
        for i in range(start, start + count)
    ]
    store.store_batch(units)
    return store


def contents(store: VectorStore) -> list[tuple[Any, bytes]]:
    return [(unit, vector.tobytes()) for unit, vector in store.export_rows()]


class Meddling:
    """A source that does something at the beginning of a chosen page of its export."""

    def __init__(self, store: VectorStore, at: int, act: Callable[[], None], times: int = 1) -> None:
        self._store, self._at, self._act, self._times = store, at, act, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def export_rows(self, page_size: int = 1000) -> Iterator[Any]:
        for number, row in enumerate(self._store.export_rows(page_size)):
            if number == self._at and self._times:
                self._times -= 1
                self._act()
            yield row


def test_a_copy_has_every_unit_id_vector_and_the_order(opened: Open) -> None:
    source, target = filled(opened("a"), 300), opened("b")
    told: list[tuple[str, float]] = []
    report = copy_store(source, target, page_size=64, progress=lambda stage, share: told.append((stage, share)))
    assert contents(target) == contents(source)
    assert (report.copied, report.present, report.replaced, report.removed, report.others) == (300, 0, 0, 0, 0)
    assert (report.count, report.vectors_compared, report.passes) == (300, 300, 1)
    assert report.recall_before == report.recall_after == 1.0
    assert {stage for stage, _ in told} == {"copying", "verifying"}
    assert [share for stage, share in told if stage == "copying"][-1] == 1.0


def test_a_copy_that_is_repeated_writes_nothing(opened: Open) -> None:
    source, target = filled(opened("a"), 50), opened("b")
    copy_store(source, target)
    before = target.change_number
    report = copy_store(source, target)
    assert (report.copied, report.present) == (0, 50)
    assert target.change_number == before


@pytest.mark.parametrize("at", [0, 1, 99, 100, 199])
def test_an_interrupted_copy_goes_on_where_it_was(opened: Open, at: int) -> None:
    source, target = filled(opened("a"), 200), opened("b")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_store(Meddling(source, at, interrupt), target, page_size=50)  # type: ignore[arg-type]
    there = target.count()
    assert there == at // 50 * 50
    report = copy_store(source, target, page_size=50)
    assert (report.copied, report.present) == (200 - there, there)
    assert contents(target) == contents(source)


def test_changes_of_the_source_meanwhile_are_followed(opened: Open) -> None:
    source, target = filled(opened("a"), 200), opened("b")

    def change() -> None:
        source.update("u3", {"content": "changed after it was copied"})
        source.update("u190", {"content": "changed before it was copied"})
        source.delete("u5")
        source.delete("u180")
        source.store({"id": "new", "content": "came meanwhile"})

    report = copy_store(Meddling(source, 120, change), target, page_size=50)  # type: ignore[arg-type]
    assert sorted(map(repr, contents(target))) == sorted(map(repr, contents(source)))
    assert report.removed == 1
    assert report.passes >= 2


def test_a_source_that_never_stops_changing_is_an_error_that_says_so(opened: Open) -> None:
    source, target = filled(opened("a"), 5), opened("b")

    def change() -> None:
        source.update("u1", {"content": f"version {source.change_number}"})

    meddling = Meddling(source, 0, change, times=10**6)
    with pytest.raises(StorageError, match="stop its writers"):
        copy_store(meddling, target)  # type: ignore[arg-type]


def test_other_units_of_the_target_are_left_alone(opened: Open) -> None:
    source, target = filled(opened("a"), 40), filled(opened("b"), 10, start=1000)
    kept = contents(target)
    report = copy_store(source, target)
    assert report.others == 10
    assert contents(target) == kept + contents(source)


def test_a_unit_under_a_taken_id_is_refused_before_anything_is_written(opened: Open) -> None:
    source, target = filled(opened("a"), 40), opened("b")
    target.store({"id": "u39", "content": "somebody else's"})
    before = contents(target)
    with pytest.raises(ConfigurationError, match=r"1 ids .*'u39'.*nothing was written"):
        copy_store(source, target)
    assert contents(target) == before
    report = copy_store(source, target, replace=True)
    assert (report.copied, report.replaced) == (39, 1)
    assert sorted(map(repr, contents(target))) == sorted(map(repr, contents(source)))


def test_a_vector_that_differs_is_a_difference(opened: Open) -> None:
    source, target = filled(opened("a"), 3), opened("b")
    units = source.retrieve_all()
    target.store_batch(units, np.eye(3, DIM, dtype=np.float32))
    with pytest.raises(ConfigurationError, match="3 ids"):
        copy_store(source, target)


def test_a_target_that_does_not_keep_what_it_is_given_is_found_out(opened: Open) -> None:
    class Forgetful:
        def __init__(self, store: VectorStore) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        def store_batch(self, units: list[Any], embeddings: Any = None, **_times: Any) -> list[str]:
            return self._store.store_batch(units[:-1], embeddings[:-1])

    source, target = filled(opened("a"), 20), opened("b")
    with pytest.raises(StorageError, match="u19"):
        copy_store(source, Forgetful(target))  # type: ignore[arg-type]


def test_stores_that_do_not_fit_are_refused(opened: Open, tmp_path: Path) -> None:
    source = filled(opened("a"), 20)
    with pytest.raises(ConfigurationError, match="metric is cosine, the source's is l2"):
        copy_store(source, opened("cosine", metric="cosine"))
    with pytest.raises(DimensionMismatchError):
        copy_store(source, opened("wide", dim=DIM + 1))
    with pytest.raises(CapacityError, match="MAX_MEMORY_UNITS"):
        copy_store(source, opened("small", max_memory_units=19))


def test_an_empty_store_can_be_copied(opened: Open) -> None:
    report = copy_store(opened("a"), opened("b"))
    assert (report.count, report.recall_before) == (0, None)


def test_more_than_a_page_is_copied(opened: Open) -> None:
    source, target = filled(opened("a"), PAGE + 5), opened("b")
    assert copy_store(source, target).count == PAGE + 5
    assert contents(target) == contents(source)


def test_the_command_copies_there_and_back(opened: Open, tmp_path: Path, commands: Forks) -> None:
    source = filled(opened("a"), 30)
    expected = contents(source)
    source.close()
    assert commands(COMMAND, "copy", "a", "b").returncode == 0
    back = commands(COMMAND, "copy", "b", "c", "--json")
    document = json.loads(back.stdout)
    assert (document["copied"], document["count"], document["others"]) == (30, 30, 0)
    assert contents(opened("c")) == expected
    again = commands(COMMAND, "copy", "b", "./b")
    assert (again.returncode, "same store" in again.stderr) == (2, True)
    assert commands(COMMAND, "copy", "nowhere", "d").returncode == 3
    assert not list(tmp_path.glob("d*"))
