"""The part of ``VectorStore`` that makes views of namespaces, and sets limits and expiry."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from ...errors import ConfigurationError, EmbeddingError, StorageError
from ...records.schema import MODEL_KEY
from ...records.writer import WriteContext
from ...utils.arguments import listed, path_text, whole_number
from ...utils.config import namespace_path
from .base import operation_name
from .copy import copy_store
from .namespaces import NamespaceInfo, Path, expiry_of, seconds, subtree_path
from .selecting import SelectingBackend
from .units import checked_id, looked_up, one_id

__all__ = ["NamespacedBackend"]

_Backend = TypeVar("_Backend", bound="NamespacedBackend")


class NamespacedBackend(SelectingBackend):
    """A backend on one namespace of an open session of this package's files."""

    namespace_path: Path
    """The parts of the name of the namespace; empty for the default one."""
    _is_view: bool

    def namespace(self: _Backend, *path: str) -> _Backend:
        """Give a view of one namespace: a store of its own that sees and changes nothing else.

        Closing the view leaves this store open; closing this store ends the view.

        Args:
            path: The parts of its name, the outermost first, below the namespace of this store.

        Returns:
            The view, a ``VectorStore``. The namespace exists from its first unit on.

        Raises:
            ConfigurationError: A part is no text of 1 to 256 characters without slashes and control characters.

        Examples:
            >>> from memevolve_gpu import HashingEmbedder, VectorStore
            >>> with VectorStore("memory", HashingEmbedder()) as store:
            ...     alice, bob = store.namespace("org", "alice"), store.namespace("org", "bob")
            ...     alice.store({"content": "Rebase before you push"}, ttl=3600)
            ...     alice.count(), bob.count(), store.count()
            'unit_0'
            (1, 0, 0)
        """
        parts = namespace_path([*self.namespace_path, *path])
        self._open  # noqa: B018 - raises where this store is closed
        view = copy.copy(self)
        vars(view).update(namespace_path=parts, _is_view=True)
        return view

    def namespaces(self, prefix: Sequence[str] | str = ()) -> list[NamespaceInfo]:
        """List the namespaces that hold units or have limits, in the order of their paths.

        Args:
            prefix: Lists only this one and those below it; relative to the namespace of this store.

        Returns:
            Path, count and limits of each.
        """
        return [info for info, _ in self._listed(subtree_path(prefix))]

    def delete_namespace(self, *path: str) -> int:
        """Delete a namespace with its units and limits, in one transaction; those below it stay.

        Args:
            path: As for :meth:`namespace`; none for the namespace of this store.

        Returns:
            The number of deleted units.
        """
        session = self._open
        where, name = namespace_path([*self.namespace_path, *path]), operation_name("delete_namespace")
        with session.records.write(namespace=where, operation=name) as tx:
            removed = tx.delete_namespace()
        session.written()
        return removed

    def set_limits(self, *, max_units: int | None = None, default_ttl: Any = None) -> NamespaceInfo:
        """Set the limits of the namespace of this store; both at once, None for no limit.

        Args:
            max_units: Most units. Those beyond a lower limit stay, and no new one is taken.
            default_ttl: Seconds, or a timedelta, after which units expire that are stored from now on without a time
                of their own.

        Returns:
            The namespace with its new limits.

        Raises:
            ConfigurationError: ``max_units`` is no whole number of at least 1.
            InvalidUnitError: ``default_ttl`` is no time.
        """
        most = None if max_units is None else min(whole_number("max_units", max_units, error=ConfigurationError), 2**62)
        life = None if default_ttl is None else seconds("default_ttl", default_ttl)
        with self._write("set_limits") as tx:
            tx.set_limits(most, life)
        return self._info

    def set_expiry(self, ids: Iterable[str], *, ttl: Any = None, expires_at: Any = None) -> int:
        """Set when units expire, in one transaction.

        Args:
            ids: Ids; those of no unit are skipped.
            ttl: Seconds from now, or a timedelta.
            expires_at: Unix time in seconds, or a datetime with its zone. Neither: the units do not expire.

        Returns:
            The number of units found.

        Raises:
            InvalidUnitError: An id or a time is none; nothing is changed.
        """
        session = self._open
        wanted = [checked_id(unit_id, f"ids[{i}]") for i, unit_id in enumerate(listed("ids", ids))]
        until = expiry_of(ttl, expires_at, session.clock())
        with self._write("set_expiry") as tx:
            found = sum(tx.expire(unit_id, until) for unit_id in dict.fromkeys(wanted))
        session.written()
        return found

    def expiry(self, unit_id: str) -> float | None:
        """Read when a unit expires.

        Args:
            unit_id: Its id.

        Returns:
            Unix time in seconds; None for a unit that does not expire, and where there is no unit of that id.
        """
        return self._open.records.expiry_of(unit_id, ns=self._key) if one_id(unit_id, "units") else None

    def expiries(self, ids: Sequence[str]) -> dict[str, float]:
        """Read when units expire.

        Args:
            ids: Ids; those of no unit, and of units that do not expire, are skipped.

        Returns:
            Unix times in seconds, by id.
        """
        return self._open.records.expiries_of(looked_up(ids), ns=self._key)

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the records to a new database file, consistent while the store is in use.

        A view copies its namespace and those below it, under their paths, with vectors, times of expiry and limits, and
        without their history.

        Args:
            path: The file to write.

        Raises:
            StorageError: The file exists or cannot be written; nothing was.
        """
        if not self._is_view:
            self._open.records.backup(path)
            return
        folder = FilePath(path_text("path", path)).absolute().parent
        if not folder.is_dir():
            raise StorageError(f"the folder {folder} does not exist; create it first")
        config = self.config.replace(
            metric=self.metric, namespace=self.namespace_path, background=False, history_days=0
        )
        make: Any = type(self)
        session = self._open
        model = _stored_model(session.records.get_meta(MODEL_KEY))
        with (
            TemporaryDirectory(prefix=".namespace-", dir=folder) as place,
            make(FilePath(place, "copy"), model, session.records.dim, None, config, clock=session.clock) as copy,
        ):
            copy_store(self, copy)
            copy.backup(path)

    @property
    def _key(self) -> int:
        """The key of the namespace; MISSING where it does not exist yet."""
        return self._open.key_of(self.namespace_path)

    @property
    def _info(self) -> NamespaceInfo:
        """The namespace with its count and limits."""
        return NamespaceInfo(self.namespace_path, *self._open.records.namespace_info(self._key))

    def _listed(self, prefix: Path) -> list[tuple[NamespaceInfo, int]]:
        """The namespaces of a subtree, with their keys."""
        found = self._open.records.namespaces((*self.namespace_path, *prefix))
        return [(NamespaceInfo(path, count, most, ttl), key) for path, key, count, most, ttl in found]

    def _spaces(self, prefix: Path) -> dict[int, Path]:
        """The paths of the namespaces of a subtree, by key."""
        return dict(sorted((key, info.path) for info, key in self._listed(prefix)))

    def _write(self, operation: str, *, grouped: bool = False) -> WriteContext:
        name = operation_name(operation)
        return self._open.records.write(namespace=self.namespace_path, operation=name, grouped=grouped)


def _stored_model(name: bytes | None) -> Callable[[str], Any] | None:
    """An embedding function that has the name of a model and embeds nothing."""

    def refuse(_text: str) -> Any:
        raise EmbeddingError("given vectors are stored, nothing is embedded")

    if name is None:
        return None
    vars(refuse)["model_name"] = name.decode()
    return refuse
