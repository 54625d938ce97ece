"""What every backend keeps, whatever stores the units; what only some do is declared, and tested where it is."""

from __future__ import annotations

import inspect
import json
import random
import threading
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import pytest
from support import SEED, FakeEmbedder

from memevolve_gpu import (
    CapacityError,
    ConfigurationError,
    ConflictError,
    DimensionMismatchError,
    EmbeddingError,
    HalfLife,
    InvalidFilterError,
    InvalidQueryError,
    InvalidUnitError,
    InvalidVectorError,
    MemorySystem,
    MemorySystemConfig,
    ModelMismatchError,
    StorageBackend,
    StoreClosedError,
)
from memevolve_gpu.components.manage import MemoryManager, SimpleManagementStrategy
from memevolve_gpu.components.retrieve import HybridRetrievalStrategy, SemanticRetrievalStrategy
from memevolve_gpu.components.store import base
from memevolve_gpu.components.store.copy import copy_store
from memevolve_gpu.records.filters import matches
from memevolve_gpu.utils import report_types
from memevolve_gpu.utils.timestamps import parse_stamp

DIM = 24
Make = Any


class Unspeakable:
    """Has no repr of its own."""

    def __repr__(self) -> str:
        raise ValueError("no")


ROUND: dict[str, Any] = {}
ROUND["again"] = ROUND
ODD_DETAILS = [
    {},
    None,
    [1, object()],
    "in words",
    {"callback": print, "raw": b"\0", "many": 10**400, "lone": "\ud800"},
    {("a", 1): Unspeakable()},
    ROUND,
    {"long": "x" * 5_000_000},
    {"count_before": "seven", "removed": True, "ids": 5},
]

ONLY_IN_FILES = {
    *("delete_where", "facets", "patch", "search_units", "update_where"),
    "access_counts",
    "access_order",
    "change_number",
    "changes",
    "delete_namespace",
    "expiries",
    "expiry",
    "forget_subject",
    "history",
    "namespace",
    "namespaces",
    "operations",
    "record_access",
    "replace_batch",
    "search_keywords",
    "set_expiry",
    "set_limits",
    "undo",
    "watch",
}
ONLY_ON_SERVERS = {"refresh"}
CORE = base.OPTIONAL - ONLY_IN_FILES - ONLY_ON_SERVERS

HOSTILE = [
    'a"b',
    "a'b",
    "a\\b",
    '"] or born >= 0 or id in ["',
    "') or true or ('",
    "\\u0041",
    "\\",
    "%",
    "_",
    "é",
    "日本語",
    "😀",
    "\n\t\r",
    "\x01\x7f",
    "\u202e",
    "{a}",
    "[1]",
    "$meta",
    "a.b",
    " ",
    "x" * 1024,
    "日" * 1024,
]

VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "zero": 0,
    "minus zero": -0.0,
    "tenth": 0.1,
    "tiny": 5e-324,
    "huge": 1.7976931348623157e308,
    "beyond doubles": 2**53 + 1,
    "beyond 64 bits": 2**70 + 1,
    "NUL": "\0",
    "empty": ["", [], {}],
    "nested": {"a": [{"b": [None, 1, "x"]}]},
    "": "no name",
    "with.dot": 1,
    **{text[:40]: text for text in HOSTILE},
}


def units(n: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"u{i}",
            "type": ["lesson", "skill", "tool", "abstraction"][i % 4],
            "content": f"fact number {i} about topic {i % 17}",
            "tags": [f"t{i % 5}", "all"],
            "metadata": {"score": i / n},
        }
        for i in range(n)
    ]


def ids_of(store: Any, filters: Mapping[str, Any] | None) -> set[str]:
    return {unit["id"] for unit in store.units(filters)}


class TestVerbs:
    def test_every_verb_of_a_backend(self, make: Make) -> None:
        store = make()
        assert StorageBackend in type(store).__mro__
        unit_id = store.store({"type": "lesson", "content": "Rebase before you push"})
        kept = store.retrieve(unit_id)
        assert (kept["id"], bool(kept["metadata"]["created_at"])) == (unit_id, True)
        assert store.get_metadata(unit_id) == kept["metadata"]
        assert store.exists(unit_id)
        assert unit_id in store
        assert (store.count(), len(store)) == (1, 1)
        assert store.retrieve_all() == list(store) == [kept]
        assert store.update(unit_id, {"type": "lesson", "content": "Rebase, test, push"})
        changed = store.retrieve(unit_id)
        assert changed["metadata"]["updated_at"]
        assert changed["metadata"]["created_at"] == kept["metadata"]["created_at"]
        assert store.delete(unit_id)
        assert not store.delete(unit_id)
        assert not store.update(unit_id, {"content": "gone"})
        assert store.retrieve(unit_id) is None
        assert store.get_metadata(unit_id) is None
        store.store_batch([{"content": "a"}, {"content": "b"}])
        store.clear()
        assert store.count() == 0
        assert store.search("a") == []

    def test_what_a_backend_declares(self, make: Make, backend: str) -> None:
        store = make()
        in_files = backend in ("vector", "namespace", "remote")
        assert store.capabilities == CORE | (ONLY_IN_FILES if in_files else ONLY_ON_SERVERS)
        assert hasattr(store, "backup") == in_files
        assert hasattr(store, "check") == (backend in ("vector", "namespace"))

    def test_data_is_a_read_only_mapping_of_ids(self, make: Make) -> None:
        store = make()
        ids = store.store_batch(units(5))
        assert list(store.data) == ids
        assert store.data["u3"]["content"].startswith("fact number 3")
        assert len(store.data) == 5
        assert "u9" not in store.data
        with pytest.raises(KeyError):
            store.data["u9"]
        with pytest.raises(TypeError):
            store.data["u3"] = {}

    def test_automatic_ids_are_never_given_twice(self, make: Make) -> None:
        one, other = make(), make()
        given = [
            one.store({"content": "a"}),
            *other.store_batch([{"content": "b"}, {"id": "x", "content": "x"}, {"content": "c"}]),
        ]
        one.delete(given[0])
        given += [one.store({"content": "d"}), other.store({"content": "e"})]
        other.clear()
        given.append(one.store({"content": "f"}))
        assert len(set(given)) == 7
        assert all(unit_id == "x" or unit_id.removeprefix("unit_").isdigit() for unit_id in given)

    def test_a_unit_without_text_to_embed_is_refused_unless_it_brings_its_vector(self, make: Make) -> None:
        store = make()
        store.store({"id": "a", "content": "a"})
        for odd, named in (
            ({}, "'content'"),
            ({"id": "b", "metadata": {"k": 1}}, "'content'"),
            ({"text": "hidden"}, "'text'.*use 'content'"),
            ({"text": "hidden", "type": "lesson", "content": " "}, "'text'.*use 'content'"),
            ({"page_content": "hidden"}, "'page_content'.*use 'content'"),
            ({"content": 123}, "'content'.*must be a text"),
            ({"content": "", "tags": []}, "'content'"),
        ):
            with pytest.raises(InvalidUnitError, match=named):
                store.store(odd)
            with pytest.raises(InvalidUnitError, match=rf"units\[1\].*{named}"):
                store.store_batch([{"content": "b"}, odd])
            with pytest.raises(InvalidUnitError, match=named):
                store.update("a", {**odd, "id": "a"})
            store.store_batch([odd], store.vectors_of(["a"])["a"][None, :])
            store.delete_batch([unit["id"] for unit in store.units() if unit["id"] != "a"])
        assert [unit["content"] for unit in store.units()] == ["a"]
        for given in ({"type": "lesson"}, {"tags": ["x"]}, {"query": "q"}, {"content": {"what": "nested"}}):
            store.store(given)
        assert store.count() == 5

    def test_the_given_unit_is_not_changed(self, make: Make) -> None:
        unit = {"id": "a", "content": "a", "metadata": {"k": 1}}
        store = make()
        store.store(unit)
        store.update("a", unit)
        assert unit == {"id": "a", "content": "a", "metadata": {"k": 1}}

    def test_every_json_value_is_kept_bit_by_bit(self, make: Make) -> None:
        store = make()
        unit = {"id": "a", "content": "x", "metadata": {"created_at": "2020"}, **VALUES}
        store.store(unit)
        kept = store.retrieve("a")
        assert kept == unit
        assert list(kept) == list(unit)
        assert str(kept["minus zero"]) == "-0.0"

    def test_long_units_are_kept(self, make: Make) -> None:
        store = make()
        store.store({"id": "a", "content": "memory " * 40_000, "metadata": {"many": list(range(5_000))}})
        assert len(store.retrieve("a")["content"]) == 280_000
        assert ids_of(store, {"metadata.many": 4_999}) == {"a"}
        assert ids_of(store, {"metadata.many": 5_000}) == set()
        assert ids_of(store, {"metadata.many": {"nin": [7]}}) == set()

    def test_hostile_ids_stay_ids(self, make: Make) -> None:
        store = make()
        store.store({"id": "other", "content": "friendly"})
        store.store_batch([{"id": unit_id, "content": f"hostile {unit_id!a}"} for unit_id in HOSTILE])
        for unit_id in HOSTILE:
            assert store.retrieve(unit_id)["content"] == f"hostile {unit_id!a}"
            assert list(store.retrieve_batch([unit_id, "none"])) == [unit_id]
            assert store.delete(unit_id)
            assert not store.exists(unit_id)
        assert [unit["id"] for unit in store.retrieve_all()] == ["other"]
        assert not store.exists("\ud800")

    def test_oldest_first_and_in_order(self, make: Make) -> None:
        store = make()
        store.store_batch(units(30))
        store.store({"id": "late", "content": "x"})
        store.delete("u7")
        expected = [f"u{i}" for i in range(30) if i != 7] + ["late"]
        assert [unit["id"] for unit in store.retrieve_all()] == expected
        assert [unit["id"] for unit, _ in store.export_rows(page_size=4)] == expected
        store.update("u3", {**units(30)[3], "metadata": {"note": "same text: it keeps its place"}})
        assert [unit["id"] for unit in store.units()] == expected

    def test_an_edit_costs_no_embedding(self, make: Make) -> None:
        embedder = FakeEmbedder(DIM)
        store = make(embedder=embedder)
        store.store_batch(units(10))
        calls = embedder.calls
        store.update("u1", {**units(10)[1], "metadata": {"note": "same text"}})
        assert embedder.calls == calls
        store.update("u1", {"content": "completely different words"})
        assert embedder.calls == calls + 1
        assert store.search("completely different words", 1)[0][1] == "u1"
        assert store.index.ntotal == 10

    def test_storing_an_existing_id_replaces_it(self, make: Make) -> None:
        store = make()
        store.store({"id": "a", "content": "old words"})
        store.store({"id": "a", "content": "new topic"})
        assert store.store_batch([{"id": "b", "content": "first"}, {"id": "b", "content": "second"}]) == ["b", "b"]
        assert store.count() == 2
        assert store.data["b"]["content"] == "second"
        assert store.search("new topic", 1)[0][1] == "a"
        assert len(store.search("new topic", 5)) == 2


class TestFinding:
    @pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
    def test_distances_and_order_equal_an_exact_oracle(self, make: Make, metric: str) -> None:
        store = make(metric=metric)
        rng = np.random.default_rng(SEED)
        vectors = rng.standard_normal((600, DIM)).astype("float32")
        store.store_batch(units(600)[:500], vectors[:500])
        store.run_maintenance()
        store.store_batch(units(600)[500:], vectors[500:])
        assert store.delete_batch([f"u{i}" for i in range(0, 600, 7)]) == 86
        alive = np.array([i for i in range(600) if i % 7])
        queries = rng.standard_normal((20, DIM))
        exact = oracle(queries, vectors[alive], metric)
        distances, ids = store.search_vectors(queries, 10, recall=1.0)
        order = np.argsort(exact, axis=1)[:, :10]
        assert np.allclose(distances, np.take_along_axis(exact, order, 1), rtol=1e-4, atol=1e-4)
        assert ids == [[f"u{alive[j]}" for j in row] for row in order]
        assert store.index.ntotal == len(alive)

    def test_every_unit_finds_itself_before_and_after_maintenance(self, make: Make) -> None:
        store, embedder = make(), FakeEmbedder(DIM)
        store.store_batch(units(400))
        for _ in range(2):
            vectors = np.stack([embedder.vector(store._unit_to_text(unit)) for unit in units(400)])
            distances, ids = store.search_vectors(vectors, 1)
            assert [row[0] for row in ids] == [f"u{i}" for i in range(400)]
            assert np.allclose(distances, 0, atol=1e-5)
            store.run_maintenance()

    def test_never_more_than_are_stored(self, make: Make) -> None:
        store = make()
        store.store_batch(units(3))
        found = store.search("fact number 1 about topic 1", top_k=10)
        assert [distance for distance, _ in found] == sorted(distance for distance, _ in found)
        assert (len(found), found[0][1]) == (3, "u1")
        distances, ids = store.search_vectors(np.ones((2, DIM)), 5)
        assert distances.shape == (2, 5)
        assert np.isinf(distances[:, 3:]).all()
        assert [row[3:] for row in ids] == [[None, None]] * 2

    def test_search_units_brings_the_units(self, make: Make) -> None:
        store = make()
        store.store_batch(units(20))
        hits = store.search_units("fact number 7 about topic 7", 3)
        assert (hits[0].id, hits[0].unit) == ("u7", store.retrieve("u7"))
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert [hit.id for hit in hits] == [unit_id for _, unit_id in store.search("fact number 7 about topic 7", 3)]

    def test_a_write_is_found_by_the_next_search(self, make: Make) -> None:
        store = make()
        for i in range(20):
            store.store({"id": f"w{i}", "content": f"word{i} other{i}"})
            assert store.search(f"word{i} other{i}", 1)[0][1] == f"w{i}"
            if i % 3 == 0:
                store.delete(f"w{i}")
                assert f"w{i}" not in [unit_id for _, unit_id in store.search(f"word{i} other{i}", 30)]

    def test_writes_of_others_are_seen_when_the_store_is_refreshed(self, make: Make) -> None:
        one, other = make(), make()
        one.store({"id": "a", "content": "news"})
        other.refresh()
        assert other.retrieve("a")["content"] == "news"
        assert other.search("news", 1)[0][1] == "a"
        assert make().count() == 1

    def test_threads_search_while_one_writes(self, make: Make) -> None:
        store = make()
        store.store_batch(units(50))
        errors: list[BaseException] = []

        def search() -> None:
            try:
                for i in range(15):
                    assert store.search(f"fact number {i} about topic {i % 17}", 1)[0][1] == f"u{i}"
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=search) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(10):
            store.store({"id": f"w{i}", "content": f"entirely different {i}"})
        for thread in threads:
            thread.join()
        assert errors == []
        assert store.count() == 60

    def test_vectors_and_similarities(self, make: Make) -> None:
        store = make()
        vectors = np.random.default_rng(SEED).standard_normal((40, DIM)).astype("float32")
        store.store_batch(units(40), vectors)
        found = store.vectors_of(["u3", "none", "u1", "u3"])
        assert list(found) == ["u3", "u1"]
        assert all(np.array_equal(found[f"u{i}"], vectors[i]) for i in (1, 3))
        sample = store.sample_vectors(10)
        assert len(sample) == 10
        assert all(np.array_equal(vector, vectors[int(name[1:])]) for name, vector in sample.items())
        assert [np.array_equal(vector, vectors[i]) for i, (_, vector) in enumerate(store.export_rows())] == [True] * 40
        cosines = store.similarities("fact", ["u1", "none"])
        query = FakeEmbedder(DIM).vector("fact")
        assert cosines == {"u1": pytest.approx(float(vectors[1] @ query / np.linalg.norm(vectors[1])), abs=1e-5)}


def assert_typed(value: Any, kind: Any, where: str = "report") -> None:
    """Compare a value with a type: typed dictionaries with their keys, lists and unions with their parts."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        assert set(kind.__required_keys__) <= set(value) <= set(hints), where
        for key, held in value.items():
            assert_typed(held, hints[key], f"{where}[{key!r}]")
    elif origin in (Union, UnionType):
        named = next((one for one in inner if one is not type(None)), None)
        if value is not None:
            assert_typed(value, named, where)
    elif origin in (list, tuple):
        assert isinstance(value, origin), where
        for at, held in enumerate(value):
            assert_typed(held, inner[0], f"{where}[{at}]")
    elif origin is dict:
        assert isinstance(value, dict), where
        for key, held in value.items():
            assert_typed(held, inner[1], f"{where}[{key!r}]")
    else:
        accepted = (int, float) if kind is float else kind
        assert isinstance(value, accepted), f"{where}: {value!r} is no {kind}"
        assert kind is bool or not isinstance(value, bool), f"{where}: {value!r} is no {kind}"


def oracle(queries: Any, vectors: Any, metric: str) -> Any:
    if metric == "l2":
        return np.square(queries[:, None, :] - vectors[None, :, :]).sum(axis=2)
    dots = queries @ vectors.T
    if metric == "ip":
        return -dots
    return 1 - dots / (np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1))


class TestFilters:
    UNITS: tuple[dict[str, Any], ...] = (
        {"id": "a", "type": "skill", "tags": ["git", "linux"], "metadata": {"score": 0.5, "n": 1, "big": 2**53}},
        {"id": "b", "type": "tool", "tags": ["git"], "metadata": {"score": 1, "n": "1", "big": 2**53 + 1}},
        {"id": "c", "type": "lesson", "tags": [], "metadata": {"score": None, "n": True, "big": 2.0**63}},
        {"id": "d", "tags": "git", "metadata": {"n": 1.0, "list": [None, 3, "x", [9], {"y": 9}], "big": 2**63}},
        {"id": "e", "type": ["skill", 7], "tags": {"0": "git"}, "metadata": {"score": [-5, 80]}, 'odd "k"[0] é\n': 5},
        {"id": "f", "type": "a" * 24 + "m", "tags": HOSTILE, "metadata": {"score": -0.0, "many": list(range(3_000))}},
        {"id": "g", "type": "a" * 24 + "n", "metadata": {"score": -1.5, "n": 0}},
    )
    FILTERS: tuple[dict[str, Any] | None, ...] = (
        None,
        {},
        {"type": "skill"},
        {"type": ["skill", "tool"]},
        {"type": []},
        {"type": 7},
        {"type": {"ne": "skill"}},
        {"type": {"nin": []}},
        {"type": {"nin": ["skill", "tool"]}},
        {"type": {"exists": False}},
        {"type": {"exists": True}},
        {"type": None},
        {"type": {"gt": "skill"}},
        {"type": {"lte": "skill"}},
        {"type": {"lt": 10}},
        {"type": {"gt": "a" * 24 + "m"}},
        {"type": {"lt": "a" * 24 + "n"}},
        {"type": {"gte": ""}},
        {"tags": {"in": ["git"], "ne": "linux"}},
        {"tags.0": "git"},
        {"metadata.score": {"gte": 0.5, "lt": 1}},
        {"metadata.score": {"gt": -1}},
        {"metadata.score": {"lt": 0}},
        {"metadata.score": {"lte": 0}},
        {"metadata.score": {"gt": 50}},
        {"metadata.score": 0},
        {"metadata.score": None},
        {"metadata.score": {"ne": None}},
        {"metadata.n": 1},
        {"metadata.n": "1"},
        {"metadata.n": True},
        {"metadata.n": {"nin": [1, False]}},
        {"metadata.list": None},
        {"metadata.list": {"gt": 2}},
        {"metadata.list.y": 9},
        {"metadata.big": 2**53},
        {"metadata.big": 2**53 + 1},
        {"metadata.big": {"gt": 2**53}},
        {"metadata.big": {"lte": 2**53}},
        {"metadata.big": {"lt": 2.0**63}},
        {"metadata.big": 2**63},
        {"metadata.many": 2_999},
        {"metadata.many": {"nin": [3_000]}},
        {"metadata.many": {"gt": 2_998}},
        {'odd "k"[0] é\n': {"gte": 5}},
        {"metadata.none": {"ne": 1}},
        *({"tags": text} for text in HOSTILE),
        *({text: {"exists": True}} for text in HOSTILE),
        *({"type": {"gte": text}} for text in HOSTILE),
    )

    def test_every_filter_means_what_the_definition_says(self, make: Make) -> None:
        store = make()
        store.store_batch([dict(unit, content="x") for unit in self.UNITS])
        kept = store.retrieve_all()
        for filters in self.FILTERS:
            expected = {unit["id"] for unit in kept if matches(filters, unit)}
            assert ids_of(store, filters) == expected, filters
            assert {unit_id for _, unit_id in store.search("x", 20, filters)} == expected, filters

    def test_a_filter_leaves_top_k_where_there_are_so_many(self, make: Make) -> None:
        store = make()
        store.store_batch(units(300))
        for filters, expected in (
            ({"metadata.score": {"lt": 0.02}}, 6),
            ({"type": "tool", "tags": "t0"}, 15),
            ({"metadata.score": {"gte": 0.5}}, 20),
            ({"type": {"ne": "tool"}}, 20),
        ):
            found = store.search_units("fact number 299", 20, filters)
            assert len(found) == expected
            assert all(matches(filters, hit.unit) for hit in found)

    def test_filters_follow_every_kind_of_change(self, make: Make) -> None:
        store = make()
        store.store_batch(units(100))
        store.store({"id": "new", "type": "tool", "content": "x"})
        store.update("u0", {**units(100)[0], "type": "tool"})
        store.delete("u2")
        expected = {f"u{i}" for i in range(100) if i % 4 == 2} - {"u2"} | {"new", "u0"}
        assert ids_of(store, {"type": "tool"}) == expected
        assert {unit_id for _, unit_id in store.search("fact", 200, {"type": "tool"})} == expected

    def test_outside_the_grammar_is_an_error(self, make: Make) -> None:
        store = make()
        store.store_batch(units(3))
        outside: list[Any] = [{"a": {"near": 1}}, {"": 1}, {"a": {}}, {"a": float("nan")}, {1: 2}, "type"]
        for bad in outside:
            with pytest.raises(InvalidFilterError):
                store.search("x", filters=bad)
            with pytest.raises(InvalidFilterError):
                store.units(bad)

    def test_what_is_empty_and_no_mapping_is_no_filter(self, make: Make) -> None:
        """No filter is ``None`` or ``{}``; whatever else is false is an error and changes nothing."""
        store = make()
        store.store_batch(units(3))
        arguments = {"query": "fact", "queries": np.ones((1, DIM)), "changes": {"content": "new"}, "field": "type"}
        signatures = {
            name: inspect.signature(getattr(store, name)).parameters
            for name in dir(StorageBackend)
            if not name.startswith("_") and callable(getattr(StorageBackend, name))
        }
        calls = {name: found for name, found in signatures.items() if "filters" in found}
        assert {"search", "search_units", "search_vectors", "units", "count", "delete_where", "facets"} <= set(calls)
        capable = [name for name in calls if name not in base.OPTIONAL or name in store.capabilities]
        nothing: list[Any] = [[], "", 0, 0.0, False, (), set(), b""]
        for name in capable:
            given = {key: arguments[key] for key in calls[name] if key in arguments}
            for bad in nothing:
                with pytest.raises(InvalidFilterError, match="mapping"):
                    getattr(store, name)(filters=bad, **given)
        assert len(list(store.units())) == 3
        assert store.count(filters={}) == store.count(filters=None) == 3


ODD: list[Any] = [3, 1.5, "b", None, True, ["x", 2], {"k": 1}, "B", False, 2**60, "é", [], -1, 3.0]


def order_key(value: Any) -> tuple[int, Any]:
    kinds = {type(None): 0, bool: 1 + (value is True), int: 3, float: 3, str: 4}
    return kinds.get(type(value), 5), value if type(value) in (int, float, str) else 0


class TestReading:
    def filled(self, make: Make) -> Any:
        store = make()
        extra = [{} if n == 20 else {"v": ODD[n % len(ODD)]} for n in range(30)]
        store.store_batch([{**unit, **more} for unit, more in zip(units(30), extra, strict=True)])
        return store

    @pytest.mark.parametrize("order_by", [None, "v", "-v", "metadata.score", "-metadata.score", "id"])
    @pytest.mark.parametrize("filters", [None, {"or": [{"type": "tool"}, {"v": {"exists": True}}]}])
    def test_pages_are_the_whole_in_order(self, make: Make, order_by: str | None, filters: Any) -> None:
        store = self.filled(make)
        expected = [unit for unit in store.retrieve_all() if matches(filters, unit)]
        if order_by is not None:
            path = order_by.removeprefix("-").split(".")

            def key(unit: Any) -> tuple[int, Any]:
                for part in path:
                    unit = unit.get(part)
                return order_key(unit)

            expected.sort(key=key, reverse=order_by.startswith("-"))
        ids = [unit["id"] for unit in expected]
        assert [unit["id"] for unit in store.units(filters, order_by=order_by)] == ids
        found: list[str] = []
        cursor = None
        while True:
            page = store.units(filters, order_by=order_by, limit=4, after=cursor)
            more = [unit["id"] for unit in page]
            if not more:
                break
            assert page.cursor != cursor
            found, cursor = [*found, *more], page.cursor
        assert found == ids
        assert list(store.units(filters, limit=0)) == []
        if cursor is not None:
            with pytest.raises(InvalidQueryError, match="same kind and order"):
                list(store.units(filters, order_by="metadata.other", after=cursor))
        for bad in ("nonsense", "[1]", 7):
            with pytest.raises(InvalidQueryError, match="after"):
                list(store.units(after=bad))
        with pytest.raises(InvalidQueryError, match="order_by"):
            store.units(order_by="a..b")

    def test_values_are_counted(self, make: Make) -> None:
        store = self.filled(make)
        assert store.facets("v")[:4] == [(3, 5), (1.5, 3), (None, 2), (False, 2)]
        assert store.facets("v") == StorageBackend.facets(store, "v")
        assert dict(store.facets("tags", {"id": ["u0", "u5", "u1"]})) == {"all": 3, "t0": 2, "t1": 1}
        assert store.facets("type", {"type": {"ne": "tool"}}, limit=1) == [("lesson", 8)]
        store.update("u0", {"content": "changed", "tags": ["t1", "t1"]})
        store.delete("u1")
        assert dict(store.facets("tags", {"id": ["u0", "u5", "u1"]})) == {"all": 1, "t0": 1, "t1": 1}
        assert store.count({"tags": "t1"}) == 6

    def test_parts_are_changed(self, make: Make) -> None:
        embedder = FakeEmbedder(DIM)
        store = make(embedder=embedder)
        store.store_batch(units(20))
        before, calls = store.retrieve("u3"), embedder.calls
        assert store.patch("u3", {"metadata": {"score": 9, "new": {"a": 1}}, "tags": None})
        after = store.retrieve("u3")
        assert before is not None
        assert after is not None
        assert after["metadata"]["score"] == 9
        assert after["metadata"]["created_at"] == before["metadata"]["created_at"]
        assert after["content"] == before["content"]
        assert "tags" not in after
        assert store.patch("u3", {"metadata": {"new": None}, "content": "entirely other words"})
        assert store.search("entirely other words", 1)[0][1] == "u3"
        assert embedder.calls > calls
        assert not store.patch("none", {"content": "x"})
        for bad in ({"id": "u4"}, {"metadata": 3}, "text", {"content": float("nan")}):
            with pytest.raises(InvalidUnitError):
                store.patch("u3", bad)
        assert store.update_where({"type": "tool"}, {"metadata": {"seen": True}}) == 5
        assert store.update_where({"type": "none"}, {"metadata": {"seen": True}}) == 0
        with pytest.raises(InvalidUnitError):
            store.update_where({"type": "tool"}, {"metadata": {"seen": float("inf")}})
        assert ids_of(store, {"metadata.seen": True}) == ids_of(store, {"type": "tool"})
        assert store.delete_where({"not": {"metadata.seen": True}}) == 15
        assert store.count() == 5
        without: list[Any] = [{}, {"and": []}, None, {"not": {"or": []}}]
        for every in without:
            with pytest.raises(InvalidFilterError, match="condition"):
                store.delete_where(every)
            with pytest.raises(InvalidFilterError, match="condition"):
                store.update_where(every, {"metadata": {"seen": False}})
        assert store.count() == store.count({"metadata.seen": True}) == 5
        assert store.update_where({"id": {"exists": True}}, {"metadata": {"seen": False}}) == 5

    def test_a_unit_that_is_stored_again_keeps_its_age_and_a_superseded_one_goes(self, make: Make) -> None:
        store = make()
        store.store({"id": "a", "content": "one", "metadata": {"created_at": "2020-01-01T00:00:00+00:00"}})
        store.store({"id": "a", "content": "two", "metadata": {"k": 1}})
        store.store_batch([{"id": "a", "content": "three"}, {"id": "b", "content": "four"}])
        metadata = store.get_metadata("a")
        assert metadata == {"created_at": "2020-01-01T00:00:00+00:00"}
        assert store.get_metadata("b") != metadata
        store.store({"id": "a", "content": "five", "metadata": {"created_at": "2021-01-01"}})
        assert store.get_metadata("a") == {"created_at": "2021-01-01"}
        assert store.store({"id": "c", "content": "six"}, replaces="a") == "c"
        assert not store.exists("a")
        with pytest.raises(ConflictError) as caught:
            store.store({"id": "d", "content": "seven"}, replaces="a")
        assert caught.value.ids == ["a"]
        assert "delete_ids" not in str(caught.value)
        with pytest.raises(ConflictError):
            store.store({"id": "d", "content": "seven"}, replaces="d")
        assert store.store({"id": "b", "content": "eight"}, replaces="b") == "b"
        assert {unit["id"] for unit in store.retrieve_all()} == {"b", "c"}

    def test_searches_are_paged_and_cut_by_score(self, make: Make) -> None:
        store = make()
        store.store_batch(units(40))
        hits = store.search_units("fact number 7", 20)
        paged = [hit.id for at in range(0, 20, 6) for hit in store.search_units("fact number 7", 6, offset=at)][:20]
        assert paged == [hit.id for hit in hits]
        assert [one for _, one in store.search("fact number 7", 5, offset=3)] == [hit.id for hit in hits[3:8]]
        least = hits[4].score
        assert [hit.id for hit in store.search_units("fact number 7", 20, min_score=least)] == [
            hit.id for hit in hits if hit.score >= least
        ]
        assert len(store.search("fact number 7", 20, min_score=least)) == sum(hit.score >= least for hit in hits)
        for bad in (-1, 1.5, None, True):
            with pytest.raises(InvalidQueryError, match="offset"):
                store.search("x", offset=bad)
        with pytest.raises(InvalidQueryError, match="min_score"):
            store.search_units("x", min_score="high")

    @pytest.mark.parametrize("weights", [None, {"recency": 0.4}, {"recency": 1, "importance": 0.2}])
    @pytest.mark.parametrize("metric", ["l2", "cosine"])
    def test_ranking_is_that_of_a_full_scan(self, make: Make, metric: str, weights: Any) -> None:
        store = make(metric=metric)
        rng = random.Random(7)
        given = []
        for number in range(200):
            created = datetime.fromtimestamp(1_700_000_000 + rng.randrange(200 * 86_400), timezone.utc).isoformat()
            odd: dict[str, Any] = rng.choice(
                [{}, {"importance": rng.random()}, {"importance": "high"}, {"importance": 7}]
            )
            metadata = {"created_at": created if number % 9 else "long ago", **odd}
            given.append(
                {"id": f"u{number}", "content": f"fact {rng.randrange(60)} {number % 13}", "metadata": metadata}
            )
        store.store_batch(given)
        now, half = 1_700_000_000 + 200 * 86_400, 30 * 86_400
        options: dict[str, Any] = {"recency": HalfLife("30d", now=float(now)), "importance": "metadata.importance"}
        for filters in (None, {"metadata.importance": {"exists": True}}):
            expected = []
            for hit in store.search_units("fact 7 3", 200, filters, 1.0):
                stamp = parse_stamp(hit.unit["metadata"]["created_at"])
                decay = 0.5 if stamp is None else 0.5 ** (max(0.0, now - stamp) / half)
                value = hit.unit["metadata"].get("importance")
                value = min(1.0, value) if isinstance(value, (int, float)) else 0.5
                w, v = (weights or {}).get("recency", 1), (weights or {}).get("importance", 1)
                similarity = 1 / (1 + hit.distance) if metric == "l2" else max(0.0, 1 - hit.distance)
                expected.append((similarity * (1 - w + w * decay) * (1 - v + v * value), hit.id))
            expected.sort(key=lambda pair: -pair[0])
            found = store.search_units("fact 7 3", 10, filters, 1.0, weights=weights, **options)
            assert [hit.score for hit in found] == pytest.approx([score for score, _ in expected[:10]], rel=1e-5)
            assert [hit.id for hit in found] == [unit_id for _, unit_id in expected[:10]]
            later = store.search_units("fact 7 3", 10, filters, 1.0, weights=weights, offset=10, **options)
            assert [hit.score for hit in later] == pytest.approx([score for score, _ in expected[10:20]], rel=1e-5)
        bad: list[dict[str, Any]] = [{"recency": "30d"}, {"importance": ""}, {"weights": {"age": 1}}]
        bad += [{"importance": "a", "weights": {"importance": 2}}]
        for one in bad:
            with pytest.raises(InvalidQueryError):
                store.search_units("x", **one)
        for name, other in (("recency", {"importance": "a"}), ("importance", {"recency": HalfLife("1d")})):
            lone: list[dict[str, Any]] = [{}, other]
            for one in lone:
                with pytest.raises(InvalidQueryError, match=f"give {name}= too"):
                    store.search_units("x", weights={name: 0.5}, **one)


class TestRefusals:
    def test_units_that_cannot_be_kept_are_refused_and_nothing_is_written(self, make: Make) -> None:
        store = make()
        store.store({"id": "before", "content": "kept"})
        nameless = {"id": "", "content": "a"}
        bad: list[Any] = ["text", {"content": float("nan")}, {"content": {1: 2}}, nameless, {"content": "\ud800"}]
        for unit in bad:
            with pytest.raises(InvalidUnitError):
                store.store(unit)
            with pytest.raises(InvalidUnitError, match=r"units\[1\]"):
                store.store_batch([{"content": "fine"}, unit])
            with pytest.raises(InvalidUnitError):
                store.update("before", {"x": float("inf")} if unit is nameless else unit)
            assert [one["id"] for one in store.retrieve_all()] == ["before"]

    def test_vectors_and_queries_are_checked(self, make: Make) -> None:
        store = make()
        store.store_batch(units(3))
        with pytest.raises(DimensionMismatchError):
            store.search_vectors(np.ones((1, DIM + 1)))
        with pytest.raises(InvalidVectorError):
            store.store_batch([{"content": "a"}], [[float("nan")] * DIM])
        with pytest.raises(EmbeddingError, match="2 rows for 1 units"):
            store.store_batch([{"content": "a"}], np.ones((2, DIM)))
        for bad in (0, -1, 2.5, True, None):
            with pytest.raises(InvalidQueryError, match="top_k"):
                store.search("x", bad)
        for recall in (0, 1.5, "all"):
            with pytest.raises(InvalidQueryError, match="recall"):
                store.search("x", recall=recall)
        with pytest.raises(InvalidQueryError):
            store.search(7)
        with pytest.raises(InvalidQueryError):
            store.register_management_operation("paint", {})
        assert store.count() == 3

    def test_zero_vectors_are_refused_under_cosine_only(self, make: Make) -> None:
        for metric in ("l2", "cosine"):
            store = make(metric, metric=metric)
            if metric == "l2":
                store.store_batch([{"content": "a"}], np.zeros((1, DIM)))
            else:
                with pytest.raises(InvalidVectorError, match="zero vector"):
                    store.store_batch([{"content": "a"}], np.zeros((1, DIM)))

    def test_a_failing_embedding_function_changes_nothing(self, make: Make) -> None:
        embedder = FakeEmbedder(DIM)
        store = make(embedder=embedder)
        store.store({"id": "a", "content": "kept"})
        acts: list[Callable[[], object]] = [
            lambda: store.store({"content": "b"}),
            lambda: store.store_batch([{"content": "c"}, {"content": "d"}]),
            lambda: store.update("a", {"content": "changed"}),
        ]
        for act in acts:
            embedder.failing = OSError("the service is down")
            with pytest.raises(EmbeddingError, match="the service is down"):
                act()
        assert [unit["content"] for unit in store.retrieve_all()] == ["kept"]

    def test_a_full_store_refuses_and_changes_nothing_but_updates_and_deletes_work(self, make: Make) -> None:
        store = make(max_memory_units=5)
        store.store_batch(units(4))
        with pytest.raises(CapacityError, match="MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS"):
            store.store_batch([{"content": "a"}, {"content": "b"}])
        assert store.count() == 4
        store.store({"content": "fits"})
        with pytest.raises(CapacityError):
            store.store({"content": "does not"})
        store.store({"id": "u1", "content": "replaces"})
        assert store.update("u2", {"content": "changes"})
        assert store.delete("u3")
        store.store({"content": "fits again"})
        assert store.count() == 5
        health = store.get_storage_health()
        assert (health["at_limit"], health["usage_percentage"]) == (True, 1.0)

    def test_a_closed_store_says_so(self, make: Make) -> None:
        store = make()
        store.close()
        store.close()
        with pytest.raises(StoreClosedError):
            store.count()
        with pytest.raises(StoreClosedError):
            store.search("x")
        with pytest.raises(StoreClosedError):
            store.store({"content": "a"})
        assert "closed" in repr(store)

    def test_what_a_store_was_made_with_cannot_be_changed(self, make: Make) -> None:
        class Named(FakeEmbedder):
            model_name = "one"

        make(embedder=Named(DIM)).store({"content": "a"})
        assert make(embedder=FakeEmbedder(DIM)).embedding_dim == DIM
        other = Named(DIM)
        other.model_name = "two"
        with pytest.raises(ModelMismatchError, match=r"'one'.*'two'"):
            make(embedder=other)
        with pytest.raises(ConfigurationError, match=r"metric|METRIC"):
            make(metric="cosine")


class TestAround:
    def test_management_runs_on_it(self, make: Make) -> None:
        store = make()
        store.store_batch(units(40))
        store.store(
            {"id": "twin", "content": "fact number 3 about topic 3", "type": "abstraction", "tags": ["t3", "all"]}
        )
        manager = MemoryManager(store, SimpleManagementStrategy())
        count, ids = manager.deduplicate(0.999)
        assert (count, len(ids)) == (1, 1)
        assert manager.prune({"max_count": 30})[0] == 10
        assert manager.apply_forgetting("lru", 5)[0] == 5
        assert store.count() == 25
        metrics = manager.get_health_metrics()
        assert (metrics.total_units, sum(metrics.unit_types_distribution.values())) == (25, 25)
        assert metrics.oldest_unit_timestamp is not None
        assert metrics.oldest_unit_timestamp <= str(metrics.newest_unit_timestamp)

    def test_retrieval_runs_on_it(self, make: Make) -> None:
        store = make()
        store.store_batch(units(40))
        for strategy in (SemanticRetrievalStrategy(), HybridRetrievalStrategy()):
            found = strategy.retrieve("fact number 7 about topic 7", store, 3, {"type": "abstraction"})
            assert found[0].unit_id == "u7"
            assert all(one.unit["type"] == "abstraction" for one in found)

    def test_a_memory_system_runs_on_it(self, make: Make) -> None:
        system = MemorySystem(MemorySystemConfig(storage_backend=make(max_memory_units=50)))
        system.add_units(units(40))
        system.add_units([{"content": f"more {i}"} for i in range(20)])
        assert 20 <= system.storage.count() <= 50
        assert system.query_memory("more 3", 2)[0]["content"].startswith("more")

    def test_health_and_inventory(self, make: Make) -> None:
        store = make(max_memory_units=10)
        store.store_batch(units(9))
        health = store.get_storage_health()
        assert (health["current_count"], health["max_units"], health["near_limit"]) == (9, 10, True)
        assert any("full" in sentence for sentence in health["recommendations"])
        held = store.inventory()
        assert (held["count"], held["types"]["lesson"], held["bytes"] > 0) == (9, 3, True)
        assert store.statistics()["count"] == 9
        assert store.register_management_operation("prune", {"removed": 1})["decision"] in ("nothing", "append")

    def test_reports_have_the_keys_and_types_that_are_declared(self, make: Make) -> None:
        store = make(performance_threshold=50, index_type="ivf")
        for _ in range(2):
            assert_typed(store.get_storage_health(), report_types.StorageHealth)
            statistics = inspect.signature(store.statistics, eval_str=True).return_annotation
            assert_typed(store.statistics(), statistics)
            assert_typed(store.inventory(), report_types.Inventory)
            store.store_batch([{**unit, "id": f"{unit['id']}-{store.count()}"} for unit in units(150)])
            assert_typed(store.run_maintenance(), report_types.MaintenanceReport)
            store.search("fact")
            entry = store.register_management_operation("prune", {"removed": 1})
            assert_typed(entry, report_types.OperationEntry)
        assert_typed(store.retrain(), report_types.MaintenanceReport)
        assert_typed(store.get_storage_health(), report_types.StorageHealth)
        with pytest.raises(AssertionError):
            assert_typed({**store.inventory(), "more": 1}, report_types.Inventory)
        with pytest.raises(AssertionError):
            assert_typed({**store.inventory(), "count": "7"}, report_types.Inventory)

    def test_any_details_of_an_operation_are_kept(self, make: Make) -> None:
        store = make()
        for details in ODD_DETAILS:
            entry = store.register_management_operation("prune", details)
            kept = store.statistics()["management"][-1]
            assert kept["details"] == entry["details"]
            assert isinstance(kept["details"], dict)
            assert len(json.dumps(entry, allow_nan=False)) < 10_000

    def test_details_that_json_cannot_keep_are_kept_as_their_repr(self, make: Make) -> None:
        now = datetime(2026, 1, 2, tzinfo=timezone.utc)
        said = {"removed": np.int64(3), "when": now, 4: {"a"}, "share": float("nan"), "ids": ("x", "y")}
        entry = make().register_management_operation("forget", said)
        assert entry["details"] == {"removed": 3, "when": repr(now), "4": ["a"], "share": "nan", "ids": ["x", "y"]}

    def test_deletes_re_arm_the_warning(self, make: Make) -> None:
        store = make(max_memory_units=10)
        store.store_batch(units(9))
        assert store.statistics()["event_totals"]["near-limit"] == 1
        store.delete_batch(["u0", "u1", "u2"])
        assert store.delete("u3")
        store.store_batch(units(9))
        assert store.statistics()["event_totals"]["near-limit"] == 2
        store.clear()
        store.store_batch(units(9))
        assert store.statistics()["event_totals"]["near-limit"] == 3

    def test_state_moves_to_another_instance(self, make: Make, backend: str) -> None:
        store = make("first")
        store.store_batch(units(7))
        state = store.save_state()
        assert state["count"] == 7
        store.restore_state(state)
        assert store.count() == 7

    def test_a_copy_into_the_same_kind_is_whole(self, make: Make, backend: str) -> None:
        source, target = make("first"), make("second")
        source.store_batch(units(60))
        below = (
            [info for info in source.namespaces() if info.path != source.namespace_path]
            if backend == "namespace"
            else []
        )
        report = copy_store(source, target, replace=bool(below), page_size=16)
        whole = 60 + sum(info.count for info in below)
        assert (report.copied, report.count, report.recall_after) == (60, whole, 1.0)
        assert target.retrieve_all() == source.retrieve_all()
