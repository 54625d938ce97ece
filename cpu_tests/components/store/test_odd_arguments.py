"""Arguments that mean nothing are errors that say what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import FakeBatchEmbedder

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.errors import InvalidFilterError, InvalidUnitError, InvalidVectorError

DIM = 8


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    config = StorageConfig(background=False)
    with VectorStore(tmp_path / "store", FakeBatchEmbedder(DIM), DIM, storage_config=config) as opened:
        opened.store_batch([{"id": name, "content": name} for name in "abc"])
        yield opened


def test_an_empty_value_that_is_no_filter_matches_nothing_by_accident(store: VectorStore) -> None:
    odd: list[Any] = [[], "", 0, (), False, 0.0, b""]
    for given in odd:
        with pytest.raises(InvalidFilterError, match="must be a mapping"):
            store.search("a", 3, given)
        with pytest.raises(InvalidFilterError, match="must be a mapping"):
            store.search_vectors(np.ones((1, DIM)), 3, given)
        with pytest.raises(InvalidFilterError, match="must be a mapping"):
            store.search_keywords("a", 3, given)
        with pytest.raises(InvalidFilterError, match="must be a mapping"):
            store.units(given)
    assert len(store.search("a", 3, {})) == 3


def test_several_ids_where_one_is_meant_name_the_call_for_several(store: VectorStore) -> None:
    for ids in (["a", "b"], ("a",), {"a"}, {"a": 1}):
        given: Any = ids
        for call, batch in (
            (store.delete, "delete_batch"),
            (store.retrieve, "retrieve_batch"),
            (store.exists, "retrieve_batch"),
        ):
            with pytest.raises(TypeError, match=batch):
                call(given)
    assert store.count() == 3


def test_keys_with_nul_vectors_without_a_square_and_doubled_ids(store: VectorStore) -> None:
    with pytest.raises(InvalidUnitError, match="key with NUL"):
        store.store({"content": "text", "metadata": {"a\0b": 1}})
    for value in (1.1e18, -3e30, 3e38):
        with pytest.raises(InvalidVectorError, match="beyond 1e18"):
            store.store_batch([{"content": "text"}], np.full((1, DIM), value, np.float32))
        with pytest.raises(InvalidVectorError, match="beyond 1e18"):
            store.search_vectors(np.full((1, DIM), value, np.float32), 3)
    with pytest.raises(InvalidUnitError, match="'a' twice"):
        store.replace_batch(["a", "b", "a"], [])
    assert store.count() == 3
