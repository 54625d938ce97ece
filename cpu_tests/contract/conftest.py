"""The backends that the core contract is held against."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from milvus_fake import FakeMilvus
from milvus_kit import URI, Standalone, milvus_folder, running
from server_kit import has_server, served
from support import FakeEmbedder

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.milvus.store import MilvusStore

DIM = 24

Store = VectorStore | MilvusStore
Make = Callable[..., Store]


@pytest.fixture(scope="module")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real server, which runs while the tests of the module do."""
    with running(Standalone(tmp_path_factory.mktemp("milvus"))):
        yield URI


BACKENDS = [
    *("vector", "namespace", "milvus-in-memory"),
    *(["milvus"] if milvus_folder() else []),
    *(["remote"] if has_server() else []),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    """``make(name, embedder, **settings)`` opens the store of that name, the same one each time."""
    opened: list[Store] = []
    servers = ExitStack()
    places: set[str] = set()
    server = FakeMilvus()
    prefix = "t" + uuid.uuid4().hex[:12]

    def remote(store: Store) -> Any:
        from memevolve_gpu.server.client import RemoteStore

        return servers.enter_context(RemoteStore(servers.enter_context(served(store, ui=False, mcp=False))))

    def make(name: str = "store", embedder: Any = None, **settings: Any) -> Any:
        config = StorageConfig(**{"background": False, "min_training_units": 100, **settings})
        function = embedder or FakeEmbedder(DIM)
        if backend == "namespace":  # one of several in a file
            limited = any(setting.startswith("max_memory") for setting in settings)
            noise = not VectorStore.exists_at(tmp_path / name) and embedder is None and not limited
            config = config.replace(namespace="org/alice")
            opened.append(VectorStore(tmp_path / name, function, storage_config=config))
            if noise:
                with VectorStore(tmp_path / name, function, storage_config=config.replace(namespace=())) as other:
                    for path in ((), ("org",), ("org", "bob"), ("org", "alice", "notes")):
                        other.namespace(*path).store_batch([{"id": f"n{i}", "content": f"noise {i}"} for i in range(3)])
            return opened[-1]
        if backend in ("vector", "remote"):
            opened.append(VectorStore(tmp_path / name, function, storage_config=config))
            return opened[-1] if backend == "vector" else remote(opened[-1])
        place = {"collection": f"{prefix}_{re.sub(r'[^a-z0-9]', '_', name)}", "timeout": 20}
        places.add(str(place["collection"]))
        if backend == "milvus":
            place["uri"] = request.getfixturevalue("milvus_server")
            opened.append(MilvusStore(function, storage_config=config, milvus_config=place))
        else:
            opened.append(MilvusStore(function, storage_config=config, milvus_config=place, client=server.connect))
        return opened[-1]

    yield make
    servers.close()
    for store in opened:
        store.close()
    if backend == "milvus":
        _drop(places)


def _drop(places: set[str]) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(URI)
    for place in places:
        client.drop_collection(place)
    client.close()
