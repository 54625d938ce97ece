"""The provider for mem0: through mem0's own Memory and its configuration, then the interface by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["MEM0_TELEMETRY"] = "False"
pytest.importorskip("mem0", reason="mem0ai is not installed: pip install 'memevolve-gpu[mem0]'")

from mem0 import AsyncMemory, Memory
from mem0.configs.base import MemoryConfig
from mem0.utils.factory import EmbedderFactory, LlmFactory

from memevolve_gpu import HashingEmbedder, VectorStore
from memevolve_gpu.errors import ConfigurationError, InvalidFilterError, InvalidUnitError
from memevolve_gpu.integrations.mem0 import MemEvolveConfig, MemEvolveVectorStore, register

CONFIG = {"background": False}
DIM = 64


class FakeEmbedder:
    def __init__(self) -> None:
        self.config = type("Config", (), {"embedding_dims": DIM})()
        self.embedder = HashingEmbedder(DIM)

    def embed(self, text: str, _action: str | None = None) -> list[float]:
        vector: list[float] = self.embedder(text).tolist()
        return vector

    def embed_batch(self, texts: list[str], action: str | None = None) -> list[list[float]]:
        return [self.embed(text) for text in texts]


def config(folder: Path) -> dict[str, Any]:
    held = {"folder": str(folder), "embedding_model_dims": DIM, "storage_config": CONFIG}
    return {
        "vector_store": {"provider": "memevolve", "config": held},
        "history_db_path": str(folder / "history.db3"),
    }


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No model and no language model: mem0 is tested with infer=False."""
    register()
    (tmp_path / "m").mkdir()
    monkeypatch.setattr(EmbedderFactory, "create", lambda *_args, **_more: FakeEmbedder())
    monkeypatch.setattr(LlmFactory, "create", lambda *_args, **_more: None)


@pytest.fixture
def memory(offline: None, tmp_path: Path) -> Iterator[Memory]:
    one = Memory.from_config(config(tmp_path / "m"))
    yield one
    one.vector_store.close()
    one.close()


def texts(found: dict[str, Any]) -> list[str]:
    return [one["memory"] for one in found["results"]]


def test_memories_of_several_users(memory: Memory) -> None:
    assert isinstance(memory.vector_store, MemEvolveVectorStore)
    tea = memory.add("likes green tea", user_id="alice", metadata={"topic": "food"}, infer=False)["results"][0]["id"]
    memory.add("likes coffee and cake", user_id="bob", infer=False)
    memory.add("plays chess", user_id="alice", metadata={"topic": "games"}, infer=False)

    alice = {"user_id": "alice"}
    assert texts(memory.get_all(filters=alice)) == ["likes green tea", "plays chess"]
    assert texts(memory.search("green tea", filters=alice))[0] == "likes green tea"
    assert "likes coffee and cake" not in texts(memory.search("coffee", filters=alice, threshold=0.0))
    assert texts(memory.get_all(filters={**alice, "topic": "games"})) == ["plays chess"]
    assert texts(memory.get_all(filters={**alice, "NOT": [{"topic": "games"}]})) == ["likes green tea"]

    memory.update(tea, "likes black tea")
    assert memory.get(tea)["memory"] == "likes black tea"
    assert [one["event"] for one in memory.history(tea)] == ["ADD", "UPDATE"]
    memory.delete(tea)
    assert memory.get(tea) is None

    memory.delete_all(user_id="alice")
    assert texts(memory.get_all(filters=alice)) == []
    assert texts(memory.get_all(filters={"user_id": "bob"})) == ["likes coffee and cake"]
    memory.reset()
    assert texts(memory.get_all(filters={"user_id": "bob"})) == []


async def test_async_memory(offline: None, tmp_path: Path) -> None:
    memory = AsyncMemory(MemoryConfig(**config(tmp_path / "m")))
    await memory.add("likes green tea", user_id="alice", infer=False)
    found = await memory.search("green tea", filters={"user_id": "alice"})
    assert texts(found) == ["likes green tea"]
    await memory.delete_all(user_id="alice")
    assert texts(await memory.get_all(filters={"user_id": "alice"})) == []
    memory.vector_store.close()


def test_memories_are_kept_and_other_doors_read_them(memory: Memory, tmp_path: Path) -> None:
    memory.add("likes green tea", user_id="alice", infer=False)
    again = Memory.from_config(config(tmp_path / "m"))
    assert texts(again.get_all(filters={"user_id": "alice"})) == ["likes green tea"]
    again.vector_store.close()
    again.close()
    with VectorStore(tmp_path / "m" / "mem0", None, storage_config=CONFIG) as store:
        assert [unit["content"] for unit in store.units({"metadata.user_id": "alice"})] == ["likes green tea"]


@pytest.mark.parametrize("wrong", [{"folder": "x", "pathh": 1}, {}])
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any]) -> None:
    register()
    with pytest.raises(ValueError, match=r"folder|pathh"):
        Memory.from_config({"vector_store": {"provider": "memevolve", "config": wrong}})


# The interface by itself


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemEvolveVectorStore]:
    one = MemEvolveVectorStore(**MemEvolveConfig(folder=str(tmp_path), embedding_model_dims=2).model_dump())
    payloads: list[dict[str, Any]] = [
        {"data": "green tea", "user_id": "a", "n": 1, "created_at": "2024-01-01T00:00:00Z"},
        {"data": "50% off_er", "user_id": "b", "n": 2, "created_at": "2025-01-01T00:00:00Z"},
        {"data": "Green apple", "n": 3, "tags": ["x", "y"]},
    ]
    one.insert([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], payloads, ["1", "2", "3"])
    yield one
    one.close()


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        (None, "123"),
        ({}, "123"),
        ({"user_id": "a"}, "1"),
        ({"user_id": ["a", "b"]}, "12"),
        ({"user_id": "*"}, "12"),
        ({"user_id": {"ne": "a"}}, "23"),
        ({"user_id": {"in": ["a"]}}, "1"),
        ({"user_id": {"nin": ["a"]}}, "23"),
        ({"n": {"gt": 1, "lte": 3}}, "23"),
        ({"created_at": {"gte": "2024-06-01"}}, "2"),
        ({"created_at": {"lt": "2024-06-01T00:00:00+00:00"}}, "1"),
        ({"data": {"contains": "een"}}, "13"),
        ({"data": {"icontains": "GREEN"}}, "13"),
        ({"data": {"icontains": "0% OFF_"}}, "2"),
        ({"tags": {"contains": "x"}}, "3"),
        ({"OR": [{"user_id": "a"}, {"n": 3}]}, "13"),
        ({"$or": [{"user_id": "a"}, {"n": 3}], "n": {"lt": 3}}, "1"),
        ({"AND": [{"n": {"gt": 1}}, {"NOT": [{"n": 3}]}]}, "2"),
        ({"$not": [{"n": 1}, {"n": 2}]}, "3"),
    ],
)
def test_filters(store: MemEvolveVectorStore, filters: Any, ids: str) -> None:
    assert [one.id for one in store.list(filters)[0]] == list(ids)
    assert {one.id for one in store.search("", [1.0, 0.0], 9, filters)} == set(ids)


@pytest.mark.parametrize("bad", [{"n": {"near": 1}}, {"OR": [1]}, {"n": {"gt": [1]}}])
def test_bad_filters_are_named(store: MemEvolveVectorStore, bad: Any) -> None:
    with pytest.raises(InvalidFilterError, match="filters"):
        store.list(bad)


def test_reading_and_writing(store: MemEvolveVectorStore) -> None:
    found = store.search("", [[0.6, 0.8]], 2)
    assert [(one.id, round(one.score or 0, 3)) for one in found] == [("2", 1.0), ("3", 0.8)]
    assert [one.id for one in store.keyword_search("green", filters={"n": {"lt": 3}})] == ["1"]
    assert [[one.id for one in hits] for hits in store.search_batch(["", ""], [[1.0, 0.0], [0.0, 1.0]])] == [
        ["1"],
        ["3"],
    ]
    store.update("1", payload={"data": "tea", "updated_at": "u"})
    assert store.get("1") is not None
    assert store.get("1").payload == {"data": "tea", "updated_at": "u"}  # type: ignore[union-attr]
    store.update("1", vector=[0.0, 1.0])
    assert [one.id for one in store.search("", [1.0, 0.0], 1)] == ["2"]
    with pytest.raises(InvalidUnitError, match="'9'"):
        store.update("9", payload={})
    store.delete("1")
    store.delete("1")
    assert store.get("1") is None
    assert len(store.list(top_k=1)[0]) == 1


def test_collections(store: MemEvolveVectorStore) -> None:
    assert store.col_info() == {"name": "mem0", "count": 3, "dimension": 2, "metric": "cosine"}
    store.create_col("other", 3, "l2")
    store.insert([[1.0, 2.0, 3.0]])
    assert store.list_cols() == ["mem0", "other"]
    store.reset()
    assert store.col_info()["count"] == 0
    store.create_col("mem0", 2, "cosine")
    assert store.col_info()["count"] == 3
    store.delete_col()
    assert store.list()[0] == []
    with pytest.raises(ConfigurationError, match="collection_name"):
        store.create_col("../x", 2, "cosine")
    with pytest.raises(InvalidUnitError, match="do not fit"):
        store.insert([[1.0, 2.0]], [{}, {}])


def test_the_quick_start_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    page = (repository / "docs" / "how-to" / "mem0.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    held: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], held)
    held["config"]["vector_store"]["config"]["embedding_model_dims"] = DIM
    memory = Memory.from_config({**held["config"], "history_db_path": str(tmp_path / "history.db3")})
    memory.add("likes green tea", user_id="alice", infer=False)
    assert texts(memory.get_all(filters={"user_id": "alice"})) == ["likes green tea"]
    memory.vector_store.close()
    memory.close()
