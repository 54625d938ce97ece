"""The calls that a backend may lack altogether: their defaults raise an error that names the capability."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ...errors import ConfigurationError
from ...types import Filters, Moment, Ttl
from .namespaces import UNCHANGED, NamespaceInfo, Unchanged

if TYPE_CHECKING:
    from .base import StorageBackend
    from .history import Erasure, Operation, UnitChange, UnitVersion, Watch

_ASKED_BY = {
    "as_of": ("keep a history", "history"),
    "expires_at": ("let units expire", "set_expiry"),
    "prefix": ("keep namespaces", "namespace"),
    "ttl": ("let units expire", "set_expiry"),
}
"""What an argument needs: the ability, and the name of the capability."""


class Unsupported:
    """What only some backends have: namespaces, expiry, history, a feed of changes, erasure."""

    # Namespaces and expiry

    def namespace(self, *path: str) -> StorageBackend:
        """Give a view of one namespace: a backend of its own that sees and changes nothing else.

        Closing the view leaves this backend open; closing this backend ends the view.

        Args:
            path: The parts of its name, the outermost first, below the namespace of this backend.

        Returns:
            The view, of the class of this backend. The namespace exists from its first unit on.

        Raises:
            ConfigurationError: A part is no text of 1 to 256 characters without slashes and control characters, or the
                backend has no namespaces.
        """
        raise self._missing("keep namespaces", "namespace")

    def namespaces(self, prefix: Sequence[str] | str = ()) -> list[NamespaceInfo]:
        """List the namespaces that hold units or have limits, in the order of their paths.

        Args:
            prefix: Lists only this one and those below it; relative to the namespace of this backend.

        Returns:
            Path, count and limits of each.

        Raises:
            ConfigurationError: The backend has no namespaces.
        """
        raise self._missing("keep namespaces", "namespace")

    def delete_namespace(self, *path: str) -> int:
        """Delete a namespace with its units and limits, in one transaction; those below it stay.

        Args:
            path: As for :meth:`namespace`; none for the namespace of this backend.

        Returns:
            The number of deleted units.

        Raises:
            ConfigurationError: The backend has no namespaces.
        """
        raise self._missing("keep namespaces", "namespace")

    def set_limits(
        self, *, max_units: int | Unchanged | None = UNCHANGED, default_ttl: Ttl | Unchanged = UNCHANGED
    ) -> NamespaceInfo:
        """Set the limits of the namespace of this backend. A limit that is not named stays as it is.

        Args:
            max_units: Most units, None for no limit. Those beyond a lower limit stay, and no new one is taken.
            default_ttl: Seconds, or a timedelta, after which units expire that are stored from now on without a time
                of their own; None for never.

        Returns:
            The namespace with its new limits.

        Raises:
            ConfigurationError: ``max_units`` is no whole number of at least 1, or the backend has no namespaces.
            InvalidUnitError: ``default_ttl`` is no time.
        """
        raise self._missing("keep namespaces", "namespace")

    def set_expiry(self, ids: Iterable[str], *, ttl: Ttl = None, expires_at: Moment = None) -> int:
        """Set when units expire, in one transaction.

        Args:
            ids: Ids; those of no unit are skipped.
            ttl: Seconds from now, or a timedelta.
            expires_at: Unix time in seconds, or a datetime with its zone. Neither: the units do not expire.

        Returns:
            The number of units found.

        Raises:
            ConfigurationError: Units of this backend do not expire.
            InvalidUnitError: An id or a time is none; nothing is changed.
        """
        raise self._missing("let units expire", "set_expiry")

    def expiry(self, unit_id: str) -> float | None:
        """Read when a unit expires.

        Args:
            unit_id: Its id.

        Returns:
            Unix time in seconds; None for a unit that does not expire, and where there is no unit of that id.
        """
        del unit_id
        return None

    def expiries(self, ids: Sequence[str]) -> dict[str, float]:
        """Read when units expire.

        Args:
            ids: Ids; those of no unit, and of units that do not expire, are skipped.

        Returns:
            Unix times in seconds, by id.
        """
        del ids
        return {}

    # History

    def operations(self, limit: int = 100, *, before: int | None = None) -> list[Operation]:
        """List what changed the units of this namespace and is still in the history.

        Args:
            limit: Most operations.
            before: Lists only those with a smaller id, to read on.

        Returns:
            The operations, newest first.

        Raises:
            ConfigurationError: The backend keeps no history.
            InvalidQueryError: An argument is no such number.
        """
        raise self._missing("keep a history", "history")

    def history(self, unit_id: str) -> list[UnitVersion]:
        """Read every version of a unit that is kept, also of one that was deleted.

        Args:
            unit_id: Its id.

        Returns:
            The versions, oldest first; empty where none is known.

        Raises:
            ConfigurationError: The backend keeps no history.
            InvalidUnitError: ``unit_id`` is no id.
        """
        raise self._missing("keep a history", "history")

    def undo(self, operation: int) -> Operation:
        """Take back an operation in one transaction, which is an operation itself and can be undone.

        Units that it deleted or replaced are there again, with their vectors and times of expiry; nothing is embedded.
        Units that it stored are gone. How often units were read, and limits of a namespace, are not restored.

        Args:
            operation: The id of an :class:`Operation` of this namespace.

        Returns:
            The undo.

        Raises:
            ConfigurationError: The backend keeps no history.
            ConflictError: Units are no longer as the operation left them; its ``ids`` names them. Nothing was changed.
            HistoryError: There is no such operation of this namespace in the history.
            CapacityError: The units do not fit.
            CorruptStoreError: A version that it would bring back changed by itself on the disk.
            InvalidQueryError: ``operation`` is no number.
        """
        raise self._missing("keep a history", "history")

    def changes(
        self, after: int = 0, *, limit: int | None = None, prefix: Sequence[str] | str | None = None
    ) -> Iterator[UnitChange]:
        """Read what changed, in order; also what other processes changed.

        To follow a store, keep ``seq`` of the last change that was handled and give it as ``after`` the next time. To
        begin, take :attr:`VectorStore.change_number`, read the store, and follow from that number.

        Args:
            after: The number of a change; those after it are read.
            limit: Most changes; None for all up to now.
            prefix: Reads the changes of the namespace of this path, which counts from that of this store, and of all
                below it; () for all below this one. None reads those of this one alone.

        Returns:
            An iterator over the changes.

        Raises:
            ConfigurationError: The backend has no feed of changes.
            HistoryError: Changes after ``after`` are no longer kept, or it is beyond the newest; read the store again.
            InvalidQueryError: ``after`` or ``limit`` is no such number.
        """
        raise self._missing("give a feed of changes", "changes")

    def watch(
        self, after: int | None = None, *, timeout: float | None = None, prefix: Sequence[str] | str | None = None
    ) -> Watch:
        """Wait for changes by anyone, and yield them as they come.

        Args:
            after: As for :meth:`changes`; None for the newest change now.
            timeout: Seconds without a change after which the iterator ends; None waits until the store is closed.
            prefix: As for :meth:`changes`.

        Returns:
            An iterator over the changes; it blocks until the next one. Closing the store ends it with StoreClosedError.

        Raises:
            ConfigurationError: The backend has no feed of changes.
            HistoryError: As :meth:`changes`.
            InvalidQueryError: An argument is no such number.
        """
        raise self._missing("give a feed of changes", "changes")

    def forget_subject(
        self, filters: Filters, *, prefix: Sequence[str] | str | None = None, timeout: float = 30.0
    ) -> Erasure:
        """Delete units for good: no byte of them is left in the files of the store.

        Deletes the units that match, and the versions of all units that ever matched, from the history too. The
        database is rewritten, its log emptied, the snapshot made again, and the lists of management operations and
        sampled queries are emptied. The change feed begins again, so those who follow it read the store again. Takes as
        long as copying the store. Where it is interrupted, the next opening of the store finishes it.

        Args:
            filters: Which units, see ``docs/reference/filters.md``; not empty.
            prefix: As for :meth:`changes`.
            timeout: Seconds to wait for readers in other processes.

        Returns:
            The certificate.

        Raises:
            ConfigurationError: The backend cannot tell which files hold its units.
            InvalidFilterError: ``filters`` is empty or malformed.
            StorageError: A reader of another process did not end; the units are deleted, call again to finish.
        """
        raise self._missing("erase units from its files", "forget_subject")

    def _missing(self, ability: str, name: str = "", argument: str = "") -> ConfigurationError:
        """name: of the capability that is missing. argument: that asked for it."""
        why = f" ({name!r} is not among its capabilities)" if name else ""
        kind = getattr(self, "_kind", type(self).__name__)
        return ConfigurationError(f"{argument}{': ' * bool(argument)}a {kind} cannot {ability}{why}; use a VectorStore")

    def _refuse(self, **given: object) -> None:
        """Raise ConfigurationError for an argument, other than None, that this backend cannot honour."""
        for argument, value in given.items():
            if value is not None:
                raise self._missing(*_ASKED_BY[argument], argument)
