"""The calls that a backend may lack altogether: their defaults raise an error that names the capability."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ConfigurationError
from .namespaces import NamespaceInfo

if TYPE_CHECKING:
    from .base import StorageBackend
    from .history import Erasure, Operation, UnitChange, UnitVersion, Watch

__all__ = ["Unsupported"]

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

    def set_limits(self, *, max_units: int | None = None, default_ttl: Any = None) -> NamespaceInfo:
        """Set the limits of the namespace of this backend; both at once, None for no limit.

        Args:
            max_units: Most units. Those beyond a lower limit stay, and no new one is taken.
            default_ttl: Seconds, or a timedelta, after which units expire that are stored from now on without a time
                of their own.

        Returns:
            The namespace with its new limits.

        Raises:
            ConfigurationError: ``max_units`` is no whole number of at least 1, or the backend has no namespaces.
            InvalidUnitError: ``default_ttl`` is no time.
        """
        raise self._missing("keep namespaces", "namespace")

    def set_expiry(self, ids: Iterable[str], *, ttl: Any = None, expires_at: Any = None) -> int:
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
        """List what changed the units and is still in the history.

        Args:
            limit: Most operations.
            before: Lists only those with a smaller id, to read on.

        Returns:
            The operations, newest first.

        Raises:
            ConfigurationError: The backend keeps no history.
        """
        raise self._missing("keep a history", "history")

    def history(self, unit_id: str) -> list[UnitVersion]:
        """Read every version of a unit that is kept.

        Args:
            unit_id: Its id.

        Returns:
            The versions, oldest first.

        Raises:
            ConfigurationError: The backend keeps no history.
        """
        raise self._missing("keep a history", "history")

    def undo(self, operation: int) -> Operation:
        """Take back an operation.

        Args:
            operation: The id of an :class:`Operation`.

        Returns:
            The undo.

        Raises:
            ConfigurationError: The backend keeps no history.
        """
        raise self._missing("keep a history", "history")

    def changes(
        self, after: int = 0, *, limit: int | None = None, prefix: Sequence[str] | str | None = None
    ) -> Iterator[UnitChange]:
        """Read what changed, in order.

        Args:
            after: The number of a change; those after it are read.
            limit: Most changes; None for all up to now.
            prefix: The namespaces of a subtree; None for this one alone.

        Returns:
            An iterator over the changes.

        Raises:
            ConfigurationError: The backend has no feed of changes.
        """
        raise self._missing("give a feed of changes", "changes")

    def watch(
        self, after: int | None = None, *, timeout: float | None = None, prefix: Sequence[str] | str | None = None
    ) -> Watch:
        """Wait for changes by anyone, and yield them as they come.

        Args:
            after: As for :meth:`changes`; None for the newest change now.
            timeout: Seconds without a change after which the iterator ends; None for never.
            prefix: As for :meth:`changes`.

        Returns:
            An iterator over the changes.

        Raises:
            ConfigurationError: The backend has no feed of changes.
        """
        raise self._missing("give a feed of changes", "changes")

    def forget_subject(
        self, filters: Mapping[str, Any], *, prefix: Sequence[str] | str | None = None, timeout: float = 30.0
    ) -> Erasure:
        """Delete units for good: no byte of them is left in the files of the store.

        Args:
            filters: Which units.
            prefix: As for :meth:`changes`.
            timeout: Seconds to wait for readers in other processes.

        Returns:
            The certificate.

        Raises:
            ConfigurationError: The backend cannot tell which files hold its units.
        """
        raise self._missing("erase units from its files", "forget_subject")

    def _missing(self, ability: str, name: str = "", argument: str = "") -> ConfigurationError:
        """name: of the capability that is missing. argument: that asked for it."""
        why = f" ({name!r} is not among its capabilities)" if name else ""
        kind = getattr(self, "_kind", type(self).__name__)
        return ConfigurationError(f"{argument}{': ' * bool(argument)}a {kind} cannot {ability}{why}; use a VectorStore")

    def _refuse(self, **given: Any) -> None:
        """Raise ConfigurationError for an argument, other than None, that this backend cannot honour."""
        for argument, value in given.items():
            if value is not None:
                raise self._missing(*_ASKED_BY[argument], argument)
