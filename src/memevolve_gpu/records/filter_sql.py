"""Filters as SQL over ``units.unit`` (JSON text), everything parameterised, and the slots that match.

What SQLite's own operators cannot say exactly is tested by the definition in Python, called from SQL.
The agreement with :func:`memevolve_gpu.records.filters.matches` is a property test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import apsw
import numpy as np

from ..types import IntArray, Json, Op
from .connections import all_rows, first_row
from .filters import RANGES, Condition, Every, Filter, Instant, Node, Not, Scalar, is_plain, kind_of

INDEXED_FIELDS = ("type", "tags")
"""Top-level fields whose strings, or lists of strings, are kept in the ``terms`` table."""

MOST_PLACES = 50
"""SQLite takes time with the square of the numbered places in a statement."""

_INDEXED_PATHS = {(field,) for field in INDEXED_FIELDS}
_RANGE_SIGNS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_JSON_TYPES = {
    "number": ("integer", "real"),
    "text": ("text",),
    "true": ("true",),
    "false": ("false",),
    "null": ("null",),
}


def is_indexed(node: Node) -> bool:
    """Can the ``terms`` table alone answer the condition?"""
    return (
        isinstance(node, Condition)
        and node.path in _INDEXED_PATHS
        and is_plain(node)
        and all(isinstance(value, str) for value in node.values)
    )


def where(node: Filter | Node, bound: list[apsw.Binding]) -> str:
    """An SQL expression over the row ``u`` of ``units``, which is 1 or 0.

    ``bound`` holds the parameters that the statement has before the expression; those of the expression are appended.
    """
    if isinstance(node, Filter):
        node = node.root
    if isinstance(node, Condition):
        return f"({_expression(node, bound)})"
    if isinstance(node, Not):
        return f"(NOT {where(node.part, bound)})"
    join, neutral = (" AND ", "1") if isinstance(node, Every) else (" OR ", "0")
    return f"({join.join([neutral, *(where(part, bound) for part in node.parts)])})"


def _expression(one: Condition, bound: list[apsw.Binding]) -> str:
    if one.path == ("id",) and one.op == "in":
        return f"u.id IN ({places([value for value in one.values if isinstance(value, str)], bound)})"
    bound.append(json_path(one.path))
    path = f"?{len(bound)}"
    if one.op == "exists":
        return f"json_type(u.unit, {path}) IS {'NOT ' if one.values[0] else ''}NULL"
    if not _is_native(one):
        bound.append(one.spec)
        return f"holds(?{len(bound)}, u.unit -> {path})"
    tests = _tests(one, bound)
    element = _case("e.type", {name: test.format(value="e.atom") for name, test in tests.items()})
    scalar = {name: test.format(value=f"json_extract(u.unit, {path})") for name, test in tests.items()}
    found = f"EXISTS (SELECT 1 FROM json_each(u.unit, {path}) AS e WHERE {element})"
    return _case(f"json_type(u.unit, {path})", {**scalar, "array": found})


def _is_native(one: Condition) -> bool:
    """Do SQLite's operators mean the same?"""
    if one.op in RANGES:
        return not isinstance(one.values[0], Instant) and not (one.nfc and isinstance(one.values[0], str))
    return is_plain(one)


def _case(kind: str, tests: dict[str, str]) -> str:
    """The test that belongs to the JSON type; 0 for every other type, and for a missing field."""
    cases = "".join(f" WHEN '{name}' THEN {test}" for name, test in tests.items())
    return f"CASE {kind}{cases} ELSE 0 END" if cases else "0"


def _tests(one: Condition, bound: list[apsw.Binding]) -> dict[str, str]:
    """For each JSON type, what must hold of ``{value}``."""
    kinds: dict[str, list[Scalar]] = {}
    for value in one.values:
        kinds.setdefault(kind_of(value), []).append(value)
    tests = {}
    for kind, values in kinds.items():
        test = "1"
        if kind in ("number", "text"):
            sign = _RANGE_SIGNS.get(one.op)
            test = f"{{value}} {sign} ({places(values, bound)})" if sign else f"{{value}} IN ({places(values, bound)})"
        tests.update(dict.fromkeys(_JSON_TYPES[kind], test))
    return tests


def places(values: Sequence[Scalar], bound: list[apsw.Binding]) -> str:
    """Numbered places for the values, which are bound once however often they are named; many are bound as one list."""
    if len(values) > MOST_PLACES:
        bound.append(json.dumps(values, ensure_ascii=False))
        return f"SELECT value FROM json_each(?{len(bound)})"
    bound.extend(values)
    return ", ".join(f"?{number}" for number in range(len(bound) - len(values) + 1, len(bound) + 1))


FEW_SLOTS = 4096
FIELD_INDEX = "field:"
"""Names of the indexes of declared fields begin so; the path follows."""

_SAMPLE, _SHORT = 500, 64
"""Rows that are looked at to tell whether a field is short, and the most characters of a short one, on average."""


def declare_fields(con: apsw.Connection, paths: Sequence[tuple[str, ...]]) -> None:
    """Have an index for each of these fields, and no other, so that a column is read without the units."""
    wanted = {FIELD_INDEX + json_path(path): path for path in paths}
    listed = all_rows(con, "SELECT name FROM sqlite_schema WHERE type = 'index'")
    held: set[str] = {name for (name,) in listed if name.startswith(FIELD_INDEX)}
    for name in held - wanted.keys():
        con.execute(f"DROP INDEX {_quoted_name(name)}")
    for name in wanted.keys() - held:
        con.execute(f"CREATE INDEX {_quoted_name(name)} ON units ({_field(wanted[name], [])})")


def field_is_short(con: apsw.Connection, path: tuple[str, ...]) -> bool:
    """Are the values of the field short, judging by the oldest rows?"""
    bound: list[apsw.Binding] = []
    field = _field(path, bound)
    sql = f"SELECT avg(length({field})) FROM (SELECT unit FROM units ORDER BY slot LIMIT {_SAMPLE})"
    return (first_row(con, sql, bound)[0] or 0) <= _SHORT


def field_values(
    con: apsw.Connection,
    paths: Sequence[tuple[str, ...]],
    slots: IntArray | None,
    within: tuple[int, int] | None,
) -> tuple[IntArray, list[list[Json]]]:
    """The live slots, ascending, and for each path the value in each of them, NaN where a unit has none; among
    ``slots``, or from the first to the last of ``within``, when given.
    """
    bound: list[apsw.Binding] = []
    columns = [f"group_concat(ifnull({_field(path, bound)}, 'NaN'))" for path in paths]
    sql = f"SELECT {', '.join(['group_concat(slot)', *columns])} FROM units"
    if slots is not None:
        subquery, listed = slot_list(slots)
        sql, bound = f"{sql} WHERE slot IN ({subquery})", [*bound, listed]
    elif within is not None:
        sql, bound = f"{sql} WHERE slot BETWEEN ? AND ?", [*bound, *within]
    held, *texts = first_row(con, sql, bound)
    if held is None:
        return np.empty(0, dtype=np.int64), [[] for _ in paths]
    numbers, found = np.fromstring(held, dtype=np.int64, sep=","), [json.loads(f"[{text}]") for text in texts]
    order = np.argsort(numbers, kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        numbers, places = numbers[order], order.tolist()
        found = [[values[at] for at in places] for values in found]
    return numbers, found


def changed_slots(con: apsw.Connection, seq: int) -> IntArray | None:
    """The slots that were added or changed after a log entry, ascending; None where the log no longer says."""
    if seq < first_row(con, "SELECT horizon FROM counters")[0]:
        return None
    if first_row(con, "SELECT EXISTS (SELECT 1 FROM changes WHERE seq > ? AND op = ?)", (seq, Op.CLEAR))[0]:
        return None
    return slots_read(con, "SELECT slot FROM changes WHERE seq > ? AND op IN (?, ?)", (seq, Op.PUT, Op.EDIT))


def json_path(path: tuple[str, ...]) -> str:
    """The path as SQLite's JSON functions take it."""
    return "$" + "".join("." + json.dumps(part, ensure_ascii=False) for part in path)


def _field(path: tuple[str, ...], bound: list[apsw.Binding]) -> str:
    """The JSON of a field, written as in the index of a declared one; what no literal can hold is bound."""
    text = json_path(path)
    if "\0" not in text:
        return "unit -> '" + text.replace("'", "''") + "'"
    bound.append(text)
    return f"unit -> ?{len(bound)}"


def _quoted_name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_FEW = 4
"""Slots are looked up one by one while they are fewer than a quarter of all units, else all units are scanned."""


def matching(con: apsw.Connection, filters: Filter, slots: IntArray | None) -> IntArray:
    """Ascending slots of the live units that match, among ``slots`` (ascending) when given.

    Runs several statements: call inside a read transaction.
    """
    indexed = [one for one in filters.root.parts if isinstance(one, Condition) and is_indexed(one)]
    if not indexed or (slots is not None and len(slots) <= FEW_SLOTS):
        return _scan(con, filters.root, slots)
    folded, backlog = first_row(con, "SELECT folded, backlog FROM counters")
    found = _with_term(con, indexed[0]) if slots is None else intersection(slots, _with_term(con, indexed[0]))
    for one in indexed[1:]:
        found = intersection(found, _with_term(con, one))
    rest = tuple(one for one in filters.root.parts if not is_indexed(one))
    if backlog:
        found = _difference(found, slots_read(con, "SELECT slot FROM stale", ()))
    if rest:
        found = _scan(con, Every(rest), found)
    if backlog:
        found = np.concatenate([found, _scan(con, filters.root, slots, after=folded)])
    return found


def ids_at(con: apsw.Connection, slots: IntArray, ns: int, now: float) -> list[str]:
    """Ids of the live units of the slots that are of a namespace, in order of the slots."""
    subquery, listed = slot_list(slots)
    sql = f"SELECT id FROM units WHERE slot IN ({subquery}) AND +ns = ? AND ifnull(expires_at > ?, 1) ORDER BY slot"
    return [unit_id for (unit_id,) in all_rows(con, sql, (listed, ns, now))]


def slot_list(slots: IntArray) -> tuple[str, apsw.Binding]:
    """A subquery that yields the slots, and the value to bind for it."""
    if _HAS_CARRAY and len(slots):
        return "SELECT value FROM carray(?)", apsw.carray(np.ascontiguousarray(slots, dtype=np.int64))
    return "SELECT value FROM json_each(?)", "[" + ",".join(map(str, slots.tolist())) + "]"


_HAS_CARRAY = hasattr(apsw, "carray") and "ENABLE_CARRAY" in apsw.compile_options


def _with_term(con: apsw.Connection, one: Condition) -> IntArray:
    bound: list[apsw.Binding] = [one.path[0]]
    return slots_read(con, f"SELECT slot FROM terms WHERE field = ?1 AND value IN ({places(one.values, bound)})", bound)


def _scan(con: apsw.Connection, node: Node, slots: IntArray | None, after: int = 0) -> IntArray:
    """Test the units of the slots, or all of them, by their JSON text."""
    bound: list[apsw.Binding] = [after]
    sql = f"SELECT u.slot FROM units AS u WHERE u.slot > ?1 AND {where(node, bound)}"
    if slots is None:
        return slots_read(con, sql, bound)
    slots = slots[np.searchsorted(slots, after, side="right") :]
    if after == 0 and len(slots) * _FEW > first_row(con, "SELECT count FROM counters")[0]:
        return intersection(slots, slots_read(con, sql, bound))
    subquery, listed = slot_list(slots)
    return slots_read(con, f"{sql} AND u.slot IN ({subquery})", (*bound, listed))


def slots_read(con: apsw.Connection, sql: str, parameters: apsw.Bindings) -> IntArray:
    """The one integer column of a query, ascending and distinct.

    SQLite writes the numbers into one text and NumPy parses it: a quarter of the time that rows take.
    """
    text = first_row(con, f"SELECT group_concat(slot) FROM ({sql})", parameters)[0]
    if text is None:
        return np.empty(0, dtype=np.int64)
    try:
        found = np.fromstring(text, dtype=np.int64, sep=",")
    except ValueError as error:
        raise apsw.CorruptError("the index of types and tags holds a slot that is no number") from error
    return found if bool(np.all(found[1:] > found[:-1])) else np.unique(found)


def intersection(one: IntArray, other: IntArray) -> IntArray:
    """The slots in both; each is ascending."""
    few, many = (one, other) if len(one) < len(other) else (other, one)
    if not len(few):
        return few
    places = np.searchsorted(many, few)
    common: IntArray = few[many[np.minimum(places, len(many) - 1)] == few]
    return common


def _difference(one: IntArray, gone: IntArray) -> IntArray:
    return one if not len(gone) else one[~np.isin(one, gone)]
