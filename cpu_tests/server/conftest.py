"""A served store, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memevolve_gpu import HashingEmbedder, VectorStore


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[VectorStore]:
    """A store without units."""
    with VectorStore(tmp_path / "memory", HashingEmbedder(64), storage_config={"background": False}) as made:
        yield made


@pytest.fixture
def store(empty: VectorStore) -> VectorStore:
    """The store that is served."""
    return empty


@pytest.fixture
def client(store: VectorStore, tmp_path: Path) -> Iterator[Any]:
    """A client of a server without keys."""
    from fastapi.testclient import TestClient

    from memevolve_gpu.server.app import create_app

    with TestClient(create_app(store, backups=tmp_path / "backups", ui=False), base_url="http://127.0.0.1") as made:
        yield made
