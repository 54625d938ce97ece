"""A pytest plugin that runs the tests of LangGraph's own stores on ``MemEvolveStore``.

Run from a checkout of langchain-ai/langgraph, in ``libs/checkpoint`` and ``libs/checkpoint-sqlite``, with this folder
on ``PYTHONPATH`` and ``-p langgraph_plugin``; ``scripts/conformance`` does. It puts our store in the place of
``InMemoryStore``, ``SqliteStore`` and ``AsyncSqliteStore`` before the test files are imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from langgraph.store import memory

from memevolve_gpu.integrations.langgraph import MemEvolveStore

NOT_OURS = {
    "test_nonnull_migrations": "reads the SQL migrations of SqliteStore",
    "test_escape_glob_literal": "calls a private function of SqliteStore",
    "test_namespace_match_pattern": "calls a private function of SqliteStore",
    "test_list_namespaces_prefix_uses_indexable_condition": "reads the SQL that SqliteStore writes",
    "test_no_running_loop": "asks AsyncSqliteStore to refuse synchronous calls; MemEvolveStore allows them anywhere",
    "checkpoint-sqlite/tests/test_store.py::test_vector_store_initialization": "reads the tables of SqliteStore",
}
"""Tests that cannot apply to another store, with the reason."""

folders: list[tempfile.TemporaryDirectory[str]] = []


def a_prefix() -> str:
    folders.append(tempfile.TemporaryDirectory(prefix="memevolve-langgraph-"))
    return str(Path(folders[-1].name) / "memory")


class InMemoryStore(MemEvolveStore):
    """Our store on a temporary file, with the arguments of LangGraph's ``InMemoryStore``."""

    def __init__(self, *, index: Any = None) -> None:
        super().__init__(a_prefix(), index=index)


class SqliteStore(MemEvolveStore):
    """Our store, with what the tests call on LangGraph's ``SqliteStore`` and is the same for every store."""

    @classmethod
    @contextmanager
    def from_conn_string(cls, _path: str, *, index: Any = None, ttl: Any = None) -> Iterator[SqliteStore]:
        if index is not None and index.get("text_fields"):
            index = {**index, "fields": index["text_fields"]}
        # SqliteStore does not refresh on get unless it is told to; the interface of stores, and ours, do by default.
        ttl = ttl and {"refresh_on_read": False, **ttl}
        with cls(a_prefix(), index=index, ttl=ttl) as store:
            yield store

    def setup(self) -> None:
        """There is nothing to set up."""


class AsyncSqliteStore(MemEvolveStore):
    """As ``SqliteStore``, for LangGraph's ``AsyncSqliteStore``, whose other calls are coroutines too."""

    @classmethod
    @asynccontextmanager
    async def from_conn_string(cls, path: str, *, index: Any = None, ttl: Any = None) -> AsyncIterator[Any]:
        with SqliteStore.from_conn_string(path, index=index, ttl=ttl) as store:
            store.__class__ = cls
            yield store

    async def setup(self) -> None:
        """There is nothing to set up."""

    async def sweep_ttl(self) -> int:  # type: ignore[override]
        return super().sweep_ttl()

    def _sweep_on(self, seconds: float) -> None:
        while not self._stopped.wait(seconds):
            MemEvolveStore.sweep_ttl(self)

    async def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> None:  # type: ignore[override]
        super().start_ttl_sweeper(sweep_interval_minutes)

    async def stop_ttl_sweeper(self) -> bool:  # type: ignore[override]
        super().stop_ttl_sweeper()
        return True


def module(name: str, **names: Any) -> None:
    made = ModuleType(name)
    vars(made).update(names)
    sys.modules[name] = made


memory.InMemoryStore = InMemoryStore
module("langgraph.store.sqlite", SqliteStore=SqliteStore, AsyncSqliteStore=AsyncSqliteStore, __path__=[])
module("langgraph.store.sqlite.aio", AsyncSqliteStore=AsyncSqliteStore)
internals = ("NS_MATCH_FUNCTION", "BaseSqliteStore", "_escape_glob_literal", "_namespace_match_pattern")
module("langgraph.store.sqlite.base", SqliteIndexConfig=dict, **dict.fromkeys(internals))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky(retries): a mark of LangGraph's own tests; nothing is retried here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        name = getattr(item, "originalname", item.name)
        reason = NOT_OURS.get(name) or next((why for end, why in NOT_OURS.items() if _is(item, end)), None)
        (left_out if reason else kept).append(item)
        if reason:
            print(f"left out: {name}: {reason}")
            if file := os.environ.get("LEFT_OUT"):
                with Path(file).open("a", encoding="utf-8") as listed:
                    print(f"{item.nodeid}: {reason}", file=listed)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _is(item: pytest.Item, end: str) -> bool:
    file, _, name = end.partition("::")
    return bool(name) and str(item.path).endswith(file) and item.name == name


def pytest_unconfigure() -> None:
    for folder in folders:
        folder.cleanup()
