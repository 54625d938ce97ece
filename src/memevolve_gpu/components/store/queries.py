"""Listings, counts by value, ranked searches, and choices of units to change, of one open ``VectorStore``."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import apsw
import numpy as np

from ...errors import ConflictError
from ...live.field_values import FieldValues
from ...live.namespaces import Scope
from ...records.connections import all_rows
from ...records.filter_sql import ids_at, matching
from ...records.filters import Filter, matches
from ...records.records import Records
from ...records.transaction import Transaction, changed_since
from ...types import FloatArray, Hit, IntArray, Json, MemoryUnit
from ...utils.vectors import normalize_rows
from .listing import Listing, Order, cursor_of, most_counted, window_of
from .ranking import Ranking, Window, best, similarity_of
from .session import FETCH_ATTEMPTS, StoreSession

_PAGE = 1000
_CREATED = """
SELECT id, unit ->> '$.metadata.created_at' FROM units
WHERE ns = ?1 AND {chosen} AND ifnull(expires_at > ?3, 1)
AND CASE WHEN json_valid(unit) THEN json_type(unit, '$.metadata.created_at') END = 'text'
"""
_CREATED_ONE, _CREATED_MANY = (
    _CREATED.format(chosen=chosen) for chosen in ("id = ?2", "id IN (SELECT value FROM json_each(?2))")
)


def created_at_of(con: apsw.Connection, ids: Sequence[str], ns: int, now: float) -> dict[str, str]:
    """``metadata.created_at`` of those of the units of a namespace that exist and have one."""
    if len(ids) == 1:
        return dict(all_rows(con, _CREATED_ONE, (ns, ids[0], now)))
    return dict(all_rows(con, _CREATED_MANY, (ns, json.dumps(ids), now)))


def matching_ids(session: StoreSession, tx: Transaction, filters: Filter) -> list[str]:
    """Ids of the units that match in the namespace of the transaction, as it sees them, oldest first."""
    ns, now = tx.namespace, session.clock()
    view, slots = session.live.matching(filters, Scope((ns,), now))
    unchanged = view.watermark == tx.head.last_seq
    return tx.outside(lambda con: ids_at(con, slots if unchanged else matching(con, filters, None), ns, now))


def pages(
    session: StoreSession,
    filters: Filter,
    order_by: str | None,
    limit: int | None,
    after: str | None,
    scope: Callable[[], Scope],
) -> Listing:
    """See ``VectorStore.units``. The place of a unit is its slot."""
    order, most, start = window_of(order_by, limit, after, int)

    def rows() -> Iterator[tuple[str, MemoryUnit]]:
        _, slots = session.live.matching(filters, scope())
        if order is not None:
            slots = _in_order(session, order, slots, start, most)
        elif start is not None:
            slots = slots[np.searchsorted(slots, start[1], side="right") :]
        for first in range(0, len(slots), _PAGE):
            page = slots[first : first + _PAGE].tolist()
            units = session.records.units_at(page)
            for slot in page:
                if slot in units and matches(filters, units[slot]):
                    value = None if order is None else order.value_of(units[slot])
                    yield cursor_of(value, slot, order_by), units[slot]

    return Listing(islice(rows(), most), after)


def _in_order(
    session: StoreSession, order: Order, slots: IntArray, start: tuple[Json, Json] | None, most: int | None
) -> IntArray:
    """The slots by the value of a field, those behind the cursor only; at least ``most`` of them, if there are."""
    every, field = session.live.field(order.path, slots)
    rows, sign = np.searchsorted(every, slots), -1 if order.descending else 1
    kinds, values = (sign * keys[rows] for keys in field.order_keys())
    if start is not None:
        kind, value = _place(field, *Order.key(start[0]))
        kind, value = sign * kind, sign * value
        equal = (kinds == kind) & (values == value) & (slots > start[1])
        behind = (kinds > kind) | ((kinds == kind) & (values > value)) | equal
        slots, kinds, values = slots[behind], kinds[behind], values[behind]
    if most is not None and 0 < 2 * most < len(slots):  # a page of many needs no sort of all
        near = np.argpartition(kinds, most)[: most + 1]
        bound = kinds[near].max()
        inside = kinds < bound
        missing = most - int(np.count_nonzero(inside))
        last = np.flatnonzero(kinds == bound)
        if missing < len(last):
            last = last[values[last] <= np.partition(values[last], missing)[missing]]
        chosen = np.sort(np.concatenate([np.flatnonzero(inside), last]))
        slots, kinds, values = slots[chosen], kinds[chosen], values[chosen]
    ordered: IntArray = slots[np.lexsort((slots, values, kinds))]
    return ordered


def _place(field: FieldValues, kind: int, value: Json) -> tuple[int, float]:
    """The key of a value among those of the field; between two of them where it is gone."""
    if not isinstance(value, str):
        return kind, float(value)
    at = bisect_left(field.texts, value)
    return kind, at if at < len(field.texts) and field.texts[at] == value else at - 0.5


def facet_counts(
    session: StoreSession, path: tuple[str, ...], filters: Filter, limit: int | None, scope: Scope
) -> list[tuple[Json, int]]:
    """See ``VectorStore.facets``."""
    _, slots = session.live.matching(filters, scope)
    every, field = session.live.field(path, slots)
    rows = np.zeros(len(every), dtype=np.bool_)
    rows[np.searchsorted(every, slots)] = True
    return most_counted(field.counts(rows), limit)


def ranked_hits(
    session: StoreSession,
    ranking: Ranking,
    window: Window,
    query: str,
    filters: Filter,
    recall: float | None,
    scope: Scope,
    spaces: Mapping[int, tuple[str, ...]],
) -> list[Hit]:
    """The best units by similarity, age and importance. spaces: the paths of the namespaces of the scope, by key."""
    if not session.records.head().count:
        return []
    metric, now = session.records.metric, ranking.now()
    vectors = session.embedder.embed_query(query)[None, :]
    if metric == "cosine":
        vectors = normalize_rows(vectors)
    for _ in range(FETCH_ATTEMPTS):
        found = session.live.ranked(
            vectors,
            window.reach,
            filters,
            recall,
            similarity=lambda distances: similarity_of(distances, metric),
            factors=lambda moments, importance: ranking.factors(moments, importance, now),
            paths=(ranking.time_path, ranking.importance_path),
            scope=scope,
        )
        units = session.records.units_at([slot for _, _, slot in found])
        if len(units) == len(found):
            break
    session.searched(vectors)
    keys = session.records.namespaces_at([slot for _, _, slot in found]) if len(spaces) > 1 else {}
    only = next(iter(spaces), 0)
    return [
        Hit(units[slot], units[slot]["id"], distance, score, spaces[keys.get(slot, only)])
        for score, distance, slot in found
        if slot in units
    ]


def ranked_words(
    records: Records, ns: int, ranking: Ranking, fetch: Callable[[int], list[tuple[float, str]]], wanted: int
) -> list[tuple[float, str]]:
    """The best units by BM25, age and importance."""
    now = ranking.now()
    factors: dict[str, float] = {}

    def candidates(width: int) -> list[tuple[float, float, str]]:
        found = fetch(width)
        units: Mapping[str, MemoryUnit] = records.get_many([one for _, one in found if one not in factors], ns=ns)
        factors.update({unit_id: ranking.factor(unit, now) for unit_id, unit in units.items()})
        return [(score, factors[unit_id], unit_id) for score, unit_id in found if unit_id in factors]

    return best(candidates, wanted)


def drop_unchanged(tx: Transaction, ids: Sequence[str], since: int | None) -> int:
    """Delete the units that did not change after log entry ``since``; nothing where the log no longer says."""
    if since is None:
        return tx.drop_many(ids)
    changed = tx.read(lambda con: changed_since(con, since, tx.namespace))
    return 0 if changed is None else tx.drop_many(unit_id for unit_id in ids if unit_id not in changed)


def drop_all(tx: Transaction, ids: Sequence[str], since: int | None) -> None:
    """Delete the units; with ``since`` raise ConflictError when one of them changed after it or is gone."""
    if since is None:
        tx.drop_many(ids)
        return
    changed = tx.read(lambda con: changed_since(con, since, tx.namespace))
    conflicts = list(ids) if changed is None else [unit_id for unit_id in ids if unit_id in changed]
    conflicts += [unit_id for unit_id in ids if not tx.drop(unit_id)] if not conflicts else []
    if conflicts:
        raise ConflictError(conflicts)


def widened(distances: FloatArray, width: int) -> FloatArray:
    """As many columns as were asked for, +inf where nothing exists."""
    if distances.shape[1] == width:
        return distances
    wide = np.full((len(distances), width), np.inf, dtype=np.float32)
    wide[:, : distances.shape[1]] = distances
    return wide
