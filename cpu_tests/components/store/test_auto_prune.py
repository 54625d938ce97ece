"""AUTO_PRUNE: the store makes room by itself, in the transaction of the write."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_kit import Given, days_ago, store_at, unit

from memevolve_gpu import CapacityError, EmbeddingError, StorageConfig, VectorStore
from memevolve_gpu.errors import LockTimeoutError
from memevolve_gpu.utils.config import serve_memevolve

SEED = 20_261_128
MANAGES = "MEMEVOLVE_MANAGEMENT_ENABLE_AUTO_MANAGEMENT"


def aged(names: str) -> list[dict[str, Any]]:
    """One unit for each letter, written a day after the one before it, all of them long ago."""
    return [unit(name, metadata={"created_at": days_ago(100 - day)}) for day, name in enumerate(names)]


def held(store: VectorStore) -> str:
    return "".join(sorted(one["id"] for one in store.retrieve_all()))


def pruned(store: VectorStore) -> list[Any]:
    return [event for event in store.statistics()["events"] if event["kind"] == "auto-pruned"]


def test_off_is_the_default_and_deletes_nothing(tmp_path: Path) -> None:
    with store_at(tmp_path, max_memory_units=10) as store:
        store.store_batch(aged("abcdefghij"))
        with pytest.raises(CapacityError):
            store.store(unit("k"))
        assert held(store) == "abcdefghij"
        assert store.config.auto_prune == "off"


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("oldest", "cdefghi"),
        ("lru", "aefghib"),  # a and b were read now, the others written long ago
        ("lfu", "aefghib"),
    ],
)
def test_the_ninth_of_ten_leaves_seven_by_policy(tmp_path: Path, policy: str, left: str) -> None:
    with store_at(tmp_path, max_memory_units=10, auto_prune=policy) as store:
        for one in aged("abcdefgh"):
            store.store(one)
        store.retrieve("a")
        store.retrieve("b")
        assert held(store) == "abcdefgh", "below the threshold all stay"
        assert store.store(unit("i")) == "i"
        assert held(store) == "".join(sorted(left))


def test_what_was_just_written_outlives_what_was_read_long_ago(tmp_path: Path) -> None:
    """A new unit that nobody has read yet is not the first to go: writing counts as use."""
    with store_at(tmp_path, max_memory_units=10, auto_prune="lru") as store:
        store.store_batch(aged("abcdef"))
        for name in "abcdef":
            store.retrieve(name)
    future = {"created_at": days_ago(-1)}
    with store_at(tmp_path, max_memory_units=10, auto_prune="lru") as store:
        store.store_batch([unit("x", metadata=future), unit("y", metadata=future)])
        store.store(unit("z"))
        assert {"x", "y", "z"} <= set(held(store))


@pytest.mark.parametrize("policy", ["lru", "lfu", "oldest"])
def test_one_event_one_line_and_the_history_tell_counts_and_ids(
    tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    with store_at(tmp_path, max_memory_units=10, auto_prune=policy, warning_threshold=0.9) as store:
        store.store_batch(aged("abcdefgh"))
        with caplog.at_level(logging.INFO, logger="memevolve_gpu"):
            store.store(unit("i"))
        (event,) = pruned(store)
        figures = event["figures"]
        assert (figures["count_before"], figures["count_after"], figures["removed"]) == (8, 6, 2)
        assert figures["ids"] == ["a", "b"]
        assert figures["policy"] == policy
        (line,) = [record.getMessage() for record in caplog.records if "auto-pruned" in record.getMessage()]
        assert "a, b" in line
        assert "8 to 6 of at most 10" in line
        entry = store.statistics()["management"][-1]
        assert (entry["operation"], entry["removed"], entry["details"]["policy"]) == ("prune", 2, policy)
        assert [store.search(name, 20)[0][1] for name in "cdi"] == ["c", "d", "i"]
        json.dumps(store.statistics())


def test_many_ids_are_cut_in_the_line_and_whole_in_the_event(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with store_at(tmp_path, max_memory_units=1000, auto_prune="oldest") as store:
        store.store_batch([unit(f"u{number}") for number in range(899)])
        store.store(unit("last"))
        (event,) = pruned(store)
        assert event["figures"]["ids"] == [f"u{number}" for number in range(200)]
        assert "u99 and 100 more" in caplog.text
        assert "u100" not in caplog.text
        assert store.count() == 700


def test_replacing_and_updating_prune_nothing_and_the_units_of_a_batch_stay(tmp_path: Path) -> None:
    with store_at(tmp_path, max_memory_units=10, auto_prune="oldest") as store:
        store.store_batch(aged("abcdefgh"))
        store.store({**unit("a"), "content": "again"})
        store.update("b", unit("b", "again"))
        assert held(store) == "abcdefgh"
        store.store_batch([unit("c", "again"), unit("d", "again"), unit("x"), unit("y")])
        assert store.count() == 7
        assert {"c", "d", "x", "y"} <= set(held(store))


def test_a_large_batch_takes_no_more_than_it_needs_and_one_too_large_takes_nothing(tmp_path: Path) -> None:
    with store_at(tmp_path, max_memory_units=10, auto_prune="oldest") as store:
        store.store_batch(aged("abcdef"))
        with pytest.raises(CapacityError):
            store.store_batch([unit(f"x{number}") for number in range(11)])
        assert held(store) == "abcdef"
        store.store_batch([unit(f"x{number}") for number in range(8)])
        assert store.count() == 8
        store.store_batch([unit(f"y{number}") for number in range(10)])
        assert sorted(one["id"] for one in store) == [f"y{number}" for number in range(10)]


def test_a_write_that_fails_prunes_nothing(tmp_path: Path) -> None:
    def fails(text: str) -> Any:
        if text.startswith("bad"):
            raise ValueError("no")
        return Given()(text)

    with store_at(tmp_path, fails, max_memory_units=10, auto_prune="oldest", max_memory_mb=0.0014) as store:
        store.store_batch(aged("abcdefgh"))
        with pytest.raises(EmbeddingError):
            store.store(unit("bad"))
        with pytest.raises(CapacityError, match="MAX_MEMORY_MB"):
            store.store_batch([unit(f"x{number}") for number in range(7)])
        assert held(store) == "abcdefgh"
        assert pruned(store) == []


def test_the_prune_and_the_write_are_one_transaction(tmp_path: Path) -> None:
    """Another process sees the store before both or after both."""
    with store_at(tmp_path, max_memory_units=10, auto_prune="oldest") as store, store_at(tmp_path) as other:
        store.store_batch(aged("abcdefgh"))
        before = other.change_number
        store.replace_batch(["h"], [unit("i"), unit("j")])
        assert held(other) == "cdefgij"
        assert other.change_number > before
        assert other.check() == []


@given(
    limit=st.integers(1, 40),
    batches=st.lists(st.integers(1, 12), max_size=20),
    threshold=st.sampled_from([0.5, 0.9, 1.0]),
    target=st.sampled_from([0.1, 0.5]),
)
@settings(max_examples=25, deadline=None)
def test_the_target_and_the_limit_hold_whatever_comes(
    tmp_path_factory: pytest.TempPathFactory, limit: int, batches: list[int], threshold: float, target: float
) -> None:
    shares = {"warning_threshold": threshold, "prune_threshold": threshold, "prune_target": target}
    path = tmp_path_factory.mktemp("any")
    with store_at(path, max_memory_units=limit, auto_prune="oldest", durability="normal", **shares) as store:
        number = 0
        for size in batches:
            before, names = store.count(), [f"u{number + one}" for one in range(size)]
            number += size
            if size > limit:
                with pytest.raises(CapacityError):
                    store.store_batch([unit(name) for name in names])
                assert store.count() == before
                continue
            store.store_batch([unit(name) for name in names])
            assert all(store.exists(name) for name in names)
            assert store.count() <= limit
            assert store.count() >= min(before + size, math.ceil(target * limit - 1e-9))


class Theirs:
    """Another program's storage configuration."""

    max_units = 10


class TestUnderTheDropIn:
    @pytest.fixture(autouse=True)
    def served(self) -> Iterator[None]:
        serve_memevolve(True)
        yield
        serve_memevolve(False)

    @pytest.mark.parametrize(("value", "policy"), [("true", "lru"), ("On", "lru"), ("false", "off"), ("", "off")])
    def test_memevolve_s_switch_decides(self, monkeypatch: pytest.MonkeyPatch, value: str, policy: str) -> None:
        monkeypatch.setenv(MANAGES, value)
        assert StorageConfig.adopt(Theirs()).auto_prune == policy
        assert StorageConfig.adopt(None).auto_prune == policy

    def test_its_file_counts_and_the_environment_goes_before_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Path(".env").write_text(f"{MANAGES}=true\n", encoding="utf-8")
        monkeypatch.delenv(MANAGES, raising=False)
        assert StorageConfig.adopt(Theirs()).auto_prune == "lru"
        monkeypatch.setenv(MANAGES, "false")
        assert StorageConfig.adopt(Theirs()).auto_prune == "off"

    def test_what_was_chosen_stays_and_our_own_configurations_are_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(MANAGES, "true")
        assert StorageConfig.adopt({"max_units": 10}).auto_prune == "off"
        assert StorageConfig.adopt(StorageConfig()).auto_prune == "off"
        monkeypatch.setenv("MEMEVOLVE_STORAGE_AUTO_PRUNE", "off")
        assert StorageConfig.adopt(Theirs()).auto_prune == "off"

    def test_a_store_that_memevolve_makes_does_not_fill_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(MANAGES, "true")
        monkeypatch.setenv("MEMEVOLVE_STORAGE_BACKGROUND", "false")
        with VectorStore(os.fspath(tmp_path / "vector"), Given(), 16, "flat", Theirs()) as store:
            for number in range(30):
                store.store(unit(f"u{number}"))
            assert 7 <= store.count() < 9
            assert store.exists("u29")
        serve_memevolve(False)
        assert StorageConfig.adopt(Theirs()).auto_prune == "off"


def test_what_was_just_read_stays_although_another_process_was_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that could not be written in time are written by the transaction that deletes."""
    with store_at(tmp_path, max_memory_units=10, auto_prune="lru") as store:
        store.store_batch(aged("abcdefgh"))
        records = store._open.records
        original = records.write

        def busy(**options: Any) -> Any:
            if options.get("timeout") == 0:
                raise LockTimeoutError("another process is writing")
            return original(**options)

        monkeypatch.setattr(records, "write", busy)
        assert store.retrieve("a") is not None
        store.store_batch(aged("xyz"))
        assert "a" in held(store)
        assert "b" not in held(store)
        assert store.access_counts()["a"] == 1


@pytest.mark.parametrize("background", [False, True])
def test_rows_that_wait_in_memory_move_to_the_snapshot_before_a_write_is_refused(
    tmp_path: Path, background: bool
) -> None:
    dim, count = 64, 6000
    vectors = np.random.default_rng(SEED).standard_normal((count, dim)).astype(np.float32)
    limits = StorageConfig(max_memory_mb=0.8, background=background)
    with VectorStore(tmp_path / "m", None, dim, storage_config=limits) as store:
        for at in range(0, count, 60):
            names = [f"n{number}" for number in range(at, at + 60)]
            store.store_batch([unit(name) for name in names], vectors[at : at + 60])
        assert store.count() == count
        assert vectors.nbytes > 0.8 * 2**20 >= store.statistics()["memory_bytes"]
        assert store.search_vectors(vectors[:1], 1)[1] == [["n0"]]
