"""The adapters that open their store on first use: once for all threads, anew in a copy and in a forked child."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import as_child, each

import memevolve_gpu.integrations.documents as shared
from memevolve_gpu import VectorStore

CONFIG = {"background": False}
THREADS = 8


def haystack(folder: Path) -> Any:
    pytest.importorskip("haystack", reason="haystack-ai is not installed: pip install 'memevolve-gpu[haystack]'")
    module = importlib.import_module("memevolve_gpu.integrations.haystack")
    return module.MemEvolveDocumentStore(folder / "m", 2, storage_config=CONFIG)


def llama_index(folder: Path) -> Any:
    pytest.importorskip(
        "llama_index.core", reason="llama-index-core is missing: pip install 'memevolve-gpu[llama-index]'"
    )
    module = importlib.import_module("memevolve_gpu.integrations.llama_index")
    return module.MemEvolveVectorStore(index_file=str(folder / "m"), embedding_dim=2, storage_config=CONFIG)


def mem0(folder: Path) -> Any:
    pytest.importorskip("mem0", reason="mem0ai is not installed: pip install 'memevolve-gpu[mem0]'")
    module = importlib.import_module("memevolve_gpu.integrations.mem0")
    return module.MemEvolveVectorStore(folder, "m", 2, storage_config=CONFIG)


def opened(adapter: Any) -> VectorStore:
    store: VectorStore = adapter.client if hasattr(type(adapter), "client") else adapter.store
    return store


@pytest.fixture(params=[haystack, llama_index, mem0], ids=lambda make: str(make.__name__))
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    one = request.param(tmp_path)
    one.close()
    yield one
    one.close()


def test_threads_open_one_store(adapter: Any) -> None:
    together = threading.Barrier(THREADS)

    def first_use(_number: int) -> VectorStore:
        together.wait()
        return opened(adapter)

    for _ in range(3):
        with ThreadPoolExecutor(THREADS) as pool:
            assert len({id(store) for store in pool.map(first_use, range(THREADS))}) == 1
        adapter.close()


@each("remade", [copy.deepcopy, lambda adapter: pickle.loads(pickle.dumps(adapter))])
def test_a_copy_opens_the_same_files_itself(adapter: Any, remade: Callable[[Any], Any]) -> None:
    opened(adapter).store_batch([{"id": "a", "content": "rebase"}], [[1.0, 0.0]])
    other = remade(adapter)
    assert (opened(other).retrieve("a") or {})["content"] == "rebase"
    assert opened(other) is not opened(adapter)
    other.close()
    assert opened(adapter).exists("a")


def test_a_child_forked_while_a_thread_opens_the_store_opens_it_itself(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> VectorStore:
        opening.set()
        assert go_on.wait(60)
        return VectorStore(*arguments, **named)

    monkeypatch.setattr(shared, "VectorStore", slow)
    thread = threading.Thread(target=opened, args=(adapter,))
    thread.start()
    assert opening.wait(60)
    monkeypatch.undo()

    def act() -> None:
        opened(adapter).store_batch([{"id": "child", "content": "push"}], [[0.0, 1.0]])
        adapter.close()

    assert as_child(act) == 0
    go_on.set()
    thread.join()
    assert opened(adapter).exists("child")


@pytest.mark.parametrize("make", [haystack, llama_index, mem0], ids=lambda make: str(make.__name__))
def test_another_working_folder_makes_no_other_store(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    adapter = make(Path())
    opened(adapter).store_batch([{"id": "a", "content": "rebase"}], [[1.0, 0.0]])
    adapter.close()
    monkeypatch.chdir(tmp_path / "other")
    copied = copy.deepcopy(adapter)
    for one in (adapter, copied):
        assert opened(one).exists("a")
        if hasattr(one, "list_cols"):
            assert one.list_cols() == ["m"]
        one.close()
    assert not list((tmp_path / "other").iterdir())


def test_an_error_at_the_opening_leaves_it_closed(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_arguments: Any, **_named: Any) -> VectorStore:
        raise OSError("no room")

    monkeypatch.setattr(shared, "VectorStore", failing)
    with pytest.raises(OSError, match="no room"):
        opened(adapter)
    monkeypatch.undo()
    assert opened(adapter).count() == 0
