"""What StorageBackend does for a backend that has no more than the ten methods, and for one that is not derived."""

from __future__ import annotations

import copy
import re
from abc import ABC
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_kit import Given, store_at, unit

from memevolve_gpu import (
    ConfigurationError,
    HashingEmbedder,
    InvalidFilterError,
    MemorySystem,
    MemorySystemConfig,
    StorageBackend,
    VectorStore,
)
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.components.retrieve import KeywordRetrievalStrategy, SemanticRetrievalStrategy
from memevolve_gpu.components.store.base import OPTIONAL
from memevolve_gpu.components.store.copy import copy_store
from memevolve_gpu.components.store.foreign import ForeignBackend, as_backend
from memevolve_gpu.components.validation import ScratchStore


class Foreign:
    """MemEvolve's methods, and no class of ours among its bases."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, Any]] = {}

    def store(self, unit: dict[str, Any]) -> str:
        name = unit.get("id") or f"unit_{len(self.held)}"
        self.held[name] = {**unit, "id": name}
        return name

    def store_batch(self, units: list[dict[str, Any]]) -> list[str]:
        return [self.store(one) for one in units]

    def retrieve(self, unit_id: str) -> dict[str, Any] | None:
        return copy.deepcopy(self.held.get(unit_id))

    def retrieve_all(self) -> list[dict[str, Any]]:
        return copy.deepcopy(list(self.held.values()))

    def update(self, unit_id: str, unit: dict[str, Any]) -> bool:
        return unit_id in self.held and bool(self.store({**unit, "id": unit_id}))

    def delete(self, unit_id: str) -> bool:
        return self.held.pop(unit_id, None) is not None

    def exists(self, unit_id: str) -> bool:
        return unit_id in self.held

    def count(self) -> int:
        return len(self.held)

    def clear(self) -> None:
        self.held.clear()

    def get_metadata(self, unit_id: str) -> dict[str, Any] | None:
        return self.held.get(unit_id, {}).get("metadata")


class TheirBase(ABC):  # noqa: B024 - MemEvolve's own base class, as far as it matters
    """An unrelated abstract class."""


class Theirs(Foreign, TheirBase):
    """A backend that derives from MemEvolve's base class."""


class Registered(Foreign):
    """A virtual subclass of ours, which has none of its methods."""


StorageBackend.register(Registered)


@pytest.fixture(params=[ScratchStore, Foreign, Theirs, Registered], ids=lambda kind: kind.__name__)
def minimal(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
def filled(minimal: Any) -> StorageBackend:
    minimal.store_batch(
        [
            unit("a", "red apple", metadata={"created_at": "2026-01-02T00:00:00+00:00"}),
            unit("b", "green pear", type="tool", metadata={"created_at": "2026-01-01T00:00:00+00:00"}),
            unit("c", "red apple", metadata={"created_at": "2026-01-03T00:00:00+00:00"}),
        ]
    )
    return as_backend(minimal)


def test_units_are_read_filtered_and_counted_by_the_ten_methods(filled: StorageBackend) -> None:
    assert filled.capabilities == frozenset()
    assert filled.change_number is None
    assert [one["id"] for one in filled.units({"type": "lesson"})] == ["a", "c"]
    with pytest.raises(InvalidFilterError):
        filled.units({"type": {"near": "x"}})
    assert list(filled.retrieve_batch(["c", "none", "a", "c"])) == ["c", "a"]
    assert (len(filled), "a" in filled, "z" in filled, 7 in filled) == (3, True, False, False)
    assert [one["id"] for one in filled] == ["a", "b", "c"]
    held = filled.inventory()
    assert (held["count"], held["types"]) == (3, {"lesson": 2, "tool": 1})
    assert held["bytes"] > 100
    assert (held["oldest"], held["newest"]) == ("2026-01-01T00:00:00+00:00", "2026-01-03T00:00:00+00:00")


def test_many_are_deleted_and_replaced_one_by_one(filled: StorageBackend) -> None:
    assert filled.replace_batch(["a", "c"], [unit("a", "new"), unit("d", "new")]) == ["a", "d"]
    assert [one["id"] for one in filled.retrieve_all()] == ["a", "b", "d"]
    assert filled.delete_batch(["b", "none", "d"], unchanged_since=3) == 2
    assert [one["id"] for one in filled.retrieve_all()] == ["a"]


def test_reports_say_what_is_known(filled: StorageBackend) -> None:
    assert filled.get_storage_health() == {"current_count": 3}
    assert filled.run_maintenance() == {"actions": [], "reason": ""}
    entry = filled.register_management_operation("prune", {"removed": 1})
    assert (entry["operation"], entry["details"], entry["decision"]) == ("prune", {"removed": 1}, "nothing")
    assert filled.register_management_operation("prune", 3)["details"] == {"details": 3}
    filled.record_access(["a"])
    filled.refresh()
    assert filled.access_counts() == {}
    assert filled.access_order("lru", 2) == ["a", "b"]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("search", ("x",)),
        ("search_units", ("x",)),
        ("search_vectors", ([[1.0]],)),
        ("search_keywords", ("x",)),
        ("similarities", ("x", ["a"])),
        ("vectors_of", (["a"],)),
        ("sample_vectors", (1,)),
        ("export_rows", ()),
    ],
)
def test_what_cannot_be_done_is_an_error_that_names_the_backend(
    minimal: Any, method: str, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(ConfigurationError, match=f"a {type(minimal).__name__} cannot .*; use a VectorStore"):
        getattr(as_backend(minimal), method)(*arguments)


def test_search_units_needs_no_more_than_search() -> None:
    class Searching(ScratchStore):
        metric = "cosine"

        def search(self, *_arguments: Any, **_options: Any) -> list[tuple[float, str]]:
            return [(0.25, "b"), (0.5, "gone"), (0.75, "a")]

    store = Searching([unit("a"), unit("b")])
    assert store.capabilities == {"search"}
    assert [(hit.id, hit.distance, hit.score) for hit in store.search_units("x")] == [
        ("b", 0.25, 0.75),
        ("a", 0.75, 0.25),
    ]


def test_strategies_and_the_memory_system_serve_it(minimal: Any, filled: StorageBackend) -> None:
    assert [one.unit_id for one in KeywordRetrievalStrategy().retrieve("pear", minimal, 1)] == ["b"]
    semantic = SemanticRetrievalStrategy(Given({"red": [1], "green": [0, 1]}))
    assert [one.unit_id for one in semantic.retrieve("green", minimal, 1)] == ["b"]
    assert [one.unit_id for one in semantic.retrieve_by_ids(["c", "none"], minimal)] == ["c"]
    strategy = SimpleManagementStrategy()
    assert strategy.get_health_metrics(minimal).duplicate_count == 1
    assert strategy.deduplicate(minimal, keep="oldest") == (1, ["c"])
    assert strategy.apply_forgetting(minimal, "lru", 1) == (1, ["a"])
    system = MemorySystem(MemorySystemConfig(storage_backend=minimal, auto_prune_threshold=2))
    assert system.get_storage_health() == {"current_count": 1}
    system.add_units([unit("d"), unit("e")])
    assert minimal.count() == filled.count() == 2


def test_a_backend_without_vectors_is_not_copied(minimal: Any, tmp_path: Path) -> None:
    with store_at(tmp_path) as store, pytest.raises(ConfigurationError, match="cannot give vectors"):
        copy_store(minimal, store)


class Proxy:
    """Counts the calls of a store that it is not derived from."""

    def __init__(self, store: VectorStore) -> None:
        self.store_behind, self.pages = store, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store_behind, name)

    def export_rows(self, page_size: int = 1000) -> Iterator[Any]:
        self.pages += 1
        return self.store_behind.export_rows(page_size)


def test_a_proxy_that_declares_capabilities_keeps_them(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        store.store_batch([unit("a"), unit("b")])
        proxy = Proxy(store)
        adapted = as_backend(proxy)
        assert isinstance(adapted, ForeignBackend)
        assert adapted.capabilities == store.capabilities
        assert (adapted.metric, adapted.change_number) == (store.metric, store.change_number)
        assert adapted.search("a", 1) == store.search("a", 1)
        assert len(list(adapted.export_rows())) == 2
        assert proxy.pages == 1


def test_our_own_backends_are_used_as_they_are(tmp_path: Path) -> None:
    with store_at(tmp_path) as store:
        assert as_backend(store) is store
        assert store.capabilities == OPTIONAL - {"refresh"}


def test_the_calls_of_other_stores_are_answered_with_ours(tmp_path: Path) -> None:
    """What somebody types who comes from another vector store; whatever the message names is there."""
    with VectorStore(tmp_path / "m", HashingEmbedder(16)) as store:
        for name in ("add", "upsert", "query", "get", "peek", "persist", "similarity_search", "create_index", "info"):
            assert not hasattr(store, name)
            with pytest.raises(AttributeError, match=f"no attribute '{name}'; here it is ") as caught:
                getattr(store, name)
            for ours in re.findall(r"(\w+)\(", str(caught.value).partition("here it is")[2]):
                assert ours == "len" or callable(getattr(store, ours))
        with pytest.raises(AttributeError, match=r"no attribute 'colour'$"):
            _ = store.colour  # type: ignore[attr-defined]
