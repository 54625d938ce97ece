"""``AsyncVectorStore`` and ``AsyncMemorySystem``: the event loop goes on, and cancelling leaves nothing half done."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import FakeEmbedder, as_child

from memevolve_gpu import (
    AsyncMemorySystem,
    AsyncVectorStore,
    ConfigurationError,
    ConflictError,
    InvalidFilterError,
    MemorySystem,
    MemorySystemConfig,
    StorageConfig,
    StoreClosedError,
    VectorStore,
    open_store,
)
from memevolve_gpu.components.store.history import named_operation

DIM = 8
PATIENCE = 30.0
"""Seconds after which a test that waits has failed."""


class Held:
    """An embedding function that waits where it is told to."""

    dimension = DIM

    def __init__(self) -> None:
        self.embed = FakeEmbedder(DIM)
        self.may_go = threading.Event()
        self.may_go.set()
        self.lock = threading.Lock()
        self.running = self.most = 0
        self.begun = threading.Semaphore(0)

    def __call__(self, text: str) -> Any:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.begun.release()
        assert self.may_go.wait(PATIENCE)
        with self.lock:
            self.running -= 1
        return self.embed(text)


def opened(folder: Path, embed: Any = None, threads: int = 4) -> Any:
    config = StorageConfig(background=False)
    return AsyncVectorStore.open(folder / "store", embed or FakeEmbedder(DIM), DIM, config, threads=threads)


async def begun(embed: Held, times: int = 1) -> None:
    for _ in range(times):
        assert await asyncio.to_thread(embed.begun.acquire, True, PATIENCE)


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("kind", "wrapped", "left_out"),
    [
        (AsyncVectorStore, VectorStore, {"data", "index", "index_type"}),
        (AsyncMemorySystem, MemorySystem, set()),
    ],
)
def test_every_method_is_there_with_its_parameters_and_its_docstring(
    kind: type, wrapped: type, left_out: set[str]
) -> None:
    assert public(wrapped) - public(kind) == left_out
    for name in public(kind) & public(wrapped) - {"close", "namespace", "from_env"}:
        ours, theirs = inspect.getattr_static(kind, name), inspect.getattr_static(wrapped, name)
        if isinstance(theirs, property):
            continue
        ours, theirs = getattr(ours, "__func__", ours), getattr(theirs, "__func__", theirs)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
        assert ours.__doc__ == inspect.getdoc(theirs), name
        assert ours.__doc__, name
        assert inspect.iscoroutinefunction(ours) is (name not in {"units", "export_rows", "changes", "watch"}), name


def test_the_same_answers_as_the_store(tmp_path: Path) -> None:
    async def act() -> None:
        async with opened(tmp_path) as store:
            units = [{"id": f"id-{n}", "content": f"text {n}", "metadata": {"n": n}} for n in range(250)]
            assert await store.store_batch(units) == [unit["id"] for unit in units]
            sync: VectorStore = store._wrapped
            assert await store.search_units("text 7", 3) == sync.search_units("text 7", 3)
            assert await store.count({"metadata.n": {"lt": 9}}) == 9
            assert [unit async for unit in store] == sync.retrieve_all()
            assert [change async for change in store.changes()] == list(sync.changes())
            assert [unit["id"] async for unit, _ in store.export_rows(7)] == [unit["id"] for unit in units]
            assert await store.change_number() == sync.change_number
            assert (store.metric, store.embedding_dim, store.namespace_path) == ("l2", DIM, ())
            page = store.units(order_by="-metadata.n", limit=120)
            first = [await anext(page) for _ in range(3)]
            rest = [unit["id"] async for unit in store.units(order_by="-metadata.n", after=page.cursor)]
            assert [unit["id"] for unit in first] + rest == [unit["id"] for unit in reversed(units)]
            with pytest.raises(InvalidFilterError):
                await anext(store.units({"metadata.n": {"nearly": 3}}))
            with pytest.raises(ConflictError):
                await store.store({"content": "new"}, replaces="absent")

    asyncio.run(act())


def test_the_loop_goes_on_while_calls_wait_and_no_more_threads_run_than_were_allowed(tmp_path: Path) -> None:
    embed = Held()

    async def act() -> None:
        async with opened(tmp_path, embed, threads=3) as store:
            embed.may_go.clear()
            waiting = [asyncio.create_task(store.store({"content": f"text {n}"})) for n in range(10)]
            await begun(embed, 3)
            embed.may_go.set()  # by the loop itself, which would hang if a call held it up
            assert len(set(await asyncio.gather(*waiting))) == 10
            assert embed.most == 3

    asyncio.run(act())


def test_a_cancelled_write_is_made_wholly_or_not_at_all(tmp_path: Path) -> None:
    embed = Held()

    async def act() -> None:
        async with opened(tmp_path, embed, threads=1) as store:
            embed.may_go.clear()
            running = asyncio.create_task(store.store_batch([{"id": "a", "content": "one"}]))
            await begun(embed)
            queued = asyncio.create_task(store.store({"id": "b", "content": "two"}))
            await asyncio.sleep(0)
            for task in (running, queued):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            embed.may_go.set()
            assert [unit["id"] async for unit in store] == ["a"]
            assert await store.check() == []

    asyncio.run(act())


class Slow(VectorStore):
    """Its listing waits before each row."""

    may_go = threading.Event()
    begun = threading.Event()

    def units(self, *arguments: Any, **more: Any) -> Any:
        def rows() -> Iterator[Any]:
            for row in found:
                self.begun.set()
                assert self.may_go.wait(PATIENCE)
                yield row

        found = super().units(*arguments, **more)
        return rows()


def test_a_cancelled_step_of_a_listing_loses_no_row(tmp_path: Path) -> None:
    async def act() -> None:
        config = StorageConfig(background=False)
        async with AsyncVectorStore(Slow(tmp_path / "store", FakeEmbedder(DIM), storage_config=config)) as store:
            ids = await store.store_batch([{"content": f"text {n}"} for n in range(150)])
            rows = store.units()
            step = asyncio.create_task(anext(rows))
            await asyncio.to_thread(Slow.begun.wait, PATIENCE)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            Slow.may_go.set()
            assert [unit["id"] async for unit in rows] == ids

    asyncio.run(act())


def test_watching_with_a_timeout_around_each_step_loses_no_change(tmp_path: Path) -> None:
    async def act() -> None:
        async with opened(tmp_path) as store:
            changes = store.watch(await store.change_number())
            seen: list[str] = []

            async def follow() -> None:
                while len(seen) < 40:
                    try:
                        seen.append((await asyncio.wait_for(anext(changes), 0.001)).id)
                    except asyncio.TimeoutError:
                        continue

            following = asyncio.create_task(follow())
            ids = []
            for n in range(40):
                ids.append(await store.store({"content": f"text {n}"}))
                await store.namespace("other").store({"content": f"text {n}"})
            await asyncio.wait_for(following, PATIENCE)
            assert seen == ids
            assert [change async for change in store.watch(timeout=0.01)] == []

    asyncio.run(act())


def test_a_hundred_watchers_hold_no_thread(tmp_path: Path) -> None:
    async def act() -> None:
        async with opened(tmp_path, threads=1) as store:
            after = await store.change_number()
            watchers = [asyncio.create_task(anext(store.watch(after))) for _ in range(100)]
            await asyncio.sleep(0.05)
            await store.store({"id": "a", "content": "text"})
            found = await asyncio.wait_for(asyncio.gather(*watchers), PATIENCE)
            assert {change.id for change in found} == {"a"}

    asyncio.run(act())


def test_close_waits_for_what_was_begun_and_ends_views_and_iterators(tmp_path: Path) -> None:
    embed = Held()

    async def act() -> None:
        store = await opened(tmp_path, embed, threads=2)
        view = store.namespace("alice")
        await view.store({"id": "a", "content": "text"})
        other = store.namespace("alice")
        await other.close()
        with pytest.raises(StoreClosedError):
            await other.count()
        assert await view.count() == 1
        watching = asyncio.create_task(anext(store.watch()))
        await begun(embed)
        embed.may_go.clear()
        writing = asyncio.create_task(view.store({"id": "b", "content": "text"}))
        await begun(embed)
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
        closing.cancel()  # closing goes on all the same
        with pytest.raises(asyncio.CancelledError):
            await closing
        embed.may_go.set()
        assert await writing == "b"
        await store.close()
        assert repr(store) == "<AsyncVectorStore, closed>"
        for call in (store.count(), view.count(), watching, anext(store.units())):
            with pytest.raises(StoreClosedError):
                await call

    asyncio.run(act())
    with VectorStore(tmp_path / "store", FakeEmbedder(DIM)) as again:
        assert again.namespace("alice").count() == 2


def end_of_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("AsyncVectorStore"):
            thread.join(PATIENCE)
            assert not thread.is_alive()


@contextmanager
def slow_opening(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event, list[Any]]]:
    begun_, may_go, made = threading.Event(), threading.Event(), []

    def slow(*arguments: Any) -> Any:
        begun_.set()
        assert may_go.wait(PATIENCE)
        made.append(open_store(*arguments))
        return made[0]

    monkeypatch.setattr("memevolve_gpu.async_api.open_store", slow)
    yield begun_, may_go, made


def test_a_cancelled_opening_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act() -> None:
        with slow_opening(monkeypatch) as (started, may_go, made):

            async def use() -> None:
                async with opened(tmp_path):
                    pass

            task = asyncio.create_task(use())
            await asyncio.to_thread(started.wait, PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            may_go.set()
            await asyncio.to_thread(end_of_threads)
            with pytest.raises(StoreClosedError):
                made[0].count()

    asyncio.run(act())


def test_an_opening_that_fails_raises_and_leaves_no_thread(tmp_path: Path) -> None:
    async def act() -> None:
        with pytest.raises(ConfigurationError):
            await AsyncVectorStore.open(tmp_path / "store", None, storage_config={"metric": "miles"})

    asyncio.run(act())
    end_of_threads()


def test_a_call_sees_the_context_of_its_caller(tmp_path: Path) -> None:
    async def act() -> None:
        async with opened(tmp_path) as store:
            with named_operation("nightly"):
                await store.store({"content": "text"})
            assert [one.kind for one in await store.operations()] == ["nightly"]

    asyncio.run(act())


def test_it_works_in_a_forked_child(tmp_path: Path) -> None:
    store = asyncio.run(_filled(tmp_path))

    def child() -> None:
        assert asyncio.run(_count(store)) == 1

    assert as_child(child) == 0
    assert asyncio.run(_count(store)) == 1
    asyncio.run(store.close())


async def _filled(folder: Path) -> AsyncVectorStore:
    store: AsyncVectorStore = await opened(folder)
    await store.store({"content": "text"})
    return store


async def _count(store: AsyncVectorStore) -> int:
    return await store.count()


def test_a_memory_system_with_its_store(tmp_path: Path) -> None:
    async def act() -> None:
        with VectorStore(tmp_path / "store", FakeEmbedder(DIM)) as store:
            config = MemorySystemConfig(storage_backend=store)
            async with AsyncMemorySystem.open(config) as memory:
                assert await memory.add_units([{"id": "a", "content": "text"}]) == ["a"]
                assert [unit["id"] for unit in await memory.query_memory("text")] == ["a"]
                assert await memory.storage.count() == 1
                assert await memory.manage_memory("prune", criteria={"max_count": 0}) == (1, ["a"])
                assert memory.config is config
            with pytest.raises(StoreClosedError):
                await memory.query_memory("text")
            assert store.count() == 0  # the store was given, so it stays open

    asyncio.run(act())


@pytest.mark.parametrize("kind", [AsyncVectorStore, AsyncMemorySystem])
def test_what_is_no_store_or_number_of_threads_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be"):
        kind("memory")
    with pytest.raises(ConfigurationError, match="threads"):
        kind.open("memory", None, threads=0)
