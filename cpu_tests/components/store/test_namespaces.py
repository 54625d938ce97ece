"""Namespaces and expiry as users see them: a store against a plain dict of dicts, and attempts to cross."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from milvus_fake import FakeMilvus
from support import SEED, FakeEmbedder, as_child
from typer.testing import CliRunner

from memevolve_gpu import (
    CapacityError,
    ConfigurationError,
    HashingEmbedder,
    InvalidUnitError,
    MemorySystem,
    MemorySystemConfig,
    MilvusStore,
    StorageConfig,
    StorageError,
    StoreClosedError,
    VectorStore,
    cli,
    open_store,
)
from memevolve_gpu.components.manage import MemoryManager, SimpleManagementStrategy
from memevolve_gpu.components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    SemanticRetrievalStrategy,
)
from memevolve_gpu.components.store.copy import copy_store
from memevolve_gpu.components.store.foreign import as_backend
from memevolve_gpu.components.store.namespaces import NamespaceInfo
from memevolve_gpu.live import live_index, scheduler
from memevolve_gpu.records.filters import matches

DIM = 16
PATHS: list[tuple[str, ...]] = [(), ("org",), ("org", "alice"), ("organic",), ("org", "alice", "notes")]
EMBED = FakeEmbedder(DIM)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


Open = Callable[..., VectorStore]


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Iterator[Open]:
    """``opened(name, **settings)`` opens a store with the clock of the test."""
    stores: list[VectorStore] = []

    def make(name: str = "store", **values: Any) -> VectorStore:
        config = StorageConfig(**{"background": False, "min_training_units": 64, **values})
        stores.append(VectorStore(tmp_path / name, FakeEmbedder(DIM), DIM, storage_config=config, clock=clock))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def unit(number: int, words: str = "", **more: Any) -> dict[str, Any]:
    return {"id": f"id{number}", "type": "skill", "content": f"{words or f'w{number % 7}'} fact {number}", **more}


def bare(unit: dict[str, Any] | None) -> dict[str, Any] | None:
    """The unit without the time stamps that the store adds."""
    if unit is None:
        return None
    kept = {name: value for name, value in unit.get("metadata", {}).items() if not name.endswith("_at")}
    found = {name: value for name, value in unit.items() if name != "metadata"}
    return {**found, "metadata": kept} if kept else found


IDS = st.sampled_from([f"id{number}" for number in range(8)])
WORDS = st.integers(0, 60).map(lambda number: f"w{number % 5} fact {number}")
PLACES = st.sampled_from(PATHS)
TTL = st.sampled_from([None, None, 5.0, 50.0])
FILTERS: list[dict[str, Any] | None] = [
    None,
    {"type": "tool"},
    {"metadata.n": {"gte": 2}},
    {"id": ["id1", "id3"]},
    {"tags": "t1"},
]


class NamespacesAgreeWithDicts(RuleBasedStateMachine):
    """Each namespace is a dict of id to (unit, the time at which it is gone, order of writing)."""

    @initialize(metric=st.sampled_from(["l2", "cosine"]))
    def open(self, metric: str) -> None:
        self.folder, self.clock, self.turn = Path(tempfile.mkdtemp()), Clock(), 0
        self.short = patch.multiple(scheduler, DELTA_ROWS=6, DELTA_MOST=6, QUIET_ROWS=3)
        self.short.start()
        self.config = StorageConfig(metric=metric, min_training_units=24, background=False)
        self.model: dict[tuple[str, ...], dict[str, tuple[dict[str, Any], float, int]]] = {path: {} for path in PATHS}
        self.ttls: dict[tuple[str, ...], float | None] = dict.fromkeys(PATHS)
        self.store = self.again()

    def again(self) -> VectorStore:
        return VectorStore(self.folder / "store", EMBED, DIM, storage_config=self.config, clock=self.clock)

    def living(self, path: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        held = sorted(self.model[path].items(), key=lambda one: one[1][2])
        return {name: unit for name, (unit, until, _) in held if until > self.clock.now}

    def keep(self, path: tuple[str, ...], unit: dict[str, Any], ttl: float | None) -> None:
        life = self.ttls[path] if ttl is None else ttl
        self.turn += 1
        self.model[path][unit["id"]] = unit, np.inf if life is None else self.clock.now + life, self.turn

    @rule(path=PLACES, name=IDS, content=WORDS, kind=st.sampled_from(["skill", "tool"]), ttl=TTL)
    def put(self, path: tuple[str, ...], name: str, content: str, kind: str, ttl: float | None) -> None:
        one: dict[str, Any] = {"id": name, "content": content, "type": kind, "tags": [f"t{self.turn % 3}"]}
        one["metadata"] = {"n": self.turn % 4, "namespace": ["org"]}
        assert self.store.namespace(*path).store({**one, "namespace": ["organic"]}, ttl=ttl) == name
        self.keep(path, {**one, "namespace": ["organic"]}, ttl)

    @rule(path=PLACES, contents=st.lists(WORDS, min_size=1, max_size=12), ttl=TTL)
    def put_many(self, path: tuple[str, ...], contents: list[str], ttl: float | None) -> None:
        ids = self.store.namespace(*path).store_batch([{"content": content} for content in contents], ttl=ttl)
        assert len(set(ids) | set(self.living(path))) == len(ids) + len(self.living(path)), "an id was given out twice"
        for name, content in zip(ids, contents, strict=True):
            self.keep(path, {"id": name, "content": content}, ttl)

    @rule(path=PLACES, name=IDS, content=WORDS, ttl=TTL)
    def update(self, path: tuple[str, ...], name: str, content: str, ttl: float | None) -> None:
        one, known = {"id": name, "content": content}, self.living(path)
        assert self.store.namespace(*path).update(name, one, ttl=ttl) == (name in known)
        if name in known:
            old = self.model[path][name]
            turn = old[2]
            if old[0]["content"] != content or len(old[0]) > len(one):  # another text: a new row, the newest
                self.turn += 1
                turn = self.turn
            self.model[path][name] = one, old[1] if ttl is None else self.clock.now + ttl, turn

    @rule(path=PLACES, ids=st.lists(IDS, max_size=5), ttl=TTL)
    def set_expiry(self, path: tuple[str, ...], ids: list[str], ttl: float | None) -> None:
        known = self.living(path).keys() & set(ids)
        assert self.store.namespace(*path).set_expiry(ids, ttl=ttl) == len(known)
        for name in known:
            unit, _, turn = self.model[path][name]
            self.model[path][name] = unit, np.inf if ttl is None else self.clock.now + ttl, turn

    @rule(path=PLACES, ids=st.lists(IDS, max_size=5))
    def delete(self, path: tuple[str, ...], ids: list[str]) -> None:
        known = self.living(path).keys() & set(ids)
        assert self.store.namespace(*path).delete_batch(ids) == len(known)
        for name in known:
            del self.model[path][name]

    @rule(path=PLACES, ids=st.lists(IDS, max_size=3, unique=True), name=IDS, content=WORDS)
    def replace(self, path: tuple[str, ...], ids: list[str], name: str, content: str) -> None:
        one = {"id": name, "content": content}
        assert self.store.namespace(*path).replace_batch(ids, [one]) == [name]
        for gone in ids:
            self.model[path].pop(gone, None)
        self.keep(path, one, None)

    @rule(path=PLACES)
    def clear(self, path: tuple[str, ...]) -> None:
        self.store.namespace(*path).clear()
        self.model[path] = {}

    @rule(path=st.sampled_from(PATHS[1:]))
    def delete_namespace(self, path: tuple[str, ...]) -> None:
        assert self.store.delete_namespace(*path) >= len(self.living(path))
        self.model[path], self.ttls[path] = {}, None

    @rule(path=PLACES, ttl=TTL)
    def limit(self, path: tuple[str, ...], ttl: float | None) -> None:
        assert self.store.namespace(*path).set_limits(default_ttl=ttl).default_ttl == ttl
        self.ttls[path] = ttl

    @rule(seconds=st.sampled_from([1.0, 7.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def maintain(self) -> None:
        self.store.run_maintenance()
        head = self.store.statistics()
        assert head["count"] == len(self.living(()))

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.again()

    @rule(path=PLACES, query=WORDS, k=st.integers(1, 12), filters=st.sampled_from(FILTERS))
    def search(self, path: tuple[str, ...], query: str, k: int, filters: dict[str, Any] | None) -> None:
        here = self.store.namespace(*path)
        expected = {name: one for name, one in self.living(path).items() if matches(filters, one)}
        found = here.search(query, k, filters, recall=1.0)
        assert len(found) == min(k, len(expected))
        assert {name for _, name in found} <= expected.keys()
        distances = sorted(self.distance(query, one) for one in expected.values())
        np.testing.assert_allclose([distance for distance, _ in found], distances[:k], atol=1e-4)
        hits = here.search_units(query, k, filters, recall=1.0)
        assert [bare(hit.unit) for hit in hits] == [expected[hit.id] for hit in hits]
        words = {name for name, one in expected.items() if set(query.split()) & set(one["content"].split())}
        assert {name for _, name in here.search_keywords(query, 100, filters)} <= words
        assert bool(here.search_keywords(query, 100, filters)) == bool(words)

    def distance(self, query: str, one: dict[str, Any]) -> float:
        text = self.store._unit_to_text(one)
        dot = float(EMBED.vector(query) @ EMBED.vector(text))
        return 1 - dot if self.config.metric == "cosine" else 2 - 2 * dot

    @rule(prefix=PLACES, query=WORDS, k=st.integers(1, 12))
    def search_a_subtree(self, prefix: tuple[str, ...], query: str, k: int) -> None:
        inside = [path for path in PATHS if path[: len(prefix)] == prefix]
        expected = {(path, name): one for path in inside for name, one in self.living(path).items()}
        hits = self.store.search_units(query, k, recall=1.0, prefix=prefix)
        assert len(hits) == min(k, len(expected))
        assert [bare(hit.unit) for hit in hits] == [expected[hit.namespace, hit.id] for hit in hits]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        for path in PATHS:
            here, expected = self.store.namespace(*path), self.living(path)
            assert here.count() == len(here) == len(here.data) == len(expected)
            assert [bare(one) for one in here.units()] == list(expected.values())
            assert {name: bare(one) for name, one in here.retrieve_batch([f"id{n}" for n in range(8)]).items()} == {
                name: expected[name] for name in (f"id{n}" for n in range(8)) if name in expected
            }
            for filters in FILTERS[1:]:
                assert [one["id"] for one in here.units(filters)] == [
                    name for name, one in expected.items() if matches(filters, one)
                ]
            assert [one["id"] for one, _ in here.export_rows()] == list(expected)
            for name in ("id0", "id5"):
                assert here.exists(name) == (name in here) == (here.retrieve(name) is not None) == (name in expected)
            assert here.inventory()["count"] == here.get_storage_health()["current_count"] == len(expected)
        listed = {info.path: info.count for info in self.store.namespaces()}
        assert {path: count for path, count in listed.items() if count} == {
            path: len(self.living(path)) for path in PATHS if self.living(path)
        }

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert self.store.check() == []
            self.store.close()
            self.short.stop()
            shutil.rmtree(self.folder)


TestNamespacesAgreeWithDicts = NamespacesAgreeWithDicts.TestCase
TestNamespacesAgreeWithDicts.settings = settings(
    max_examples=15, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.mark.slow
def test_thousands_of_attempts_to_cross_reach_nothing(opened: Open) -> None:
    store, pick, spaces, each = opened(), np.random.default_rng(SEED), 8, 12
    paths = [PATHS[1], *(("org", f"user{n}") for n in range(spaces - 1))]
    for space, path in enumerate(paths):
        store.namespace(*path).store_batch([unit(n, f"space{space}", metadata={"space": space}) for n in range(each)])
    store.run_maintenance()
    before = {path: list(store.namespace(*path).units()) for path in paths}
    for attempt in range(2_000):
        own, other = pick.choice(spaces, 2, replace=False).tolist()
        here, foreign = store.namespace(*paths[own]), f"space{other}"
        name = f"id{pick.integers(each)}"
        found = here.retrieve_batch([name])[name]
        assert found["metadata"]["space"] == own
        near = [one for _, one in here.search(f"{foreign} fact {attempt}", 5)]
        assert {one["metadata"]["space"] for one in here.retrieve_batch(near).values()} == {own}
        assert not list(here.units({"metadata.space": other}))
        assert not here.search_keywords(foreign, 5)
        moved = {**found, "namespace": list(paths[other])}
        moved["metadata"] = {**found["metadata"], "namespace": list(paths[other])}
        assert here.update(name, moved)
        assert here.update(name, found)
    after = {path: list(store.namespace(*path).units()) for path in paths}
    assert [[bare(one) for one in units] for units in after.values()] == [
        [bare(one) for one in units] for units in before.values()
    ]


def test_an_id_and_an_automatic_id_are_those_of_their_namespace(opened: Open) -> None:
    store = opened()
    alice, bob = store.namespace("org", "alice"), store.namespace("org", "bob")
    assert [view.store({"content": "a fact"}) for view in (alice, bob, store, alice)] == [
        "unit_0", "unit_0", "unit_0", "unit_1",
    ]  # fmt: skip
    assert alice.store(unit(1, "alice")) == bob.store(unit(1, "bob")) == "id1"
    assert alice.delete("id1")
    assert bob.retrieve("id1")["content"] == "bob fact 1"  # type: ignore[index]
    assert not alice.exists("id1")
    assert not store.exists("id1")
    assert (alice.count(), bob.count(), store.count()) == (2, 2, 1)


def test_keyword_scores_do_not_depend_on_what_others_wrote(opened: Open) -> None:
    many, alone = opened("many"), opened("alone")
    units = [unit(n, "common" if n % 2 else "rare") for n in range(40)]
    alone.store_batch(units)
    many.namespace("a").store_batch(units)
    for n in range(5):
        many.namespace("b", str(n)).store_batch([unit(n, "rare rare fact") for n in range(50)])
    for store in (many, alone):
        store._open.records.checkpoint()
    for query in ("rare", "common fact", "fact 7"):
        scores = [store.search_keywords(query, 10) for store in (many.namespace("a"), alone)]
        assert [name for _, name in scores[0]] == [name for _, name in scores[1]]
        found, expected = ([score for score, _ in one] for one in scores)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "strategy", [SemanticRetrievalStrategy(), KeywordRetrievalStrategy(), HybridRetrievalStrategy()]
)
def test_strategies_and_a_memory_system_stay_inside(opened: Open, strategy: Any) -> None:
    store = opened()
    alice, bob = store.namespace("alice"), store.namespace("bob")
    bob.store_batch([unit(n, "git rebase") for n in range(20)])
    assert as_backend(alice) is alice
    with MemorySystem(MemorySystemConfig(storage_backend=alice, retrieval_strategy=strategy)) as system:
        assert system.query_memory("git rebase") == []
        system.add_units([unit(1, "git bisect")])
        assert [found["content"] for found in system.query_memory("git rebase")] == ["git bisect fact 1"]
        assert system.get_health_metrics().total_units == 1
    assert bob.count() == 20


def test_management_stays_inside(opened: Open) -> None:
    store = opened()
    alice, bob = store.namespace("alice"), store.namespace("bob")
    same = [{"id": f"id{n}", "content": "the same text", "type": "skill"} for n in range(6)]
    for view in (alice, bob):
        view.store_batch(same)
    bob.retrieve("id0")
    manager = MemoryManager(alice, SimpleManagementStrategy())
    assert manager.deduplicate(0.99)[0] == 5
    alice.store_batch([unit(n) for n in range(10, 30)])
    assert manager.prune({"max_count": 10})[0] == 11
    assert manager.apply_forgetting("lru", 4)[0] == 4
    assert (alice.count(), bob.count()) == (6, 6)
    assert bob.access_counts() == {"id0": 1}
    assert len(bob.access_order("lru", 100)) == 6
    assert bob.statistics()["management"] == []
    assert len(alice.statistics()["management"]) == 3


def test_limits_are_those_of_a_namespace(opened: Open) -> None:
    store = opened(max_memory_units=12)
    alice, bob = store.namespace("alice"), store.namespace("bob")
    assert alice.set_limits(max_units=3).max_units == 3
    alice.store_batch([unit(n) for n in range(3)])
    with pytest.raises(CapacityError, match="set_limits"):
        alice.store(unit(9))
    assert alice.store(unit(1, "again")) == "id1"
    assert alice.get_storage_health()["max_units"] == 3
    bob.store_batch([unit(n) for n in range(9)])
    with pytest.raises(CapacityError, match="MAX_MEMORY_UNITS"):
        bob.store(unit(10))
    assert alice.set_limits(default_ttl=60).max_units == 3
    assert alice.set_limits().default_ttl == 60
    assert alice.set_limits(max_units=None).default_ttl == 60
    assert alice.set_limits(default_ttl=None) == NamespaceInfo(("alice",), 3)
    for wrong in (0, -1, 1.5, "3", True):
        with pytest.raises(ConfigurationError, match="max_units"):
            alice.set_limits(max_units=wrong)  # type: ignore[arg-type]
    assert [(info.path, info.count) for info in store.namespaces()] == [(("alice",), 3), (("bob",), 9)]


def test_auto_prune_deletes_in_its_own_namespace_only(opened: Open) -> None:
    store = opened(auto_prune="oldest", max_memory_units=100)
    alice, bob = store.namespace("alice"), store.namespace("bob")
    bob.store_batch([unit(n) for n in range(5)])
    alice.set_limits(max_units=10)
    for n in range(30):
        alice.store(unit(n))
    assert bob.count() == 5
    assert 6 <= alice.count() <= 10
    assert alice.exists("id29")


def test_what_a_namespace_cannot_do_it_says(opened: Open) -> None:
    store = opened()
    view = store.namespace("org", "alice")
    for call in (view.check, view.snapshot):
        with pytest.raises(ConfigurationError, match="namespace"):
            call()
    for wrong in ("", "a/b", "a\0", "x" * 257, "\ud800", "\n"):
        with pytest.raises(ConfigurationError, match="namespace"):
            store.namespace(wrong)
    for bad in (5, None, ["a"]):
        with pytest.raises(ConfigurationError, match="namespace"):
            store.namespace(bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="namespace"):
        store.namespace(*"abcdefghijklmnopq")
    with pytest.raises(ConfigurationError, match="prefix"):
        store.search_units("fact", prefix=(1,))  # type: ignore[arg-type]
    assert view.namespace("notes").namespace_path == ("org", "alice", "notes")
    with view:
        view.store(unit(1))
    with pytest.raises(StoreClosedError):
        view.count()
    again = store.namespace("org", "alice")
    assert again.count() == 1
    store.close()
    with pytest.raises(StoreClosedError):
        again.count()


def test_a_store_is_opened_in_a_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, embed, config = tmp_path / "store", FakeEmbedder(DIM), {"background": False}
    with open_store(place, embed, storage_config=config, namespace=("org", "alice")) as store:
        assert store.store({"content": "a fact"}) == "unit_0"
    with open_store(place, embed, storage_config=config) as store:
        assert store.count() == 0
        assert store.namespace("org", "alice").count() == 1
    monkeypatch.setenv("MEMEVOLVE_STORAGE_NAMESPACE", "org/alice")
    with VectorStore(place, embed) as store:
        assert (store.count(), store.namespace_path) == (1, ("org", "alice"))
        assert store.check() == []
        assert store.namespaces()[0].path == ("org", "alice")


def test_copies_and_states_are_those_of_a_namespace(opened: Open) -> None:
    store, other = opened("one"), opened("two")
    alice, bob = store.namespace("alice"), store.namespace("bob")
    alice.store_batch([unit(n) for n in range(20)])
    bob.store_batch([unit(n, "bob") for n in range(30)])
    report = copy_store(alice, other.namespace("copy"))
    assert (report.copied, report.count) == (20, 20)
    assert other.count() == 0
    assert [bare(one) for one in other.namespace("copy").units()] == [bare(one) for one in alice.units()]
    copy_store(alice, store.namespace("copy"))
    assert store.namespace("copy").count() == 20
    other.namespace("state").restore_state(bob.save_state())
    assert other.namespace("state").count() == 30
    alice.restore_state(alice.save_state())
    assert alice.count() == 20


def test_a_namespace_is_deleted_whole_and_can_begin_anew(opened: Open) -> None:
    store = opened()
    alice = store.namespace("org", "alice")
    alice.set_limits(max_units=50, default_ttl=60)
    alice.store_batch([unit(n) for n in range(30)])
    alice.namespace("notes").store(unit(1))
    before = store.change_number
    assert store.delete_namespace("org", "alice") == 30
    assert (store.change_number or 0) > (before or 0)
    assert alice.count() == 0
    assert alice.search("fact", 5) == []
    assert [info.path for info in store.namespaces(("org",))] == [("org", "alice", "notes")]
    assert store.delete_namespace("org", "alice") == 0
    alice.store(unit(1))
    assert alice.expiry("id1") is None
    assert store.namespaces("org")[0].count == 1


def test_expiry_is_judged_at_the_call(opened: Open, clock: Clock) -> None:
    store = opened()
    names = store.store_batch([unit(n) for n in range(40)], ttl=[n + 1 for n in range(40)])
    store.run_maintenance()
    for passed in range(41):
        assert store.count() == 40 - passed
        found = [name for _, name in store.search("fact", 10, recall=1.0)]
        assert len(found) == min(10, 40 - passed)
        assert set(found) <= set(names[passed:])
        assert len(store.search("fact", 10, {"type": "skill"})) == min(10, 40 - passed)
        clock.now += 1
    assert store.retrieve_all() == []
    assert store.statistics()["log"]["last_seq"] == 40, "nothing was swept yet"
    assert "swept 40 expired units" in store.run_maintenance()["actions"]
    assert store.check() == []


def test_expiry_takes_moments_and_refuses_what_is_none(opened: Open, clock: Clock) -> None:
    store = opened()
    moment = datetime.fromtimestamp(clock.now, timezone(timedelta(hours=5))) + timedelta(seconds=10)
    store.store(unit(1), expires_at=moment)
    store.store(unit(2), expires_at=clock.now + 10)
    store.store(unit(3), ttl=timedelta(seconds=10))
    store.store(unit(4), expires_at=clock.now)
    assert [store.expiry(f"id{n}") for n in range(1, 4)] == [clock.now + 10] * 3
    assert not store.exists("id4")
    assert store.retrieve("id1", ttl=100) is not None
    assert store.set_expiry(["id2", "id9"]) == 1
    clock.now += 10
    assert [one["id"] for one in store.units()] == ["id1", "id2"]
    assert store.update("id3", unit(3)) is False
    assert store.delete("id3") is False
    wrong: list[dict[str, Any]] = [
        {"ttl": 0}, {"ttl": -1}, {"ttl": float("nan")}, {"ttl": "soon"}, {"ttl": True}, {"ttl": [1, 2]},
        {"expires_at": datetime(2030, 1, 1)}, {"expires_at": float("-inf")}, {"expires_at": "2030"},  # noqa: DTZ001
        {"ttl": 5, "expires_at": clock.now + 5}, {"ttl": 1e30},
    ]  # fmt: skip
    for times in wrong:
        with pytest.raises(InvalidUnitError, match=r"ttl|expires_at"):
            store.store(unit(7), **times)
        with pytest.raises(InvalidUnitError, match=r"ttl|expires_at"):
            store.store_batch([unit(7)], **times)
    assert not store.exists("id7")


def test_infinity_is_never_whatever_the_default(opened: Open) -> None:
    store = opened()
    store.set_limits(default_ttl=5)
    store.store_batch([unit(n) for n in range(3)], expires_at=[math.inf, None, 9e9])
    assert store.expiries(["id0", "id1", "id2", "absent"]).keys() == {"id1", "id2"}
    assert store.expiry("id0") is None
    store.update("id2", unit(2), expires_at=math.inf)
    assert store.expiries(["id2"]) == {}


def test_the_background_sweeps_what_has_expired(opened: Open, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_index, "SWEEP_ROWS", 10)
    store = opened(background=True)
    store.namespace("alice").store_batch([unit(n) for n in range(20)], ttl=5)
    clock.now += 5
    store.store_batch([unit(n, "later") for n in range(40)])
    deadline = time.monotonic() + 60
    while store._open.records.head().count > 40:  # rows of the file, expired ones included
        assert time.monotonic() < deadline, store.statistics()
        time.sleep(0.02)
    assert store.count() == 40


def test_langchain_stays_inside(opened: Open) -> None:
    langchain = pytest.importorskip("memevolve_gpu.integrations.langchain", reason="langchain-core is not installed")
    store = opened()
    store.namespace("bob").store_batch([unit(n, "git rebase") for n in range(5)])
    vectors = langchain.MemEvolveVectorStore(store.namespace("alice"))
    assert vectors.similarity_search("git rebase") == []
    assert vectors.add_texts(["git bisect"], ids=["id1"]) == ["id1"]
    assert [found.page_content for found in vectors.similarity_search("git rebase", k=4)] == ["git bisect"]
    assert vectors.delete(["id1", "id2"])
    assert store.namespace("bob").count() == 5


def test_two_processes_see_namespaces_and_expiry_alike(opened: Open, tmp_path: Path, clock: Clock) -> None:
    store = opened()
    store.namespace("alice").store_batch([unit(n) for n in range(70)])
    store.run_maintenance()

    def child() -> None:
        with VectorStore(tmp_path / "store", FakeEmbedder(DIM), clock=clock) as other:
            assert other.namespace("alice").count() == 70
            other.namespace("bob").store_batch([unit(n, "bob") for n in range(10)], ttl=60)
            other.namespace("alice").delete_batch([f"id{n}" for n in range(60)])
            other.set_limits(default_ttl=5)

    assert as_child(child) == 0
    assert len(store.namespace("alice").search("fact", 50)) == 10
    assert len(store.namespace("bob").search("bob", 50)) == 10
    store.store(unit(1))
    clock.now += 61
    assert store.namespace("bob").search("bob", 50) == []
    assert store.count() == 0
    assert len(store.namespace("alice").search("fact", 50)) == 10


def test_what_was_acknowledged_before_a_kill_is_in_its_namespace(tmp_path: Path) -> None:
    for life in range(3):
        line = tmp_path / f"acknowledged{life}"

        def child(line: Path = line, life: int = life) -> None:
            store = VectorStore(tmp_path / "store", FakeEmbedder(DIM), storage_config={"background": False})
            pick = np.random.default_rng(SEED + life)
            with line.open("w") as acknowledged:
                for number in range(1000):
                    path = PATHS[pick.integers(len(PATHS))]
                    store.namespace(*path).store(unit(number, metadata={"life": life}), ttl=10**6)
                    acknowledged.write(f"{'/'.join(path)} id{number}\n")
                    acknowledged.flush()
                    if number == 40:
                        os.kill(os.getpid(), signal.SIGKILL)

        assert as_child(child) == -signal.SIGKILL
        with VectorStore(tmp_path / "store", FakeEmbedder(DIM), storage_config={"background": False}) as store:
            assert store.check() == []
            for path, name in (one.split(" ") for one in line.read_text().splitlines()):
                here = store.namespace(*path.split("/")) if path else store
                found = here.retrieve(name)
                assert found is not None
                assert found["metadata"]["life"] == life
                assert name in [found for _, found in here.search(found["content"], 3)]
            held = [(info.path, info.count) for info in store.namespaces()]
            assert held == sorted((path, len(list(store.namespace(*path).units()))) for path, _ in held)


def settled(store: VectorStore) -> dict[tuple[str, ...], list[Any]]:
    """Everything of all namespaces: units with their time stamps, vectors, times of expiry; and the limits."""
    found: dict[tuple[str, ...], list[Any]] = {}
    skipped = len(store.namespace_path)
    for info in [*store.namespaces()]:
        view = store.namespace(*info.path[skipped:])
        rows = [(unit, vector.tobytes(), view.expiry(unit["id"])) for unit, vector in view.export_rows()]
        found[info.path] = [info.max_units, info.default_ttl, sorted(rows, key=lambda row: row[0]["id"])]
    return found


def populated(store: VectorStore, clock: Clock) -> VectorStore:
    """Some namespaces, with units that expire and units that do not, updated ones, and limits."""
    for at, path in enumerate(((), ("org", "alice"), ("org", "alice", "notes"), ("org", "bob"))):
        view = store.namespace(*path) if path else store
        view.store_batch(
            [unit(n, metadata={"n": n}) for n in range(5 + at)], ttl=[None, 50, 5000, None, 70][:5] + [None] * at
        )
        view.update("id0", unit(0, "updated"))
        view.store({"id": "old", "content": "old", "metadata": {"created_at": "2020-01-01T00:00:00+00:00"}})
    store.namespace("org", "alice").set_limits(max_units=100, default_ttl=30.0)
    clock.now += 60
    return store


def test_a_copy_carries_namespaces_times_and_limits(opened: Open, clock: Clock) -> None:
    source, target = populated(opened("source"), clock), opened("target")
    expected = settled(source)
    assert set(expected) == {(), ("org", "alice"), ("org", "alice", "notes"), ("org", "bob")}
    assert expected["org", "alice"][:2] == [100, 30.0]
    report = copy_store(source, target)
    assert (report.namespaces, report.others) == (4, 0)
    assert settled(target) == expected
    assert copy_store(source, target).copied == 0
    source.namespace("org", "bob").set_expiry(["id0"], ttl=40)
    with pytest.raises(ConfigurationError, match="'id0'"):
        copy_store(source, target)
    assert copy_store(source, target, replace=True).replaced == 1
    assert settled(target) == settled(source)
    clock.now += 45
    assert settled(target) == settled(source)
    assert not target.namespace("org", "bob").exists("id0")


def test_a_subtree_is_copied_below_another_one(opened: Open, clock: Clock) -> None:
    source, target = populated(opened("source"), clock), opened("target")
    report = copy_store(source.namespace("org", "alice"), target.namespace("moved"))
    assert report.namespaces == 2
    assert [info.path for info in target.namespaces()] == [("moved",), ("moved", "notes")]
    assert list(settled(target.namespace("moved")).values()) == list(settled(source.namespace("org", "alice")).values())


def test_a_backup_of_a_namespace_is_a_store_with_it_alone(opened: Open, clock: Clock, tmp_path: Path) -> None:
    source = populated(opened("source"), clock)
    expected = settled(source.namespace("org", "alice"))
    source.namespace("org", "alice").backup(tmp_path / "alice.db")
    assert sorted(one.name for one in tmp_path.glob("*alice*")) == ["alice.db"]
    assert not list(tmp_path.glob(".namespace-*"))
    with pytest.raises(StorageError, match="exists"):
        source.namespace("org", "alice").backup(tmp_path / "alice.db")
    with pytest.raises(StorageError, match="does not exist"):
        source.namespace("org", "alice").backup(tmp_path / "nowhere" / "alice.db")
    restored = opened("alice")
    assert settled(restored) == expected
    assert b"bob" not in (tmp_path / "alice.db").read_bytes()
    source.delete_namespace("org", "alice")
    copy_store(restored.namespace("org", "alice"), source.namespace("org", "alice"))
    assert settled(source.namespace("org", "alice")) == expected


def test_state_moves_with_its_times(opened: Open, clock: Clock) -> None:
    source = populated(opened("source"), clock)
    target = opened("target")
    target.restore_state(source.save_state())
    with VectorStore(target.index_file, None, clock=clock) as again:
        assert settled(again) == settled(source)


def test_what_a_backend_without_namespaces_and_expiry_cannot_carry_is_refused(opened: Open, clock: Clock) -> None:
    server = MilvusStore(EMBED, DIM, client=FakeMilvus().connect)
    source = populated(opened("source"), clock)
    with pytest.raises(ConfigurationError, match="namespaces"):
        copy_store(source, server)
    with pytest.raises(ConfigurationError, match="do not expire"):
        copy_store(source.namespace("org", "bob"), server)
    assert server.count() == 0
    source.namespace("org", "bob").set_expiry(["id2", "id4"])
    assert copy_store(source.namespace("org", "bob"), server).count == server.count() == 8


def command(arguments: list[str]) -> Any:
    return CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize("vectors", [True, False])
def test_export_and_import_carry_namespaces_and_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: bool
) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORAGE_BACKGROUND", "false")
    now = Clock()
    now.now = time.time()
    with VectorStore(tmp_path / "a", HashingEmbedder()) as source:
        populated(source, now)
        source.set_expiry(["id3"], expires_at=time.time() + 0.2)
        before = settled(source)
    lines = str(tmp_path / "lines.jsonl")
    options = ["--vectors"] if vectors else []
    assert command(["export", lines, "--store", "a", "--subtree", *options]).exit_code == 0
    time.sleep(0.3)
    assert command(["import", lines, "--store", "b", "--embedder", "hashing"]).exit_code == 0
    with VectorStore(tmp_path / "b", HashingEmbedder()) as target:
        after = settled(target)
    for path, (_, _, rows) in before.items():
        kept = [row for row in rows if (path, row[0]["id"]) != ((), "id3")]  # it expired on the way
        assert [(unit, vector, until) for unit, vector, until in after[path][2]] == kept, path
    alone = command(["export", str(tmp_path / "alone.jsonl"), "--store", "a"])
    assert "3 namespaces below this one are not in it" in alone.stderr
    assert len((tmp_path / "alone.jsonl").read_text().splitlines()) == 5
    assert command(["import", lines, "--store", "c", "--namespace", "moved", "--embedder", "hashing"]).exit_code == 0
    with VectorStore(tmp_path / "c", HashingEmbedder()) as target:
        assert {info.path for info in target.namespaces()} == {("moved", *path) for path in before}


@pytest.mark.parametrize(
    "line",
    [{"namespace": 5}, {"namespace": ["a/b"]}, {"expires_at": "soon"}, {"expires_at": True}],
)
def test_a_line_that_names_no_namespace_or_time_is_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    text = json.dumps({"unit": {"id": "a", "content": "text"}, **line})
    (tmp_path / "lines.jsonl").write_text(text)
    refused = command(["import", str(tmp_path / "lines.jsonl"), "--store", "d", "--embedder", "hashing"])
    assert refused.exit_code == 2
    assert "line 1" in refused.stderr
    assert not list(tmp_path.glob("d.*"))
