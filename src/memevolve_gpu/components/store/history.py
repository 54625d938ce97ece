"""The history of a store: operations, versions, undo, and the feed of changes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from ...errors import InvalidFilterError, InvalidQueryError
from ...live.query_sample import KEY as QUERY_KEY
from ...records import history
from ...records.erasure import erase, finish_erasure, leftovers
from ...records.schema import FIELDS_KEY
from ...types import Filters, MemoryUnit
from ...utils.arguments import real_number, shown, whole_number
from .capacity import report_pruned, reserve_room
from .namespaces import Path, subtree_path
from .reports import history_key
from .units import checked_id
from .unsupported import Unsupported

if TYPE_CHECKING:
    from ...records.filters import Filter
    from ...records.writer import WriteContext
    from .session import StoreSession

_PAGE = 500
_FASTEST, _SLOWEST = 0.002, 0.05
"""Seconds between two looks for new changes."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One transaction that changed units: a store, a batch, a prune, an undo.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> with VectorStore("memory", HashingEmbedder()) as store:
        ...     _ = store.store_batch([{"content": "Rebase before you push"}, {"content": "Write tests first"}])
        ...     [(operation.kind, operation.changes) for operation in store.operations()]
        [('store_batch', 2)]
    """

    id: int
    """The number of its first change; what :meth:`VectorStore.undo` takes."""
    kind: str
    """The method, or the management operation, that made it."""
    at: float
    """Unix time."""
    changes: int
    """Units that it stored, changed or deleted in the namespace of the store."""


@dataclass(frozen=True, slots=True)
class UnitVersion:
    """One version of a unit, or its end.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> with VectorStore("memory", HashingEmbedder()) as store:
        ...     unit_id = store.store({"content": "Rebase before you push"})
        ...     _ = store.delete(unit_id)
        ...     [(version.change, version.kind) for version in store.history(unit_id)]
        [('put', 'store'), ('delete', 'delete')]
    """

    seq: int
    """The number of the change that made it; 0 for a version from before the history."""
    change: str
    """put, edit (the text stayed the same), delete, or erased."""
    operation: int | None
    """The operation that made it; None for a version from before the history."""
    kind: str
    """The kind of the operation; empty for a version from before the history."""
    at: float | None
    """Unix time of the operation."""
    unit: MemoryUnit | None
    """The unit in this version; None where it was deleted or erased."""


class UnitChange(NamedTuple):
    """One change in the feed of changes.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> with VectorStore("memory", HashingEmbedder()) as store:
        ...     _ = store.store({"id": "git", "content": "Rebase before you push"})
        ...     [(change.operation, change.id) for change in store.changes()]
        [('put', 'git')]
    """

    seq: int
    """Its number; changes come in the order of their numbers, which may have gaps."""
    operation: str
    """put (a new unit or another text), edit (the text stayed the same) or delete."""
    id: str
    namespace: Path
    unit: MemoryUnit | None
    """The unit after the change; None for delete."""


@dataclass(frozen=True, slots=True)
class Erasure:
    """The certificate of an erasure.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> with VectorStore("memory", HashingEmbedder()) as store:
        ...     _ = store.store({"content": "Rebase before you push", "metadata": {"user": "alice"}})
        ...     store.forget_subject({"metadata.user": "alice"}).units
        1
    """

    units: int
    """Units that were deleted."""
    versions: int
    """Versions that were removed from the history."""
    seq: int
    """The number of the last change; the change feed begins behind it."""
    at: float
    """Unix time at which it was complete."""
    files: tuple[str, ...]
    """Files that were rewritten, emptied or removed."""
    not_erased: tuple[str, ...]
    """Files beside the store that may hold copies and were left alone: replaced stores, logs set aside, old pickles."""


class Watch(Iterator[UnitChange]):
    """Changes as they come; the iterator blocks until the next one. See :meth:`VectorStore.watch`."""

    def __init__(
        self,
        newest: Callable[[], int],
        changes: Callable[[int], list[UnitChange]],
        after: int,
        timeout: float | None,
    ) -> None:
        self._newest, self._changes, self._after, self._timeout = newest, changes, after, timeout
        self._looked_at = -1
        self._since: float | None = None
        self._pause = _FASTEST
        self._held: deque[UnitChange] = deque()

    def look(self) -> list[UnitChange]:
        """Read the next changes; empty where there are none now."""
        newest = self._newest()
        found = self._changes(self._after) if newest != self._looked_at else []
        if found:
            self._after, self._since, self._pause = found[-1].seq, None, _FASTEST
        elif newest != self._looked_at:
            self._after, self._looked_at = max(self._after, newest), newest
        return found

    def pause(self) -> float | None:
        """Seconds to wait before the next look; None when the time is over."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        pause, self._pause = self._pause, min(2 * self._pause, _SLOWEST)
        if self._timeout is None:
            return pause
        left = self._since + self._timeout - now
        return min(pause, left) if left > 0 else None

    def __next__(self) -> UnitChange:
        while not self._held:
            self._held.extend(self.look())
            if not self._held:
                pause = self.pause()
                if pause is None:
                    raise StopIteration
                time.sleep(pause)
        return self._held.popleft()


_operation: ContextVar[str | None] = ContextVar("operation", default=None)


@contextmanager
def named_operation(name: str) -> Iterator[None]:
    """What the block writes is of this kind in the history of the store."""
    token = _operation.set(name)
    try:
        yield
    finally:
        _operation.reset(token)


def operation_name(method: str) -> str:
    """The kind of an operation in the history: that of the block, else the method."""
    return _operation.get() or method


class HistoryMixin(Unsupported):
    """The methods of a ``VectorStore`` that concern its past."""

    if TYPE_CHECKING:
        namespace_path: Path

        @property
        def _open(self) -> StoreSession: ...
        @property
        def _key(self) -> int: ...
        def _write(self, operation: str, *, grouped: bool = False) -> WriteContext: ...
        def _filter(self, filters: object) -> Filter: ...

    def operations(self, limit: int = 100, *, before: int | None = None) -> list[Operation]:
        most, key = whole_number("limit", limit), self._key
        below = 2**62 if before is None else min(whole_number("before", before, least=0), 2**62)
        rows = self._open.records.past(lambda con: history.operations(con, key, min(most, 10_000), below))
        return [Operation(row.seq, row.kind, row.at, row.changes) for row in rows]

    def history(self, unit_id: str) -> list[UnitVersion]:
        wanted, key = checked_id(unit_id), self._key
        rows = self._open.records.past(lambda con: history.versions(con, key, wanted))
        return [UnitVersion(*row) for row in rows]

    def undo(self, operation: int) -> Operation:
        session, number = self._open, min(whole_number("operation", operation), 2**62)
        with self._write("undo") as tx:
            steps = tx.outside(lambda con: history.to_undo(con, tx.namespace, number))
            first = tx.head.last_seq + 1
            for step in steps:
                if step.unit is None:
                    tx.drop(step.unit_id)
            pruned = reserve_room(session, tx, [step.unit_id for step in steps if step.unit is not None])
            for step in steps:
                if step.unit is None:
                    continue
                if step.vector is None:  # it stayed the same, so it is alive
                    tx.edit(step.unit_id, step.unit, step.expires_at)
                else:
                    tx.put(step.unit, step.vector, step.unit_id, step.expires_at)
        session.written()
        report_pruned(session, pruned)
        found = self.operations(1, before=first + 1)
        return found[0] if found and found[0].id == first else Operation(first, "undo", session.clock(), 0)

    def changes(
        self, after: int = 0, *, limit: int | None = None, prefix: Sequence[str] | str | None = None
    ) -> Iterator[UnitChange]:
        wanted = None if limit is None else whole_number("limit", limit)
        start = min(whole_number("after", after, least=0), 2**62)
        below = None if prefix is None else (*self.namespace_path, *subtree_path(prefix))
        last = self._open.records.head().last_seq
        first = self._changes(start, min(_PAGE, wanted or _PAGE), below)
        return self._pages_of_changes(first, wanted, below, last)

    def watch(
        self, after: int | None = None, *, timeout: float | None = None, prefix: Sequence[str] | str | None = None
    ) -> Watch:
        patience = None if timeout is None else seconds_to_wait(timeout)
        seq = self._open.records.head().last_seq if after is None else min(whole_number("after", after, least=0), 2**62)
        below = None if prefix is None else (*self.namespace_path, *subtree_path(prefix))
        self._changes(seq, 1, below)
        return Watch(
            lambda: self._open.records.head().last_seq, lambda after: self._changes(after, _PAGE, below), seq, patience
        )

    def forget_subject(
        self, filters: Filters, *, prefix: Sequence[str] | str | None = None, timeout: float = 30.0
    ) -> Erasure:
        session, parsed = self._open, self._filter(filters)
        if not parsed.root.parts:
            raise InvalidFilterError("filters must say whose units to erase; for all units use delete_namespace")
        seconds = seconds_to_wait(timeout)
        below = None if prefix is None else (*self.namespace_path, *subtree_path(prefix))
        spaces = [self._key] if below is None else list(session.records.all_namespaces(below))
        had_snapshot = session.live.snapshot_path.exists()
        session.accesses.flush()
        with self._write("forget_subject") as tx:
            erased = erase(tx, spaces, parsed, [*map(history_key, spaces), QUERY_KEY, FIELDS_KEY])
            session.live.query_sample.forget()  # here: the background saves them in a transaction
            session.live.columns.kept.forget()
        session.live.reload("units were erased")
        files = session.maintenance.alone(lambda: finish_erasure(session.records, seconds))
        if had_snapshot:
            session.maintenance.snapshot()
        left = leftovers(session.records.path, session.prefix)
        return Erasure(*erased, session.clock(), tuple(files), tuple(left))

    def _pages_of_changes(
        self, page: list[UnitChange], limit: int | None, below: Path | None, last: int
    ) -> Iterator[UnitChange]:
        left = 2**62 if limit is None else limit
        while page:
            for change in page:
                if change.seq > last or not left:
                    return
                left -= 1
                yield change
            page = self._changes(page[-1].seq, min(_PAGE, left), below) if left else []

    def _changes(self, after: int, limit: int, below: Path | None) -> list[UnitChange]:
        key, path = self._key, self.namespace_path
        spaces = {key: path} if below is None else self._open.records.all_namespaces(below)
        listed = None if below == () else list(spaces)
        rows = self._open.records.past(lambda con: history.changes(con, after, limit, listed))
        if any(row.ns not in spaces for row in rows):  # a namespace was made meanwhile
            spaces = self._open.records.all_namespaces(below or ())
        return [UnitChange(row.seq, row.change, row.unit_id, spaces[row.ns], row.unit) for row in rows]

    def _moment(self, as_of: object) -> tuple[int | None, float | None]:
        """A state as callers give it: a change number, or a Unix time."""
        if isinstance(as_of, datetime):
            if as_of.tzinfo is None:
                raise InvalidQueryError(
                    f"as_of must name its zone, got {shown(as_of)}; write datetime.now(timezone.utc)"
                )
            return None, as_of.timestamp()
        if isinstance(as_of, float):
            return None, real_number("as_of", as_of, "a Unix time", -1e12, 1e12, InvalidQueryError)
        return min(whole_number("as_of", as_of, least=0), 2**62), None

    def _past_units(self, as_of: object, filters: object = None, unit_id: str | None = None) -> list[MemoryUnit]:
        seq, at = self._moment(as_of)
        key, parsed = self._key, self._filter(filters)
        return self._open.records.past(
            lambda con: history.units_at(con, key, history.moment_of(con, seq, at), parsed, unit_id)
        )


def seconds_to_wait(timeout: object) -> float:
    """The argument ``timeout``. Raises InvalidQueryError for what is no number of seconds."""
    return real_number("timeout", timeout, "a number of seconds", 0.0, 1e9, InvalidQueryError)
