"""A value is stored, embedded, filtered and managed as one and the same thing, whatever Python type it comes in."""

from __future__ import annotations

import enum
import json
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import FakeBatchEmbedder, each

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.components.store.units import unit_to_text
from memevolve_gpu.errors import InvalidUnitError
from memevolve_gpu.records.filters import canonical, matches

DIM = 8


class Kind(str, enum.Enum):
    SKILL = "skill"
    TOOL = "tool"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another text"


class Share(float):
    def __repr__(self) -> str:
        return "a share"


Pair = namedtuple("Pair", "left right")  # noqa: PYI024 - the kind that callers have


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorStore]:
    config = StorageConfig(background=False, max_memory_units=100_000)
    path: Path = tmp_path_factory.mktemp("plain") / "store"
    with VectorStore(path, FakeBatchEmbedder(DIM), DIM, storage_config=config) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _empty(store: VectorStore) -> None:
    store.clear()


def embedded(store: VectorStore) -> str:
    embedder = store.embedding_function
    assert isinstance(embedder, FakeBatchEmbedder)
    return embedder.texts[-1]


class TestMembersOfEnumerations:
    def test_are_stored_embedded_and_found_as_their_value(self, store: VectorStore) -> None:
        store.store({"id": Kind.TOOL, "type": Kind.SKILL, "content": Word("a text"), "tags": (Kind.TOOL, "x")})
        unit = store.retrieve("tool")
        assert unit is not None
        assert (unit["type"], unit["content"], unit["tags"]) == ("skill", "a text", ["tool", "x"])
        assert embedded(store) == "a text tool x skill"
        for filters in ({"type": Kind.SKILL}, {"tags": (Kind.TOOL,)}, {"type": {"ne": Kind.TOOL}}, {"id": Kind.TOOL}):
            assert [unit_id for _, unit_id in store.search("a text", 5, filters)] == ["tool"]
            assert canonical(filters) == canonical(json.loads(json.dumps(filters)))
        assert store.retrieve(Kind.TOOL) == unit
        assert store.exists(Kind.TOOL)
        assert list(store.retrieve_batch([Kind.TOOL])) == ["tool"]
        assert type(next(iter(store.retrieve_batch([Kind.TOOL])))) is str
        store.record_access([Kind.TOOL])
        assert store.access_counts()["tool"] >= 1

    def test_prune_spares_what_it_was_told_to_spare(self, store: VectorStore) -> None:
        store.store_batch([{"id": kind.name, "type": kind, "content": kind.name} for kind in Kind])
        strategy = SimpleManagementStrategy()
        assert strategy.prune(store, {"filters": {"type": {"ne": Kind.SKILL}}}).ids == ["TOOL"]
        assert strategy.prune(store, {"type": Kind.TOOL}).ids == []
        assert strategy.prune(store, {"type": [Kind.SKILL]}).ids == ["SKILL"]

    def test_ids_of_batches(self, store: VectorStore) -> None:
        assert [type(one) for one in store.store_batch([{"id": Kind.TOOL, "content": "one"}])] == [str]
        assert store.update(Kind.TOOL, {"content": "two", "type": Kind.SKILL})
        assert store.retrieve("tool") is not None
        assert store.delete_batch([Kind.TOOL]) == 1


@each(
    ("given_value", "plain"),
    [
        (np.int64(7), 7),
        (np.float64(0.5), 0.5),
        (np.float32(0.25), 0.25),
        (np.bool_(True), True),
        (np.str_("text"), "text"),
        (Level.HIGH, 2),
        (Share(0.5), 0.5),
        (Word("word"), "word"),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc), "2026-01-02T03:04:05+00:00"),
        (datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=5))), "2026-01-02T03:00:00+05:00"),
        (date(2026, 1, 2), "2026-01-02"),
    ],
)
def test_a_scalar_is_read_as_it_was_written(store: VectorStore, given_value: Any, plain: Any) -> None:
    store.store({"id": "one", "content": "text", "value": given_value, "tags": [given_value]})
    unit = store.retrieve("one")
    assert unit is not None
    assert unit["value"] == plain
    assert type(unit["value"]) is type(plain)
    assert embedded(store) == f"text {plain}"
    for filters in ({"value": given_value}, {"value": [given_value]}, {"value": plain}, {"tags": given_value}):
        assert [one["id"] for one in store.units(filters)] == ["one"]
        assert matches(filters, unit)
        assert matches(filters, {"value": given_value, "tags": (given_value,)})
    assert list(store.units({"value": {"ne": given_value}})) == []


def test_a_naive_moment_gets_the_offset_of_local_time(store: VectorStore) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001 - that is the point
    store.store({"id": "one", "content": "text", "at": moment})
    unit = store.retrieve("one")
    assert unit is not None
    assert datetime.fromisoformat(unit["at"]) == moment.astimezone()


def test_what_has_no_plain_form_is_refused(store: VectorStore) -> None:
    for value in (object(), {1, 2}, b"bytes", 1j, np.complex64(1), np.zeros(3), enum.Enum("E", "A").A):  # type: ignore[attr-defined]
        with pytest.raises(InvalidUnitError, match=r"^unit .*JSON"):
            store.store({"content": "text", "value": value})
    assert store.count() == 0


def test_a_change_of_the_caller_during_embedding_does_not_reach_the_store(store: VectorStore) -> None:
    unit: dict[str, Any] = {"id": "one", "content": "text", "tags": ["a"], "metadata": {"list": [{"deep": [1]}]}}
    embedder = store.embedding_function
    assert isinstance(embedder, FakeBatchEmbedder)

    def meddling(text: str) -> Any:
        unit["tags"].append("b")
        unit["metadata"]["list"][0]["deep"].append(2)
        unit["content"] = "changed"
        return embedder.vector(text)

    held = store._open.embedder.embedder
    assert held is not None
    held._function = meddling
    try:
        store.store(unit)
        store.update("one", {**unit, "content": "new text"})
    finally:
        held._function = embedder
    found = store.retrieve("one")
    assert found is not None
    assert found["content"] == "new text"
    assert found["tags"] == ["a", "b"]
    assert found["metadata"]["list"] == [{"deep": [1, 2]}]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
strings = st.one_of(texts, st.sampled_from(list(Kind)), texts.map(Word), texts.map(np.str_))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.booleans().map(np.bool_),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**31), 2**31 - 1).map(np.int64),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(np.float32),
    st.floats(allow_nan=False, allow_infinity=False).map(Share),
    st.sampled_from(list(Level)),
    st.datetimes(timezones=st.just(timezone.utc)),
    strings,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.tuples(inner, inner).map(lambda two: Pair(*two)),
        st.dictionaries(strings, inner, max_size=3),
        st.dictionaries(texts, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=8,
)
units = st.fixed_dictionaries(
    {"content": strings.filter(lambda text: bool(str.__str__(text).strip()))},
    optional={
        "type": strings,
        "tags": st.one_of(st.lists(scalars, max_size=4), st.lists(strings, max_size=4).map(tuple)),
        "reasoning": values,
        "query": values,
        "value": values,
    },
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unit=units)
def test_what_is_read_is_what_was_embedded_and_filtered(store: VectorStore, unit: dict[str, Any]) -> None:
    unit_id = store.store(unit)
    found = store.retrieve(unit_id)
    assert found is not None
    assert json.loads(json.dumps(found)) == found
    assert embedded(store) == unit_to_text(found)
    assert [one["id"] for one in store.units({"id": unit_id, "content": unit["content"]})] == [unit_id]
    for name in ("type", "value"):
        value = unit.get(name)
        if name in unit and not isinstance(value, (list, tuple, dict)):
            for filters in ({"id": unit_id, name: value}, {"id": unit_id, name: found[name]}):
                assert [one["id"] for one in store.units(filters)] == [unit_id]
                assert matches(filters, found)
    store.delete(unit_id)


def test_a_query_is_embedded_as_the_text_that_a_unit_would_hold(tmp_path: Path) -> None:
    embedder = FakeBatchEmbedder(DIM)
    config = StorageConfig(background=False)
    with VectorStore(tmp_path / "store", embedder, DIM, storage_config=config) as store:
        store.store({"id": "a", "content": "skill"})
        for query in (Kind.SKILL, Word("skill")):
            assert [unit_id for _, unit_id in store.search(query, 1)] == ["a"]
            assert store.similarities(query, ["a"]) == store.similarities("skill", ["a"])
    assert {type(text) for text in embedder.texts} == {str}
    assert set(embedder.texts) == {"skill"}
