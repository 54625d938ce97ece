"""Listings in pages and in order, partial changes and counts by value: what they mean, in Python, for every backend."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from ...errors import InvalidFilterError, InvalidQueryError, InvalidUnitError
from ...records.filters import MISSING, Filter, always, doubled, kind_of, lookup, parse, path_of
from ...types import Json, MemoryUnit
from ...utils.arguments import shown, whole_number
from ...utils.plain import plain_scalar
from ...utils.timestamps import now_text

_KINDS = ("null", "false", "true", "number", "text")


class Listing(Iterator[MemoryUnit]):
    """Units one by one, and the place to go on from.

    Examples:
        >>> from memevolve_gpu.components.validation import ScratchStore
        >>> store = ScratchStore([{"id": "a"}, {"id": "b"}, {"id": "c"}])
        >>> page = store.units(limit=2)
        >>> [unit["id"] for unit in page], [unit["id"] for unit in store.units(limit=2, after=page.cursor)]
        (['a', 'b'], ['c'])
    """

    def __init__(self, rows: Iterator[tuple[str, MemoryUnit]], after: str | None) -> None:
        self._rows = rows
        self.cursor = after
        """A text for ``after`` of a later call, which goes on behind the last unit that was taken; None before any."""

    def __next__(self) -> MemoryUnit:
        self.cursor, unit = next(self._rows)
        return unit


class Order:
    """``order_by``: a dotted path, ascending, or descending with ``-`` before it.

    Missing values and null come first, then false, true, numbers, texts by code point, and last lists and objects. Of
    equal ones the older unit comes first, in both directions.
    """

    def __init__(self, order_by: object) -> None:
        """Raises InvalidQueryError for what is no path."""
        path = order_by[1:] if isinstance(order_by, str) and order_by.startswith("-") else order_by
        self.descending = path is not order_by
        try:
            self.path = path_of(path)
        except InvalidFilterError as error:
            raise InvalidQueryError(
                f"order_by must be a path such as 'metadata.score', got {shown(order_by)}"
            ) from error

    def value_of(self, unit: Mapping[str, object]) -> Json:
        """The value that a unit is ordered by, as JSON keeps it; a list stands for every list and object."""
        value = plain_scalar(lookup(unit, self.path))
        return None if value is MISSING else [] if kind_of(value) in ("array", "object") else value

    @staticmethod
    def key(value: Json) -> tuple[int, Json]:
        """What sorts as the values do."""
        kind = kind_of(value)
        if kind not in _KINDS:
            return len(_KINDS), 0
        at = _KINDS.index(kind)
        return at, value if kind == "text" else float(doubled(value)) if kind == "number" else 0


def cursor_of(value: object, place: object, order_by: str | None) -> str:
    """A cursor behind the unit of that value and place, in a listing of that order."""
    return json.dumps([value, place, order_by], ensure_ascii=False)


def cursor_parts(after: str, place: type | tuple[type, ...], order_by: str | None) -> tuple[Json, Json]:
    """Value and place of a cursor. Raises InvalidQueryError for what is none, or is one of another order."""
    try:
        value, found, order = json.loads(after)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, place) or isinstance(found, bool) or order != order_by:
        raise InvalidQueryError(f"after must be the cursor of a listing of the same kind and order, got {shown(after)}")
    return value, found


def window_of(
    order_by: str | None, limit: int | None, after: str | None, place: type | tuple[type, ...]
) -> tuple[Order | None, int | None, tuple[Json, Json] | None]:
    """The order, the number and the start of a listing, checked; ``place`` is the type of a place in it."""
    order = None if order_by is None else Order(order_by)
    most = None if limit is None else min(whole_number("limit", limit, least=0), 2**62)
    return order, most, None if after is None else cursor_parts(after, place, order_by)


def listing_of(
    units: Callable[[], Iterable[MemoryUnit]], order_by: str | None, limit: int | None, after: str | None
) -> Listing:
    """A listing of units that come oldest first; the place of a unit is its id."""
    order, most, start = window_of(order_by, limit, after, str)

    def rows() -> Iterator[tuple[str, MemoryUnit]]:
        if order is None and start is None:
            yield from ((cursor_of(None, unit["id"], None), unit) for unit in units())
            return
        found = [(None if order is None else order.value_of(unit), unit) for unit in units()]
        if order is not None:
            found.sort(key=lambda one: order.key(one[0]), reverse=order.descending)  # keeps the order of equal ones
        skip = 0
        if start is not None:
            places = [unit["id"] for _, unit in found]
            if start[1] not in places:
                raise InvalidQueryError(f"after: the unit {shown(start[1])} is gone; list from the beginning")
            skip = places.index(start[1]) + 1
        yield from ((cursor_of(value, unit["id"], order_by), unit) for value, unit in islice(found, skip, None))

    return Listing(islice(rows(), most), after)


def merged(old: object, changes: object) -> Json:
    """JSON merge patch (RFC 7396): objects are merged, None removes a key, anything else replaces."""
    if not isinstance(changes, Mapping):
        return changes
    found = dict(old) if isinstance(old, Mapping) else {}
    for key, value in changes.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found


def merged_unit(old: MemoryUnit, changes: object) -> MemoryUnit:
    """The unit with the changes. Raises InvalidUnitError for changes that are no dict, or that name another id."""
    if not isinstance(changes, Mapping):
        raise InvalidUnitError(f"changes must be a dict, got {type(changes).__name__}; pass the keys that change")
    if changes.get("id", old["id"]) != old["id"]:
        raise InvalidUnitError(
            f"changes['id'] is {shown(changes['id'])}: an id stays; store the unit again to change it"
        )
    found: MemoryUnit = merged(old, changes)
    return found


def with_created_at(unit: MemoryUnit, created_at: str | None) -> MemoryUnit:
    """The unit with that ``metadata.created_at``, unless it has one or there is none."""
    metadata = unit.get("metadata") or {}
    return unit if created_at is None else {**unit, "metadata": {"created_at": created_at, **metadata}}


class MetadataMixin:
    """Adds time stamps to ``unit["metadata"]``.

    Examples:
        >>> from memevolve_gpu.components.store import MetadataMixin
        >>> class Stamper(MetadataMixin):
        ...     def stamp(self, unit):
        ...         return self._add_metadata(unit)
        >>> Stamper().stamp({"id": "a", "metadata": {"created_at": "2026-01-01"}})["metadata"]
        {'created_at': '2026-01-01'}
        >>> sorted(Stamper().stamp({"id": "b"})["metadata"])
        ['created_at']
    """

    def _generate_timestamp(self) -> str:
        """Return the current time as ISO 8601 in UTC with its offset."""
        return now_text()

    def _add_metadata(self, unit: MemoryUnit) -> MemoryUnit:
        """Return a copy of the unit whose metadata has ``created_at``; an existing one is kept."""
        metadata = unit.get("metadata")
        stamped = dict(metadata) if isinstance(metadata, Mapping) else {}
        stamped.setdefault("created_at", self._generate_timestamp())
        return {**unit, "metadata": stamped}

    def _updated_metadata(self, unit: MemoryUnit, old: MemoryUnit) -> MemoryUnit:
        """Return a copy of the unit with ``created_at`` of the old one and ``updated_at`` of now."""
        held = old.get("metadata")
        created = held.get("created_at") if isinstance(held, dict) else None
        given = dict(unit.get("metadata") or {})
        given.setdefault("created_at", created if created is not None else self._generate_timestamp())
        return {**unit, "metadata": {**given, "updated_at": self._generate_timestamp()}}


EVERY_UNIT = "to change all, name what every unit has: {'id': {'exists': True}}"


def some_condition(filters: object, instead: str) -> Filter:
    """The parsed filter. Raises InvalidFilterError where it holds of every unit."""
    parsed = parse(filters)
    if always(parsed.root):
        raise InvalidFilterError(f"filters hold no condition, so they would be true of every unit; {instead}")
    return parsed


def counted(values: Iterable[Sequence[Json]], limit: int | None) -> list[tuple[Json, int]]:
    """How many units have each value, most first; ``values`` are those of each unit, as plain scalars."""
    counts: dict[tuple[Json, ...], int] = {}
    for held in values:
        for key in {Order.key(value) for value in held if kind_of(value) in _KINDS}:
            counts[key] = counts.get(key, 0) + 1
    return most_counted(counts, limit)


def most_counted(counts: Mapping[tuple[Json, ...], int], limit: int | None) -> list[tuple[Json, int]]:
    """(value, count) of counts by :meth:`Order.key`, most first, then in order of the values."""
    found = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    most = None if limit is None else whole_number("limit", limit, least=0)
    return [(_value(*key), count) for key, count in found[:most]]


def _value(kind: int, value: Json) -> Json:
    if _KINDS[kind] == "number":
        return int(value) if math.isfinite(value) and value.is_integer() and abs(value) < 2**53 else value
    return value if _KINDS[kind] == "text" else (None, False, True)[kind]
