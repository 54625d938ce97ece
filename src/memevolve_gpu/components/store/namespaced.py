"""The part of ``VectorStore`` that makes views of namespaces, and sets limits and expiry."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from ...errors import ConfigurationError
from ...records.writer import WriteContext
from ...utils.arguments import listed, whole_number
from ...utils.config import namespace_path
from .history import operation_name
from .namespaces import NamespaceInfo, Path, expiry_of, seconds, subtree_path
from .selecting import SelectingBackend
from .units import checked_id, one_id

__all__ = ["NamespacedBackend"]

_Backend = TypeVar("_Backend", bound="NamespacedBackend")


class NamespacedBackend(SelectingBackend):
    """A backend on one namespace of an open session of this package's files."""

    namespace_path: Path
    """The parts of the name of the namespace; empty for the default one."""

    def namespace(self: _Backend, *path: str) -> _Backend:
        parts = namespace_path([*self.namespace_path, *path])
        self._open  # noqa: B018 - raises where this store is closed
        view = copy.copy(self)
        vars(view).update(namespace_path=parts, _is_view=True)
        return view

    def namespaces(self, prefix: Sequence[str] | str = ()) -> list[NamespaceInfo]:
        return [info for info, _ in self._listed(subtree_path(prefix))]

    def delete_namespace(self, *path: str) -> int:
        session = self._open
        where, name = namespace_path([*self.namespace_path, *path]), operation_name("delete_namespace")
        with session.records.write(namespace=where, operation=name) as tx:
            removed = tx.delete_namespace()
        session.written()
        return removed

    def set_limits(self, *, max_units: int | None = None, default_ttl: Any = None) -> NamespaceInfo:
        most = None if max_units is None else min(whole_number("max_units", max_units, error=ConfigurationError), 2**62)
        life = None if default_ttl is None else seconds("default_ttl", default_ttl)
        with self._write("set_limits") as tx:
            tx.set_limits(most, life)
        return self._info

    def set_expiry(self, ids: Iterable[str], *, ttl: Any = None, expires_at: Any = None) -> int:
        session = self._open
        wanted = [checked_id(unit_id, f"ids[{i}]") for i, unit_id in enumerate(listed("ids", ids))]
        until = expiry_of(ttl, expires_at, session.clock())
        with self._write("set_expiry") as tx:
            found = sum(tx.expire(unit_id, until) for unit_id in dict.fromkeys(wanted))
        session.written()
        return found

    def expiry(self, unit_id: str) -> float | None:
        return self._open.records.expiry_of(unit_id, ns=self._key) if one_id(unit_id, "units") else None

    @property
    def _key(self) -> int:
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
