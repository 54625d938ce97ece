"""``AsyncVectorStore`` and ``AsyncMemorySystem``: the same methods for asyncio, run by a few threads."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from .backends import open_store
from .components.store.base import StorageBackend
from .components.store.history import Watch
from .components.store.vector_store import VectorStore
from .errors import ConfigurationError, StoreClosedError
from .memory_system import MemorySystem, MemorySystemConfig
from .types import JsonObject
from .utils.arguments import shown, whole_number
from .utils.config import StorageConfig
from .utils.embeddings import EmbeddingFunction
from .utils.forking import lock, renew_in_child

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Self = TypeVar("_Self", bound="_Asynchronous")

_PAGE = 100
"""Rows that are read in one turn of a thread."""


class _Threads:
    """The threads of one asynchronous object and of its views."""

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = whole_number("threads", most, error=ConfigurationError), name
        self._closing = lock()
        self.closed = False
        self.after_fork()
        renew_in_child(self)

    def after_fork(self) -> None:
        """Begin with no threads: a child has none of its parent's."""
        self._pool = ThreadPoolExecutor(self._most, self._name)

    def submit(self, call: Callable[[], _T]) -> Future[_T]:
        """Call in a thread, with the caller's context variables."""
        if self.closed:
            raise StoreClosedError(f"this {self._name} is closed; open a new one")
        return self._pool.submit(contextvars.copy_context().run, call)

    def close(self, then: Callable[[], None] | None = None, *, wait: bool = True) -> None:
        """Wait for the calls that were made, and call ``then``."""
        self.closed = True
        with self._closing:
            self._pool.shutdown(wait)
            if then is not None:
                then()


class AsyncListing(AsyncIterator[_T], Generic[_T]):
    """An asynchronous iterator, whose rows are read in a thread.

    A step that is cancelled, by a timeout for example, loses no row: the next step goes on where it stopped.

    Attributes:
        cursor: Of ``units``: for ``after`` of a later call, which goes on behind the last unit that was taken.
    """

    def __init__(self, submit: Callable[[Callable[[], None]], Future[None]], call: Callable[[], Iterator[_T]]) -> None:
        self.cursor: str | None = None
        self._submit, self._call = submit, call
        self._source: Iterator[_T] | None = None
        self._held: deque[tuple[str | None, _T]] = deque()
        self._reading: Future[None] | None = None
        self._ended = False

    def __aiter__(self) -> AsyncListing[_T]:
        return self

    async def __anext__(self) -> _T:
        while not self._held:
            if self._ended:
                raise StopAsyncIteration
            await self._read()
            if isinstance(self._source, Watch) and not self._held:
                pause = self._source.pause()
                if pause is None:
                    raise StopAsyncIteration
                await asyncio.sleep(pause)
        self.cursor, row = self._held.popleft()
        return row

    async def _read(self) -> None:
        """Wait for the next rows; a reading that a cancelled step began is waited for, not begun again."""
        if self._reading is None:
            self._reading = self._submit(self._page)
        reading = self._reading
        try:
            await asyncio.shield(asyncio.wrap_future(reading))
        finally:
            if reading.done() and self._reading is reading:
                self._reading = None

    def _page(self) -> None:
        """Read the next rows, in a thread."""
        if self._source is None:
            self._source = self._call()
            self.cursor = getattr(self._source, "cursor", None)
        source: Any = self._source
        if isinstance(source, Watch):
            self._held.extend([(None, row) for row in source.look()])  # type: ignore[misc]  # _T is UnitChange
            return
        rows = [(getattr(source, "cursor", None), row) for row in islice(source, _PAGE)]
        self._ended = len(rows) < _PAGE
        self._held.extend(rows)


class _Opening(Generic[_Self]):
    """What ``open`` returns: awaited, or entered with ``async with``, it gives the open object."""

    def __init__(self, kind: type[_Self], threads: _Threads, make: Callable[[], object]) -> None:
        self._kind, self._threads, self._make = kind, threads, make

    def __await__(self) -> Generator[Any, None, _Self]:
        return self._open().__await__()

    async def __aenter__(self) -> _Self:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(self, *_exc: object) -> None:
        await self._opened.close()

    async def _open(self) -> _Self:
        making = self._threads.submit(self._make)
        try:
            return _made(self._kind, await asyncio.shield(asyncio.wrap_future(making)), self._threads)
        except BaseException:  # a caller who was cancelled too
            making.add_done_callback(self._close_made)
            raise

    def _close_made(self, making: Future[Any]) -> None:
        self._threads.close(None if making.exception() else making.result().close, wait=False)


class _Asynchronous:
    """Runs the methods of an object in threads of its own, so that the event loop runs none of their work."""

    _wrapped: Any
    _threads: _Threads
    _is_view = False
    _closed = False

    async def close(self) -> None:
        """Wait for the calls that were made, and close. Further calls raise StoreClosedError.

        A view of a namespace is closed alone: the store stays open. Where the wait is cancelled, closing goes on.
        """
        self._closed = True
        if not self._is_view:
            await asyncio.to_thread(self._threads.close, self._wrapped.close)

    async def __aenter__(self: _Self) -> _Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close."""
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}{', closed' if self._closed or self._threads.closed else ''}>"

    def _submit(self, call: Callable[[], _T]) -> Future[_T]:
        if self._closed:
            raise StoreClosedError(f"this {type(self).__name__} is closed; open a new one")
        return self._threads.submit(call)

    async def _run(self, call: Callable[[], _T]) -> _T:
        """Call in a thread. Cancelled before it began, it is not made; later it is completed and its result dropped."""
        return await asyncio.wrap_future(self._submit(call))


def _made(kind: type[_Self], wrapped: object, threads: _Threads, *, is_view: bool = False) -> _Self:
    made = object.__new__(kind)
    vars(made).update(_wrapped=wrapped, _threads=threads, _is_view=is_view)
    return made


def _described(method: Callable[..., object], real: Callable[..., object]) -> None:
    """Give a method name, signature and docstring, inherited ones too, of another."""
    functools.update_wrapper(method, real)
    method.__doc__ = inspect.getdoc(real)


def _method(real: Callable[Concatenate[Any, _P], _T]) -> Callable[Concatenate[Any, _P], Coroutine[Any, Any, _T]]:
    """The method of that name of the wrapped object, awaited."""
    name = real.__name__

    async def method(self: Any, /, *arguments: _P.args, **more: _P.kwargs) -> _T:
        result: _T = await self._run(functools.partial(getattr(self._wrapped, name), *arguments, **more))
        return result

    _described(method, real)
    return method


def _listing(real: Callable[Concatenate[Any, _P], Iterator[_T]]) -> Callable[Concatenate[Any, _P], AsyncListing[_T]]:
    """The method of that name of the wrapped object, whose iterator is read by ``async for``."""
    name = real.__name__

    def method(self: Any, /, *arguments: _P.args, **more: _P.kwargs) -> AsyncListing[_T]:
        return AsyncListing(self._submit, functools.partial(getattr(self._wrapped, name), *arguments, **more))

    _described(method, real)
    vars(method)["__signature__"] = inspect.signature(real).replace(return_annotation="AsyncListing")
    return method


def _static(real: Callable[_P, _T]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """A static method, awaited."""

    async def method(*arguments: _P.args, **more: _P.kwargs) -> _T:
        return await asyncio.to_thread(real, *arguments, **more)

    _described(method, real)
    return method


class AsyncVectorStore(_Asynchronous):
    """A :class:`VectorStore` or another backend for asyncio: each method of the same name is awaited.

    The work is done in at most ``threads`` threads, so the event loop goes on meanwhile. A call that is cancelled
    before its turn is not made; one that runs is completed and its result dropped, so a write is never half done.
    ``units``, ``changes``, ``watch`` and ``export_rows`` are read with ``async for``, and so is the store itself; what
    they refuse, they refuse at the first step. ``change_number`` is a method. docs/how-to/async.md has more.

    Examples:
        >>> import asyncio
        >>> from memevolve_gpu import AsyncVectorStore, HashingEmbedder
        >>> async def main():
        ...     async with AsyncVectorStore.open("memory", HashingEmbedder()) as store:
        ...         await store.store({"id": "git", "content": "Rebase before you push"})
        ...         hits = await store.search_units("rebase", 1)
        ...         return [hit.id for hit in hits], [unit["id"] async for unit in store.units()]
        >>> asyncio.run(main())
        (['git'], ['git'])
    """

    def __init__(self, store: StorageBackend, *, threads: int = 4) -> None:
        """Wrap an open store, which :meth:`close` closes.

        Args:
            store: A ``VectorStore`` or another backend.
            threads: Most threads, and so most calls at a time; further calls wait for their turn.

        Raises:
            ConfigurationError: ``store`` is no backend, or ``threads`` no whole number of at least 1.
        """
        if not isinstance(store, StorageBackend):
            raise ConfigurationError(f"store must be an open VectorStore or another backend, got {shown(store)}")
        self._wrapped, self._threads = store, _Threads(threads, type(self).__name__)

    @classmethod
    def open(
        cls,
        place: str | os.PathLike[str] | None,
        embedding_function: EmbeddingFunction | None,
        embedding_dim: int | None = None,
        storage_config: object = None,
        namespace: Sequence[str] | str | None = None,
        *,
        threads: int = 4,
    ) -> _Opening[AsyncVectorStore]:
        """Open a store by path or by Milvus address, or make it there.

        Args:
            place: As for :func:`open_store`, like the following.
            embedding_function: Maps a text to a 1-D array; it is called in the threads.
            embedding_dim: Length of the vectors; None takes it from the store, else from the function.
            storage_config: A ``StorageConfig`` or a mapping; None reads the environment and ``.env``.
            namespace: The namespace to open; None for that of ``storage_config``.
            threads: As for the constructor.

        Returns:
            What gives the store when it is awaited, or entered: ``async with AsyncVectorStore.open(...) as store``.

        Raises:
            MemEvolveError: As :func:`open_store`; where it is awaited.
        """
        make = functools.partial(open_store, place, embedding_function, embedding_dim, storage_config, namespace)
        return _Opening(cls, _Threads(threads, cls.__name__), make)

    @property
    def capabilities(self) -> frozenset[str]:
        """Names of the optional methods that the backend implements itself."""
        return frozenset(self._wrapped.capabilities)

    @property
    def config(self) -> StorageConfig:
        """The settings in use."""
        config: StorageConfig = self._wrapped.config
        return config

    @property
    def embedding_dim(self) -> int:
        """Length of every vector."""
        return int(self._wrapped.embedding_dim)

    @property
    def metric(self) -> str:
        """The distance of searches: l2 (squared), cosine (1 - cosine) or ip (-dot)."""
        return str(self._wrapped.metric)

    @property
    def namespace_path(self) -> tuple[str, ...]:
        """The namespace whose units this store reads and writes; empty for the default one."""
        return tuple(self._wrapped.namespace_path)

    def namespace(self, *path: str) -> AsyncVectorStore:
        """Give a view of one namespace, as :meth:`VectorStore.namespace`; it shares the threads.

        Args:
            path: The parts of its name, the outermost first, below the namespace of this store.

        Returns:
            The view. Closing it leaves this store open.

        Raises:
            ConfigurationError: A part is no text that can be one, or the backend has no namespaces.
        """
        if self._closed:
            raise StoreClosedError(f"this {type(self).__name__} is closed; open a new one")
        return _made(type(self), self._wrapped.namespace(*path), self._threads, is_view=True)

    async def change_number(self) -> int | None:
        """Read the number of the newest change by anyone.

        Returns:
            The number, for ``unchanged_since`` and ``after``; None where changes are not numbered.
        """
        number: int | None = await self._run(lambda: self._wrapped.change_number)
        return number

    def __aiter__(self) -> AsyncListing[JsonObject]:
        return self.units()

    store = _method(VectorStore.store)
    store_batch = _method(VectorStore.store_batch)
    replace_batch = _method(VectorStore.replace_batch)
    update = _method(VectorStore.update)
    update_where = _method(VectorStore.update_where)
    patch = _method(VectorStore.patch)
    delete = _method(VectorStore.delete)
    delete_batch = _method(VectorStore.delete_batch)
    delete_where = _method(VectorStore.delete_where)
    clear = _method(VectorStore.clear)

    retrieve = _method(VectorStore.retrieve)
    retrieve_batch = _method(VectorStore.retrieve_batch)
    retrieve_all = _method(VectorStore.retrieve_all)
    exists = _method(VectorStore.exists)
    count = _method(VectorStore.count)
    facets = _method(VectorStore.facets)
    get_metadata = _method(VectorStore.get_metadata)
    units = _listing(VectorStore.units)
    export_rows = _listing(VectorStore.export_rows)
    vectors_of = _method(VectorStore.vectors_of)
    sample_vectors = _method(VectorStore.sample_vectors)
    inventory = _method(VectorStore.inventory)

    search = _method(VectorStore.search)
    search_units = _method(VectorStore.search_units)
    search_keywords = _method(VectorStore.search_keywords)
    search_vectors = _method(VectorStore.search_vectors)
    similarities = _method(VectorStore.similarities)

    namespaces = _method(VectorStore.namespaces)
    delete_namespace = _method(VectorStore.delete_namespace)
    set_limits = _method(VectorStore.set_limits)
    set_expiry = _method(VectorStore.set_expiry)
    expiry = _method(VectorStore.expiry)
    expiries = _method(VectorStore.expiries)

    operations = _method(VectorStore.operations)
    history = _method(VectorStore.history)
    undo = _method(VectorStore.undo)
    changes = _listing(VectorStore.changes)
    watch = _listing(VectorStore.watch)
    forget_subject = _method(VectorStore.forget_subject)

    record_access = _method(VectorStore.record_access)
    access_order = _method(VectorStore.access_order)
    access_counts = _method(VectorStore.access_counts)

    run_maintenance = _method(VectorStore.run_maintenance)
    retrain = _method(VectorStore.retrain)
    register_management_operation = _method(VectorStore.register_management_operation)
    check = _method(VectorStore.check)
    refresh = _method(VectorStore.refresh)
    snapshot = _method(VectorStore.snapshot)
    backup = _method(VectorStore.backup)
    restore = staticmethod(_static(VectorStore.restore))
    exists_at = staticmethod(_static(VectorStore.exists_at))
    get_storage_health = _method(VectorStore.get_storage_health)
    statistics = _method(VectorStore.statistics)
    save_state = _method(VectorStore.save_state)
    restore_state = _method(VectorStore.restore_state)


class AsyncMemorySystem(_Asynchronous):
    """A :class:`MemorySystem` for asyncio: each method of the same name is awaited.

    Threads and cancellation are as for :class:`AsyncVectorStore`. Encoders and callbacks run in the threads.

    Examples:
        >>> import asyncio
        >>> from memevolve_gpu import AsyncMemorySystem, HashingEmbedder, MemorySystemConfig, VectorStore
        >>> async def main():
        ...     with VectorStore("memory", HashingEmbedder()) as store:
        ...         async with AsyncMemorySystem.open(MemorySystemConfig(storage_backend=store)) as memory:
        ...             await memory.add_units([{"id": "git", "content": "Rebase before you push"}])
        ...             return [unit["id"] for unit in await memory.query_memory("rebase", 1)]
        >>> asyncio.run(main())
        ['git']
    """

    def __init__(self, system: MemorySystem, *, threads: int = 4) -> None:
        """Wrap a memory system, which :meth:`close` closes.

        Args:
            system: The system.
            threads: As for :class:`AsyncVectorStore`.

        Raises:
            ConfigurationError: ``system`` is none, or ``threads`` no whole number of at least 1.
        """
        if not isinstance(system, MemorySystem):
            raise ConfigurationError(f"system must be a MemorySystem, got {shown(system)}")
        self._wrapped, self._threads = system, _Threads(threads, type(self).__name__)

    @classmethod
    def open(
        cls, config: MemorySystemConfig | None = None, encoder: object = None, *, threads: int = 4
    ) -> _Opening[AsyncMemorySystem]:
        """Create a memory system.

        Args:
            config: Settings and components; None for the defaults.
            encoder: An object with ``encode_experience`` and ``encode_trajectory``; None if only units are added.
            threads: As for :class:`AsyncVectorStore`.

        Returns:
            What gives the system when it is awaited, or entered with ``async with``.

        Raises:
            MemEvolveError: As :class:`MemorySystem`; where it is awaited.
        """
        return _Opening(cls, _Threads(threads, cls.__name__), functools.partial(MemorySystem, config, encoder))

    @classmethod
    def from_env(
        cls,
        index_file: str | os.PathLike[str] | None = None,
        encoder: object = None,
        *,
        namespace: Sequence[str] | str | None = None,
        threads: int = 4,
        **settings: Any,
    ) -> _Opening[AsyncMemorySystem]:
        """Create a system with the store and embedder of the environment, as :meth:`MemorySystem.from_env`.

        Args:
            index_file: As there, like the following.
            encoder: As in the constructor of :class:`MemorySystem`.
            namespace: As in :func:`open_store`.
            threads: As for :class:`AsyncVectorStore`.
            settings: Fields of :class:`MemorySystemConfig`.

        Returns:
            As :meth:`open`.

        Raises:
            MemEvolveError: The store cannot be opened, or a setting is not allowed; where it is awaited.
        """
        make = functools.partial(MemorySystem.from_env, index_file, encoder, namespace=namespace, **settings)
        return _Opening(cls, _Threads(threads, cls.__name__), make)

    @property
    def config(self) -> MemorySystemConfig:
        """The settings and components that the system was made with."""
        config: MemorySystemConfig = self._wrapped.config
        return config

    @property
    def storage(self) -> AsyncVectorStore:
        """The store in use; it shares the threads, and closing it leaves the system open."""
        return _made(AsyncVectorStore, self._wrapped.storage, self._threads, is_view=True)

    add_experience = _method(MemorySystem.add_experience)
    add_trajectory = _method(MemorySystem.add_trajectory)
    add_trajectory_batch = _method(MemorySystem.add_trajectory_batch)
    add_units = _method(MemorySystem.add_units)
    query_memory = _method(MemorySystem.query_memory)
    retrieve_by_ids = _method(MemorySystem.retrieve_by_ids)
    manage_memory = _method(MemorySystem.manage_memory)  # type: ignore[arg-type]  # its self could be an option
    get_health_metrics = _method(MemorySystem.get_health_metrics)
    get_storage_health = _method(MemorySystem.get_storage_health)
    get_operation_log = _method(MemorySystem.get_operation_log)
    clear_operation_log = _method(MemorySystem.clear_operation_log)
    reconfigure_component = _method(MemorySystem.reconfigure_component)
