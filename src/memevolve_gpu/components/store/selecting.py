"""The part of ``VectorStore`` for what a filter, a cursor or a namespace selects: reads, changes, limits and expiry."""

from __future__ import annotations

import copy
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TypeVar

from ...errors import ConfigurationError, EmbeddingError, StorageError
from ...live.namespaces import Scope
from ...records.filters import Filter, parse, path_of
from ...records.schema import MODEL_KEY
from ...records.transaction import EncodedUnit, Transaction
from ...records.writer import WriteContext
from ...types import Filters, FloatArray, Json, MemoryUnit, Moment, Ttl
from ...utils.arguments import listed, path_text, switch, whole_number
from ...utils.config import StorageConfig, namespace_path
from .copy import copy_store
from .history import operation_name
from .listing import EVERY_UNIT, Listing, MetadataMixin, listing_of, merged_unit, some_condition
from .namespaces import UNCHANGED, NamespaceInfo, Path, Unchanged, expiry_of, seconds, subtree_path
from .queries import created_at_of, facet_counts, matching_ids, pages, ranked_words
from .ranking import HalfLife, Ranking, Window
from .session import StoreSession
from .units import (
    OpenBackend,
    check_arguments,
    checked_id,
    encoded,
    looked_up,
    one_id,
    plain_unit,
    text_to_embed,
    unit_to_text,
)

_Backend = TypeVar("_Backend", bound="NamespacedBackend")


class NamespacedBackend(OpenBackend, MetadataMixin):
    """A backend on one namespace of an open session of this package's files."""

    config: StorageConfig
    namespace_path: Path
    """The parts of the name of the namespace; empty for the default one."""
    _is_view: bool

    @property
    @abstractmethod
    def _open(self) -> StoreSession:
        """The open session."""

    @property
    def _scope(self) -> Scope:
        """What a call may see that begins now."""
        return Scope((self._key,), self._open.clock())

    @abstractmethod
    def _past_units(self, as_of: object, filters: object = None, unit_id: str | None = None) -> list[MemoryUnit]:
        """The units of a moment."""

    def units(
        self,
        filters: Filters | None = None,
        *,
        order_by: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        as_of: Moment = None,
    ) -> Listing:
        """Read units one by one, in pages: for stores that do not fit in a list.

        A page costs the same wherever it lies. What others write meanwhile may be listed or not.

        Args:
            filters: Limits the units to those that match, see ``docs/reference/filters.md``; None for all.
            order_by: The path of the field to sort by, ``-`` before it for the largest first; None for oldest first.
                Missing values and null come first, then false, true, numbers, texts, and last lists and objects; the
                older of equal ones first.
            limit: Most units; None for all.
            after: The ``cursor`` of an earlier listing of the same filters and order, to go on behind its last unit.
            as_of: Reads the units as they were, as for :meth:`retrieve`, all at once.

        Returns:
            An iterator over the units, with the attribute ``cursor``.

        Examples:
            >>> from memevolve_gpu import HashingEmbedder, VectorStore
            >>> store = VectorStore("pages", HashingEmbedder())
            >>> ids = store.store_batch([{"content": text, "n": n} for n, text in enumerate("abcde")])
            >>> page = store.units(order_by="-n", limit=2)
            >>> [unit["n"] for unit in page]
            [4, 3]
            >>> [unit["n"] for unit in store.units(order_by="-n", limit=2, after=page.cursor)]
            [2, 1]
            >>> store.close()
        """
        if as_of is not None:
            return listing_of(lambda: self._past_units(as_of, filters), order_by, limit, after)
        return pages(self._open, self._filter(filters), order_by, limit, after, lambda: self._scope)

    def facets(self, field: str, filters: Filters | None = None, limit: int | None = None) -> list[tuple[Json, int]]:
        return facet_counts(self._open, path_of(field), self._filter(filters), limit, self._scope)

    def patch(self, unit_id: str, changes: Mapping[str, object]) -> bool:
        wanted = checked_id(unit_id)
        return bool(self._merge_into("patch", lambda _: [wanted], changes))

    def update_where(self, filters: Filters, changes: Mapping[str, object]) -> int:
        parsed = some_condition(self._filter(filters), EVERY_UNIT)
        return self._merge_into("update_where", lambda tx: matching_ids(self._open, tx, parsed), changes)

    def delete_where(self, filters: Filters) -> int:
        session, parsed = self._open, some_condition(self._filter(filters), "call clear() to delete all")
        with self._write("delete_where") as tx:
            dropped = tx.drop_many(matching_ids(session, tx, parsed))
        if dropped:
            session.written()
        return dropped

    def search_keywords(
        self,
        query: str,
        top_k: int = 5,
        filters: Filters | None = None,
        *,
        offset: int = 0,
        min_score: float | None = None,
        recency: HalfLife | None = None,
        importance: str | None = None,
        weights: Mapping[str, float] | None = None,
        relative: bool = False,
    ) -> list[tuple[float, str]]:
        records, parsed, key = self._open.records, self._filter(filters), self._key
        window = Window.of(check_arguments(top_k, None, query), offset, min_score)
        ranking, most = Ranking.of(recency, importance, weights), max(1, records.count(ns=key))
        relative = switch("relative", relative)
        within = self._open.live.matching(parsed, self._scope)[1] if parsed.root.parts else None

        def fetch(wanted: int) -> list[tuple[float, str]]:
            wanted = min(wanted, most)
            return records.keyword(query, wanted, parsed, ns=key, within=within, relative=relative)

        found = fetch(window.reach) if ranking is None else ranked_words(records, key, ranking, fetch, window.reach)
        return window.cut(found, lambda pair: pair[0])

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

    def set_limits(
        self, *, max_units: int | Unchanged | None = UNCHANGED, default_ttl: Ttl | Unchanged = UNCHANGED
    ) -> NamespaceInfo:
        if max_units is not None and max_units is not UNCHANGED:
            max_units = min(whole_number("max_units", max_units, error=ConfigurationError), 2**62)
        if default_ttl is not None and default_ttl is not UNCHANGED:
            default_ttl = seconds("default_ttl", default_ttl)
        with self._write("set_limits") as tx:
            most, life = tx.limits
            tx.set_limits(
                most if max_units is UNCHANGED else max_units, life if default_ttl is UNCHANGED else default_ttl
            )
        return self._info

    def set_expiry(self, ids: Iterable[str], *, ttl: Ttl = None, expires_at: Moment = None) -> int:
        session = self._open
        wanted = [checked_id(unit_id, f"ids[{i}]") for i, unit_id in enumerate(listed("ids", ids))]
        until = expiry_of(ttl, expires_at, session.clock())
        with self._write("set_expiry") as tx:
            found = sum(tx.expire(unit_id, until) for unit_id in dict.fromkeys(wanted))
        session.written()
        return found

    def expiry(self, unit_id: str) -> float | None:
        return self._open.records.expiry_of(unit_id, ns=self._key) if one_id(unit_id, "units") else None

    def expiries(self, ids: Sequence[str]) -> dict[str, float]:
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

    def _stamped(self, plain: MemoryUnit, where: str = "unit") -> EncodedUnit:
        """The unit, which :func:`.units.plain_unit` made, as it is stored where it replaces none; changes ``plain``."""
        metadata = plain.get("metadata")
        if not metadata:
            metadata = plain["metadata"] = {}
        dated = "created_at" not in metadata
        if dated:
            metadata["created_at"] = self._generate_timestamp()
        return encoded(plain, where, dated)

    def _keep_times(self, made: list[EncodedUnit], tx: Transaction) -> list[EncodedUnit]:
        """What :meth:`_stamped` made; the dated ones take ``created_at`` from the units that they replace."""
        held = tx.taken(one.unit_id for one in made if one.dated and one.unit_id)
        if not held:
            return made
        now = self._open.clock()
        times = tx.read(lambda con: created_at_of(con, held, tx.namespace, now))
        return [self._created(one, times) if one.dated and one.unit_id in times else one for one in made]

    def _created(self, one: EncodedUnit, times: Mapping[str, str]) -> EncodedUnit:
        unit = json.loads(one.json)
        return encoded({**unit, "metadata": {**unit["metadata"], "created_at": times[one.unit_id]}})

    def _merge_into(self, operation: str, chosen: Callable[[Transaction], list[str]], changes: object) -> int:
        """Merge the changes into the units of the chosen ids, in one transaction."""
        session, vectors = self._open, dict[str, FloatArray]()
        merged_unit({"id": changes.get("id") if isinstance(changes, Mapping) else None}, changes)
        while True:
            missing: dict[str, None] = {}
            with self._write(operation) as tx:
                olds = [old for old in map(tx.find, chosen(tx)) if old is not None]
                rows = [(*self._merged(old.unit, changes), old.expires_at) for old in olds]
                missing = dict.fromkeys(text for _, text, _ in rows if text is not None and text not in vectors)
                if not missing:
                    for made, text, until in rows:
                        if text is None:
                            tx.edit(made.unit_id, made, until)
                        else:
                            tx.put(made, vectors[text].tobytes(), made.unit_id, until)
            if not missing:
                break
            # outside the lock: it may take seconds, and units may change meanwhile
            vectors.update(zip(missing, session.embedder.vectors_for(list(missing), None, None), strict=True))
        if rows:
            session.written(len(rows))
        return len(rows)

    def _merged(self, old: MemoryUnit, changes: object) -> tuple[EncodedUnit, str | None]:
        """The changed unit, and its text if that is another one."""
        unit = plain_unit(merged_unit(old, changes))
        made = encoded(self._updated_metadata(unit, old))
        text = unit_to_text(unit)
        return made, None if text == unit_to_text(old) else text_to_embed(unit)

    def _filter(self, filters: object) -> Filter:
        return parse(filters, self.config.filter_unicode)


def _stored_model(name: bytes | None) -> Callable[[str], NoReturn] | None:
    """An embedding function that has the name of a model and embeds nothing."""

    def refuse(_text: str) -> NoReturn:
        raise EmbeddingError("given vectors are stored, nothing is embedded")

    if name is None:
        return None
    vars(refuse)["model_name"] = name.decode()
    return refuse
