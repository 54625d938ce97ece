"""A store that grows: its index is extended, its delta buffer and its log stay short, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endurance import DIM, Model, embed, verify

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.errors import StorageFullError
from memevolve_gpu.index import vector_table
from memevolve_gpu.live import rebuild, scheduler, snapshot_writer
from memevolve_gpu.live.filter_cache import FilterCache
from memevolve_gpu.live.view import ViewFilter
from memevolve_gpu.live.worker import SearchYield

DELTA, QUIET = 40, 10
SEED = 20_261_129
KINDS = ["flat", "ivf", "hnsw", "auto"]
Open = Callable[..., VectorStore]


def unit(number: int, content: str = "") -> dict[str, Any]:
    return {"id": f"id{number}", "content": content or f"w{number % 7} fact {number}", "type": "skill"}


def units(start: int, end: int) -> list[dict[str, Any]]:
    return [unit(number) for number in range(start, end)]


def model_of(*batches: list[dict[str, Any]]) -> Model:
    return {one["id"]: one for batch in batches for one in batch}


@pytest.fixture(autouse=True)
def _short_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few rows be too many, so that small stores do what large ones do."""
    monkeypatch.setattr(scheduler, "DELTA_ROWS", DELTA)
    monkeypatch.setattr(scheduler, "DELTA_MOST", DELTA)
    monkeypatch.setattr(scheduler, "QUIET_ROWS", QUIET)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Open]:
    opened: list[VectorStore] = []

    def make(name: str = "store", **settings: Any) -> VectorStore:
        chosen = {"index_type": "ivf", "min_training_units": 24, "background": False, "max_memory_units": 10_000}
        config = StorageConfig(**{**chosen, **settings})
        opened.append(VectorStore(tmp_path / name, embed, DIM, storage_config=config))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def grown(store: VectorStore, start: int, end: int) -> list[str]:
    store.store_batch(units(start, end))
    actions: list[str] = store.run_maintenance()["actions"]
    return actions


@pytest.mark.parametrize("index_type", KINDS)
def test_rows_are_put_behind_those_of_the_body(open_store: Open, index_type: str) -> None:
    store = open_store(index_type=index_type)
    grown(store, 0, 300)
    trained, before = store._open.live.view.stats.trained_rows, store._open.live.view.index
    assert grown(store, 300, 345) == [f"extended {before.kind} of 345 rows"]
    after = store._open.live.view
    assert (after.index.n, after.delta_n, after.index.nlist) == (345, 0, before.nlist)
    assert after.stats.trained_rows == trained
    assert store.statistics()["event_totals"].get("reload", 0) == 0
    verify(store, [model_of(units(0, 345))])


@pytest.mark.parametrize("index_type", KINDS)
def test_deaths_and_rows_that_come_meanwhile(
    open_store: Open, index_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(index_type=index_type)
    grown(store, 0, 300)
    extend = rebuild._extended

    def and_meanwhile(*arguments: Any) -> Any:
        built = extend(*arguments)
        store.delete_batch(["id5", "id299", "id310", "id344"])  # of the index, and of the delta buffer
        store.store_batch([unit(6, "w1 another text"), unit(311, "w2 another text"), *units(400, 420)])
        store.delete("id401")
        assert store.count() == 345 - 4 + 20 - 1
        return built

    store.delete_batch(["id7", "id8"])
    store.store_batch(units(300, 345))
    store.store_batch([unit(7), unit(8)])
    monkeypatch.setattr(rebuild, "_extended", and_meanwhile)
    assert store.run_maintenance()["actions"][0].startswith("extended")
    expected = model_of(units(0, 345), units(400, 420))
    expected |= {"id6": unit(6, "w1 another text"), "id311": unit(311, "w2 another text")}
    for gone in ("id5", "id299", "id310", "id344", "id401"):
        del expected[gone]
    verify(store, [expected])
    monkeypatch.undo()
    store.snapshot()
    store.close()
    again = open_store()
    verify(again, [expected])
    assert again.statistics()["event_totals"].get("snapshot-refused", 0) == 0


@pytest.mark.parametrize("index_type", KINDS)
def test_a_snapshot_names_the_dead(open_store: Open, index_type: str) -> None:
    store = open_store(index_type=index_type)
    grown(store, 0, 300)
    store.delete_batch([f"id{number}" for number in range(0, 40, 2)])
    assert grown(store, 300, 345)[0].startswith("extended")
    store.delete("id333")
    view = store._open.live.catch_up()
    assert view.index_dead == 21
    store.snapshot()
    store.close()
    again = open_store(index_type=index_type)
    held = again._open.live.view
    assert (held.index.kind, held.index.n, held.index_dead, held.delta_n) == (view.index.kind, 345, 21, 0)
    expected = model_of(units(0, 345))
    for number in [*range(0, 40, 2), 333]:
        del expected[f"id{number}"]
    verify(again, [expected])
    assert again.statistics()["event_totals"].get("snapshot-refused", 0) == 0


def test_a_long_life_of_appends_and_deaths(open_store: Open) -> None:
    store, expected = open_store(), model_of(units(0, 300))
    grown(store, 0, 300)
    for round_ in range(12):
        start = 300 + 45 * round_
        store.delete_batch([f"id{number}" for number in range(round_, start, 61)])
        for number in range(round_, start, 61):
            expected.pop(f"id{number}", None)
        grown(store, start, start + 45)
        expected |= model_of(units(start, start + 45))
        verify(store, [expected])
    assert store._open.live.view.delta_n <= DELTA


def test_snapshots_are_rare_and_closing_makes_one(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    save = snapshot_writer.Saver.save

    def counted(saver: snapshot_writer.Saver) -> None:
        written.append(saver._live.view.watermark)
        save(saver)

    monkeypatch.setattr(snapshot_writer.Saver, "save", counted)
    store = open_store()
    grown(store, 0, 1000)
    assert len(written) == 1
    extended = [grown(store, start, start + 41)[0] for start in range(1000, 1205, 41)]
    assert all(action.startswith("extended") for action in extended)
    assert len(written) == 2, "once, when 12 % had changed"
    store.close()
    assert len(written) == 3
    again = open_store()
    view = again._open.live.view
    assert (view.index.n, view.delta_n) == (1205, 0)
    again.close()
    assert len(written) == 3, "nothing new to save"


def test_what_was_only_extended_survives_a_crash(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    grown(store, 0, 1000)
    store.delete_batch(["id3", "id999"])
    assert grown(store, 1000, 1045)[0].startswith("extended")
    store.delete_batch(["id4", "id1001"])
    expected = model_of(units(0, 1045))
    for gone in ("id3", "id4", "id999", "id1001"):
        del expected[gone]
    for path in tmp_path.glob("store.*"):
        if not path.name.endswith("-shm"):
            shutil.copyfile(path, tmp_path / path.name.replace("store", "crashed", 1))
    crashed = open_store("crashed")
    verify(crashed, [expected])
    assert crashed._open.live.view.index.n == 1000


def test_the_log_stays_short_whatever_is_written(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_writer, "LOG_KEPT", 20)
    store = open_store()
    grown(store, 0, 200)
    longest = 0
    for turn in range(30):
        if turn % 3 == 0:
            store.store_batch(units(200 + turn * 5, 205 + turn * 5))
        else:  # edits change no vector
            for number in range(8):
                store.update(f"id{number}", {**unit(number), "note": turn})
        store.run_maintenance()
        head = store._open.records.head()
        longest = max(longest, head.last_seq - head.horizon)
    assert longest <= 20 + max(20, 250 // 4) + 8
    store.close()
    again = open_store()
    assert again.statistics()["event_totals"].get("snapshot-refused", 0) == 0
    assert again.count() == 250


def test_new_rows_that_do_not_find_themselves_make_it_train_anew(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    grown(store, 0, 300)
    monkeypatch.setattr(rebuild, "self_hits", lambda *_given, **_more: 0.5)
    assert grown(store, 300, 345)[0].startswith("built ivf")
    verify(store, [model_of(units(0, 345))])


def test_recall_is_measured_again_once_it_has_grown(open_store: Open) -> None:
    store = open_store(adaptive_nlist=False)
    grown(store, 0, 400)
    assert store._open.live.view.stats.measured_rows == 400
    grown(store, 400, 445)
    assert store._open.live.view.stats.measured_rows == 400
    grown(store, 445, 490)
    assert store._open.live.view.stats.measured_rows == 490


def test_a_write_between_the_view_and_its_mask_is_seen(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = open_store(), open_store()
    grown(store, 0, 60)
    original, pending = FilterCache.mask, [unit(number, "between") for number in (100, 101)]

    def mask(self: FilterCache, *arguments: Any) -> tuple[ViewFilter, bool]:
        if pending:
            other.store(pending.pop())
        return original(self, *arguments)

    monkeypatch.setattr(FilterCache, "mask", mask)
    found = store.search("between skill", 2, filters={"type": "skill"})
    assert {unit_id for _, unit_id in found} == {"id100", "id101"}


def test_the_background_keeps_the_tail_short(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "QUIET_SECONDS", 0.1)
    store = open_store(background=True)
    for start in range(0, 600, 20):
        store.store_batch(units(start, start + 20))
    deadline = time.monotonic() + 60
    while store._open.live.view.delta_n > QUIET:
        assert time.monotonic() < deadline, store.statistics()
        time.sleep(0.02)
    verify(store, [model_of(units(0, 600))])


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_maintenance_rests_at_most_as_long_as_it_works() -> None:
    clock = Clock()
    pause = SearchYield(lambda: clock.now, clock, clock.sleep)
    began, worked = clock.now, 0.0
    for _ in range(500):
        clock.now += 0.004
        worked += 0.004
        pause()
    assert 0.6 * worked <= pause.rested <= 1.001 * worked
    assert clock.now - began <= 2 * worked + 0.02


def test_maintenance_does_not_rest_without_searches() -> None:
    clock = Clock()
    pause = SearchYield(lambda: 0.0, clock, clock.sleep)
    for _ in range(50):
        clock.now += 0.01
        pause()
    assert pause.rested == 0.0


def test_found_while_it_grows(open_store: Open) -> None:
    """Views taken before an extension go on answering for their own time."""
    store = open_store()
    grown(store, 0, 300)
    old = store._open.live.view
    query = np.stack([embed("w3 fact 3")])
    before = old.search(query, 10, old.stats.search_params(old.index, 10, 0.95)).ids(0)
    for start in range(300, 525, 45):
        grown(store, start, start + 45)
    assert old.search(query, 10, old.stats.search_params(old.index, 10, 0.95)).ids(0) == before


def test_rows_that_wait_for_a_training_are_put_behind_the_body_first(open_store: Open) -> None:
    store = open_store()
    store.store_batch(units(0, 300))
    store.run_maintenance()
    store.store_batch(units(300, 1200))
    actions = [action.split()[0] for action in store.run_maintenance()["actions"]]
    assert actions == ["extended", "built"]
    assert store.statistics()["tail_rows"] == 0
    verify(store, [model_of(units(0, 1200))])


def test_opening_compares_the_sampled_vectors_only(open_store: Open) -> None:
    store = open_store(index_type="flat")
    grown(store, 0, 6000)
    store.snapshot()
    store.close()
    unchecked = open_store(index_type="flat")._open.live.view.index.table._unchecked
    assert unchecked is not None
    assert 0 < unchecked._held.sum() < 0.6 * len(unchecked._held)


@pytest.mark.parametrize("died", [0, 1500])
def test_rows_in_spills_live_and_die_like_those_in_memory(
    open_store: Open, monkeypatch: pytest.MonkeyPatch, died: int
) -> None:
    """A bulk load, appended and trained again, compacted, and read from the records, with every vector in a spill."""
    monkeypatch.setattr(vector_table, "SPILLED_BYTES", 4096)
    store, expected = open_store(), model_of(units(0, 3000))
    store.store_batch(units(0, 2000))
    store.run_maintenance()
    store.store_batch(units(2000, 3000))
    store.delete_batch([f"id{number}" for number in range(died)])
    for number in range(died):
        del expected[f"id{number}"]
    store.run_maintenance()
    verify(store, [expected])
    live = store._open.live
    assert live.view.index.table.resident_bytes == 0
    store.close()
    live.snapshot_path.unlink()
    again = open_store()
    verify(again, [expected])
    assert again._open.live.view.index.table.resident_bytes == 0


@pytest.mark.parametrize("died", [0, 1])
def test_vectors_for_which_the_disk_has_no_room_do_not_fill_the_memory_beyond_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died: int
) -> None:
    """They wait where they are, and the rest of the limit is left to writes."""
    monkeypatch.setattr(vector_table, "SPILLED_BYTES", 4096)
    free, limit, dim = types.SimpleNamespace(f_frsize=1, f_bavail=10**12), 2, 256
    monkeypatch.setattr(os, "fstatvfs", lambda _file: free)
    vectors = np.random.default_rng(SEED).standard_normal((4100, dim)).astype(np.float32)
    config = StorageConfig(index_type="flat", background=False, max_memory_units=10**6, max_memory_mb=limit)
    with VectorStore(tmp_path / "m", None, dim, storage_config=config) as store:
        for start in range(0, 4000, 1000):
            store.store_batch(units(start, start + 1000), vectors[start : start + 1000])
        store.run_maintenance()
        free.f_bavail = 0
        store.delete_batch(["id0"] * died)
        store.store_batch(units(4000, 4100), vectors[4000:])
        if died:  # all others are copied
            with pytest.raises(StorageFullError, match="the disk has no room"):
                store.retrain()
        else:  # the first are mapped from the snapshot again
            store.run_maintenance()
        assert store._open.live.nbytes < limit << 20
        for row in (1, 4050):
            assert store.search_vectors(vectors[row : row + 1], 1)[1] == [[f"id{row}"]]
        free.f_bavail = 10**12
        store.run_maintenance()
        assert store.statistics()["tail_rows"] == 0


def test_a_store_that_loses_and_gains_rows_takes_no_more_candidates(tmp_path: Path) -> None:
    """Candidates grow with the rows that they were calibrated for, not with every row that ever came."""
    n, dim, rng = 20_000, 64, np.random.default_rng(SEED)
    config = StorageConfig(index_type="ivf", background=False, max_memory_units=10**6, sample_queries=False)
    with VectorStore(tmp_path / "m", None, dim, storage_config=config) as store:

        def add(start: int, end: int) -> str:
            store.store_batch(units(start, end), rng.standard_normal((end - start, dim)).astype(np.float32))
            return store.run_maintenance()["actions"][0]

        add(0, n)
        live = store._open.live
        before = live.view.stats.search_params(live.view.index, 10, 0.95)
        assert before.rerank
        for turn in range(4):
            store.delete_batch([f"id{number}" for number in range(4000 * turn, 4000 * turn + 4000)])
            assert store.run_maintenance()["actions"][0].startswith("built ivf of 16000")
            assert add(n + 4000 * turn, n + 4000 * turn + 4000).startswith("extended ivf of 20000")
        assert live.view.stats.search_params(live.view.index, 10, 0.95) == before


def test_vectors_read_from_the_records_into_a_spill_are_mapped_at_the_next_opening(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_table, "SPILLED_BYTES", 4096)
    monkeypatch.setattr(snapshot_writer, "MOVED_BYTES", 4096)
    store = open_store(index_type="flat")
    store.store_batch(units(0, 600))
    store.run_maintenance()
    path = store._open.live.snapshot_path
    store.close()
    path.unlink()
    second = open_store(index_type="flat")
    assert second.run_maintenance()["actions"] == ["saved the vectors, to map them"]
    assert second.run_maintenance()["actions"] == []
    second.close()
    third = open_store(index_type="flat")
    assert third.statistics()["event_totals"].get("snapshot-loaded") == 1
    verify(third, [model_of(units(0, 600))])
