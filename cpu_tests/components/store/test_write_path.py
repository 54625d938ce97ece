"""A write does its work once: one JSON text for each unit, one parse of the old one, one way into the indexes."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import FakeEmbedder

from memevolve_gpu import InvalidUnitError, StorageConfig, VectorStore
from memevolve_gpu.records.fulltext_buffer import FOLD_AT

DIM = 8


class Kind(str, Enum):
    """A type of unit as callers may have it."""

    LESSON = "lesson"


ODD: list[dict[str, Any]] = [
    {"type": "lesson", "tags": ["b", "a", "a", ""]},
    {"type": Kind.LESSON, "tags": ("x", Kind.LESSON)},
    {"type": ["skill", "tool", 3, None, ["deep"]], "tags": "alone"},
    {"type": {"name": "inner"}, "tags": {"key": "value"}},
    {"type": None, "tags": [1, True, None, {"a": "b"}]},
    {"type": "ends\0here", "tags": ["\0", "ü\0", 'quote " back \\ slash', "line\nend", "\u2028", "😀"]},
    {"tags": ["x" * 3000]},
    {},
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    config = StorageConfig(background=False, index_type="flat")
    with VectorStore(tmp_path / "store", FakeEmbedder(DIM), storage_config=config) as opened:
        yield opened


def many(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"id": f"u{n}", "content": f"word{n} common", **ODD[n % len(ODD)], **fields} for n in range(count)]


Count = Callable[[Callable[[], object]], int]


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Counts how many dicts are written as JSON during a call."""
    make, seen = json.encoder.c_make_encoder, list[Any]()  # type: ignore[attr-defined]

    def counting(*arguments: Any) -> Callable[..., Any]:
        encode = make(*arguments)

        def encoded(value: Any, level: int) -> Any:
            seen.extend([value] if isinstance(value, dict) else [])
            return encode(value, level)

        return encoded

    def count(call: Callable[[], object]) -> int:
        seen.clear()
        call()
        return len(seen)

    monkeypatch.setattr("json.encoder.c_make_encoder", counting)
    return count


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Counts how many JSON texts are parsed during a call."""
    parse, seen = json.loads, list[Any]()

    def counting(text: Any, **options: Any) -> Any:
        seen.append(text)
        return parse(text, **options)

    def count(call: Callable[[], object]) -> int:
        seen.clear()
        call()
        return len(seen)

    monkeypatch.setattr("json.loads", counting)
    return count


def test_a_write_encodes_each_unit_once(store: VectorStore, encodings: Count) -> None:
    assert encodings(lambda: store.store({"id": "a", "content": "first", "metadata": {"n": 1}})) == 1
    assert encodings(lambda: store.store({"content": "without an id"})) == 1
    assert encodings(lambda: store.store_batch(many(20))) == 20
    assert encodings(lambda: store.update("a", {"content": "first", "n": 2})) == 1
    assert encodings(lambda: store.update("a", {"content": "second"})) == 1
    assert encodings(lambda: store.patch("a", {"metadata": {"n": 2}})) == 1
    assert store.check() == []


def test_an_update_parses_the_old_unit_once(store: VectorStore, parses: Count) -> None:
    store.store_batch([{"id": f"u{n}", "content": f"word{n}", "tags": ["a"]} for n in range(FOLD_AT)])  # all merged
    assert parses(lambda: store.update("u1", {"content": "word1", "tags": ["a"], "n": 2})) == 1
    assert parses(lambda: store.update("u2", {"content": "another text", "tags": ["b"]})) == 1
    assert parses(lambda: store.patch("u3", {"metadata": {"n": 2}})) == 1
    assert store.check() == []


def test_what_another_writer_changed_meanwhile_is_what_an_update_sees(tmp_path: Path) -> None:
    config = StorageConfig(background=False, index_type="flat")
    change: list[dict[str, Any]] = []

    class Meddling(FakeEmbedder):
        """Another store changes the unit while the new text is embedded, which happens outside the lock."""

        def __call__(self, text: str) -> np.ndarray:
            if change and text == "second":
                other.store(change.pop())
            return super().__call__(text)

    with (
        VectorStore(tmp_path / "store", FakeEmbedder(DIM), storage_config=config) as other,
        VectorStore(tmp_path / "store", Meddling(DIM), storage_config=config) as store,
    ):
        store.store({"id": "a", "content": "first", "metadata": {"created_at": "2020-01-01"}})
        change.append({"id": "a", "content": "theirs", "metadata": {"created_at": "2021-01-01"}})
        assert store.update("a", {"content": "second"})
        held = store.retrieve("a")
        assert held is not None
        assert (held["content"], held["metadata"]["created_at"]) == ("second", "2021-01-01")
        assert [version.change for version in store.history("a")] == ["put", "put", "put"]
        assert store.check() == []


@pytest.mark.parametrize("path", [(), ("alice",)])
def test_a_batch_is_indexed_as_single_writes_are(store: VectorStore, path: tuple[str, ...], tmp_path: Path) -> None:
    units = many(FOLD_AT + 10)
    with VectorStore(tmp_path / "other", FakeEmbedder(DIM), storage_config=store.config) as other:
        whole, single = (one.namespace(*path) if path else one for one in (store, other))
        whole.store_batch(units)  # more than the notes take, so it never lies in them
        for unit in units:
            single.store(unit)
        assert store.check() == other.check() == []
        for filters in ({"type": "lesson"}, {"type": "tool"}, {"tags": "a"}, {"tags": "alone"}, {"tags": "x" * 3000}):
            assert whole.count(filters) == single.count(filters) > 0
        for words in ("word7", "word200", "common", "word7 word8"):
            found = [{name: score for score, name in one.search_keywords(words, 300)} for one in (whole, single)]
            assert found[0] == pytest.approx(found[1])
            assert found[0]


def test_batches_follow_notes_and_replace_across_their_parts(store: VectorStore) -> None:
    store.store_batch(many(100))
    store.delete_batch([f"u{n}" for n in range(50)])
    store.store_batch(many(2500, tags=["first"]))
    store.delete_batch([f"u{n}" for n in range(10)])
    again = [{"id": f"u{n % 1100}", "content": f"again{n}", "tags": ["second"]} for n in range(2300)]
    store.store_batch(again)
    assert store.check() == []
    assert (store.count(), store.count({"tags": "second"})) == (2500, 1100)
    assert [unit_id for _, unit_id in store.search_keywords("again2299", 5)] == ["u99"]
    assert store.search_keywords("again7", 5) == []


def test_a_stored_unit_is_what_was_given(store: VectorStore) -> None:
    given = {"content": "c", "empty": {}, "metadata": {"n": 1.5}, "list": [1, "ü", None, True]}
    automatic = store.store(given)
    assert store.store({**given, "id": None}) == "unit_1"
    assert store.store_batch([given, {**given, "id": "named"}, given]) == ["unit_2", "named", "unit_3"]
    created = set()
    for unit_id in (automatic, "unit_1", "unit_2", "named", "unit_3"):
        held = store.retrieve(unit_id)
        assert held is not None
        created.add(held["metadata"].pop("created_at"))
        assert held == {**given, "id": unit_id}
    assert all(isinstance(one, str) for one in created)
    assert store.check() == []


@pytest.mark.parametrize(
    "bad",
    [{"content": "c", "n": float("nan")}, {"content": "\ud800"}, {"content": "c", "x": {1}}, {"content": 2**15000}],
)
def test_what_has_no_form_in_json_is_refused_before_it_is_embedded(tmp_path: Path, bad: dict[str, Any]) -> None:
    config = StorageConfig(background=False, index_type="flat")
    asked: list[str] = []

    def embed(text: str) -> np.ndarray:
        asked.append(text)
        return np.ones(DIM, np.float32)

    with VectorStore(tmp_path / "store", embed, DIM, storage_config=config) as store:
        store.store({"id": "a", "content": "c"})
        asked.clear()
        with pytest.raises(InvalidUnitError, match=r"^unit cannot be kept as JSON"):
            store.store(bad)
        with pytest.raises(InvalidUnitError, match=r"^units\[1\] cannot be kept as JSON"):
            store.store_batch([{"content": "c"}, bad])
        with pytest.raises(InvalidUnitError, match=r"^unit cannot be kept as JSON"):
            store.update("a", bad)
        assert asked == []
        assert store.count() == 1


def test_a_batch_keeps_no_copies_of_its_units(tmp_path: Path) -> None:
    units = [{"content": f"kept once {n}", "tags": ["a"], "metadata": {"deep": [n]}} for n in range(500)]
    known: list[int] = []

    class Counting(FakeEmbedder):
        def embed_batch(self, texts: Any) -> Any:
            dicts = (one for one in gc.get_objects() if type(one) is dict)
            known.append(sum(str(one.get("content")).startswith("kept once") for one in dicts))
            return np.stack([self(text) for text in texts])

    config = StorageConfig(background=False, index_type="flat")
    with VectorStore(tmp_path / "store", Counting(DIM), storage_config=config) as store:
        ids = store.store_batch(units)
        assert known
        assert max(known) < 1.1 * len(units)
        assert store.retrieve(ids[7])["tags"] == ["a"]  # type: ignore[index]
