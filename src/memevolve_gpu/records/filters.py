"""The filter grammar: what a filter means, by definition in Python.

A filter maps dotted paths to conditions, all of which must hold, and joins filters with ``and``, ``or`` and ``not``::

    {"type": "skill", "or": [{"tags": ["git", "linux"]}, {"metadata.score": {"gte": 0.5, "lt": 1}}]}

docs/reference/filters.md describes the operators and how values compare. :func:`parse` turns every spelling into one
normal form, a tree of :class:`Every`, :class:`Some`, :class:`Not` and :class:`Condition`; SQL, the masks of the index
and the expressions of Milvus are made from it. :func:`matches` is the reference that they must agree with.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from difflib import get_close_matches
from functools import lru_cache
from operator import ge, gt, le, lt
from types import ModuleType
from typing import Literal
from unicodedata import normalize

from ..errors import InvalidFilterError
from ..types import Filters, Json, JsonObject
from ..utils.arguments import listed, shown, switch
from ..utils.plain import plain_scalar, plain_text
from ..utils.timestamps import micros_of

Unicode = Literal["nfc", "exact"]

RANGES: dict[str, Callable[[Json, Json], bool]] = {"gt": gt, "gte": ge, "lt": lt, "lte": le}
TEXT_OPERATORS = ("startswith", "endswith", "like", "ilike", "regex", "ieq")
OPERATORS = (
    *("eq", "ne", "in", "nin", *RANGES, "between", "exists", "is_null"),
    *("contains", "not_contains", *TEXT_OPERATORS, "all", "size", "not"),
)
MAX_VALUES, MAX_CONDITIONS, MAX_DEPTH, MAX_PATTERN = 30_000, 100, 20, 1_000
"""Most values, operators, levels, and characters of a pattern in one filter. SQLite takes 32,766 parameters and a tree
1,000 deep in one statement."""

REGEX_MEMORY = 1 << 23
"""Bytes that RE2 may use for one pattern; a larger one is refused."""

MISSING: Json = object()
"""The value of a field that a unit does not have."""

_JOINS = ("and", "or", "not", "nor")
_KNOWN: dict[tuple[Json, ...], Filter] = {}
"""Filters that were seen, by their form; forgotten all at once when they are many."""
_MOST_KEPT, _LONGEST_KEPT, _DEEPEST_KEPT = 512, 16, 4
_PLAIN = frozenset({str, int, float, bool, type(None)})
_SINGLETONS = frozenset("K;`")
"""The ASCII characters that NFC makes from others, such as the Kelvin sign."""


@dataclass(frozen=True, slots=True, order=True)
class Instant:
    """A moment, in microseconds since 1970 in UTC; equals and orders the texts that say a moment in ISO 8601."""

    micros: int


Scalar = None | bool | int | float | str | Instant


@dataclass(frozen=True, slots=True)
class Condition:
    """One operator on one path.

    op: in, gt, gte, lt, lte, contains, startswith, endswith, like, ilike, regex, ieq; exists and is_null, whose value
    is a bool; size, whose values are the least and the largest length. nfc: texts of the unit compare in NFC, in which
    the values are already.
    """

    path: tuple[str, ...]
    op: str
    values: tuple[Json, ...]
    nfc: bool = True

    @property
    def spec(self) -> str:
        """The condition as JSON."""
        values = sorted({json.dumps(value, default=_spelled, ensure_ascii=False) for value in self.values})
        values = values if self.op == "in" else [json.dumps(one, default=_spelled) for one in self.values]
        return json.dumps([self.path, self.op, values, self.nfc], ensure_ascii=False)

    @classmethod
    def of(cls, spec: str) -> Condition:
        """The condition that ``spec`` describes."""
        path, op, values, nfc = json.loads(spec)
        return cls(tuple(path), op, tuple(json.loads(one, object_hook=lambda it: Instant(**it)) for one in values), nfc)


@dataclass(frozen=True, slots=True)
class Every:
    """All parts hold; without parts it always holds."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Some:
    """At least one part holds."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not hold."""

    part: Node


Node = Condition | Every | Some | Not


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed filter; ``key`` is equal for filters that mean the same by form, order and repetition aside."""

    root: Every
    key: str


def parse(filters: object, unicode: Unicode = "nfc") -> Filter:
    """The normal form of a filter: a mapping, a list of mappings that must all hold, or None; a Filter stays itself.

    unicode: whether texts compare in NFC or as they are. Raises InvalidFilterError, naming the key, for everything
    outside the grammar.
    """
    if isinstance(filters, Filter):
        return filters
    form = _form(filters)
    if form is None:
        return _parsed(filters, unicode)
    known = _KNOWN.get((unicode, form))
    if known is None:
        known = _parsed(filters, unicode)
        if len(_KNOWN) >= _MOST_KEPT:
            _KNOWN.clear()
        _KNOWN[unicode, form] = known
    return known


def canonical(filters: object) -> str:
    """A text that is equal for filters which mean the same by form. Raises InvalidFilterError as :func:`parse` does."""
    return parse(filters).key


def matches(filters: object, unit: Mapping[str, object]) -> bool:
    """Does the unit match? The reference that every backend must agree with."""
    return _holds(parse(filters).root, unit)


def conditions_of(node: Node) -> Iterator[Condition]:
    """Every condition in the tree."""
    if isinstance(node, Condition):
        yield node
    else:
        for part in (node.part,) if isinstance(node, Not) else node.parts:
            yield from conditions_of(part)


def always(node: Node) -> bool | None:
    """What the node is for every unit; None where that depends on the unit."""
    if isinstance(node, Condition):
        return None
    if isinstance(node, Not):
        part = always(node.part)
        return None if part is None else not part
    parts, decisive = [always(part) for part in node.parts], isinstance(node, Some)
    return decisive if decisive in parts else None if None in parts else not decisive


def kind_of(value: Json) -> str:
    """The JSON kind of a value: null, true, false, number, text, array or object; instant for an Instant."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Instant):
        return "instant"
    return "array" if isinstance(value, (list, tuple)) else "object"


def doubled(value: float) -> float:
    """The number as it is compared: a 64-bit integer or a double."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def composed(text: str) -> str:
    """The text in NFC."""
    return text if text.isascii() else normalize("NFC", text)


def is_plain(one: Condition) -> bool:
    """Do the texts of units compare with the condition's by their bytes?"""
    return one.op == "in" and all(
        not isinstance(value, Instant)
        and (not one.nfc or not isinstance(value, str) or (value.isascii() and _SINGLETONS.isdisjoint(value)))
        for value in one.values
    )


def lookup(unit: object, path: tuple[str, ...]) -> Json:
    """The value at the path, or MISSING."""
    for part in path:
        if not isinstance(unit, Mapping) or part not in unit:
            return MISSING
        unit = unit[part]
    return unit


# What conditions mean


def _holds(node: Node, unit: Mapping[str, object]) -> bool:
    if isinstance(node, Condition):
        return test_of(node)(lookup(unit, node.path))
    if isinstance(node, Not):
        return not _holds(node.part, unit)
    return (all if isinstance(node, Every) else any)(_holds(part, unit) for part in node.parts)


def test_of(one: Condition) -> Callable[[Json], bool]:
    """Whether a value, or MISSING, meets the condition."""
    if one.op == "exists":
        return lambda found: (found is not MISSING) is one.values[0]
    if one.op == "is_null":
        return lambda found: (found is MISSING or found is None) is one.values[0]
    if one.op == "size":
        return lambda found: isinstance(found, (list, tuple)) and one.values[0] <= len(found) <= one.values[1]
    single, in_list = element_test(one, False), element_test(one, True)

    def test(found: object) -> bool:
        if isinstance(found, (list, tuple)):
            return any(in_list(plain_scalar(element)) for element in found)
        return found is not MISSING and single(plain_scalar(found))

    return test


@lru_cache(maxsize=256)
def _test_of_spec(spec: str) -> Callable[[Json], bool]:
    return test_of(Condition.of(spec))


def holds(*given: Json) -> int:
    """The definition as a function of SQL: (spec of a condition, JSON value or NULL for a missing one) to 1 or 0."""
    spec, value = given
    return _test_of_spec(spec)(MISSING if value is None else json.loads(value))


def element_test(one: Condition, in_list: bool) -> Callable[[Json], bool]:
    """Whether a plain scalar meets the condition; ``contains`` tells a text from an element of a list."""
    value = one.values[0] if one.values else None
    if one.op in RANGES:
        return _range_test(RANGES[one.op], value, one.nfc)
    if one.op == "in" or (one.op == "contains" and in_list):
        return lambda element: any(_equal(element, value, one.nfc) for value in one.values)
    test = _TEXT_TESTS[one.op](value)
    return lambda element: isinstance(element, str) and test(composed(element) if one.nfc else element)


def _equal(element: Json, value: Scalar, nfc: bool) -> bool:
    kind = kind_of(element)
    if isinstance(value, Instant):
        return kind == "text" and micros_of(element) == value.micros
    if kind != kind_of(value) or kind in ("array", "object"):
        return False
    if kind == "text":
        return (composed(element) if nfc else element) == value
    return bool(doubled(element) == value) if kind == "number" else bool(element == value)


def _range_test(compare: Callable[[Json, Json], bool], bound: Json, nfc: bool) -> Callable[[Json], bool]:
    def at(element: object) -> bool:
        micros = micros_of(element) if isinstance(element, str) else None
        return micros is not None and compare(micros, bound.micros)

    if isinstance(bound, Instant):
        return at
    if isinstance(bound, str):
        return lambda element: isinstance(element, str) and compare(composed(element) if nfc else element, bound)
    return lambda element: kind_of(element) == "number" and compare(doubled(element), bound)


def _like(pattern: str) -> Callable[[str], bool]:
    """``%`` stands for any characters, ``_`` for one. Each piece is looked for once, so the time grows linearly."""
    pieces, escaped = [""], False
    for sign in pattern:
        if escaped or sign not in "%_\\":
            pieces[-1] += re.escape(sign)
        elif sign == "%":
            pieces.append("")
        elif sign == "_":
            pieces[-1] += "."
        escaped = sign == "\\" and not escaped
    first, *middle = [re.compile(piece, re.DOTALL) for piece in pieces]
    if not middle:
        return lambda text: first.fullmatch(text) is not None
    last = re.compile(f"(?:{pieces[-1]})\\Z", re.DOTALL)

    def test(text: str) -> bool:
        found = first.match(text)
        for piece in [*middle[:-1], last]:
            found = piece.search(text, found.end()) if found else None
        return found is not None

    return test


def _regex(pattern: str) -> Callable[[str], bool]:
    re2 = _re2()
    options = re2.Options()
    options.max_mem, options.log_errors = REGEX_MEMORY, False
    try:
        found = re2.compile(pattern, options).search
    except re2.error as error:
        said = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else error
        raise InvalidFilterError(
            f"regex {pattern[:60]!r} cannot be used: {said}; the syntax is that of RE2, without look-around and "
            "back-references"
        ) from error
    return lambda text: found(text) is not None


def _re2() -> ModuleType:
    try:
        import re2
    except ImportError as error:
        raise InvalidFilterError(
            "regex needs the package google-re2, whose time is bounded: pip install 'memevolve-gpu[regex]'; or use like"
        ) from error
    return re2  # type: ignore[no-any-return]


def _ilike(pattern: str) -> Callable[[str], bool]:
    test = _like(folded(pattern))
    return lambda text: test(folded(text))


def folded(text: str) -> str:
    """The text without differences of case."""
    return composed(text.casefold())


_TEXT_TESTS: dict[str, Callable[[Json], Callable[[str], bool]]] = {
    "contains": lambda part: lambda text: isinstance(part, str) and part in text,
    "startswith": lambda part: lambda text: text.startswith(part),
    "endswith": lambda part: lambda text: text.endswith(part),
    "like": _like,
    "ilike": _ilike,
    "regex": _regex,
    "ieq": lambda part: lambda text: folded(text) == folded(part),
}


# How filters are read


def _form(value: Json, depth: int = 0) -> tuple[Json, ...] | None:
    """Values and their types, to look a filter up by in a tenth of the time; None for a large or an unusual one."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    kind = dict if kind is Where else kind
    if kind not in (dict, list) or len(value) > _LONGEST_KEPT or depth > _DEEPEST_KEPT:
        return None
    parts: list[Json] = [kind, *[_form(one, depth + 1) for one in value]]
    if kind is dict:
        parts += [_form(one, depth + 1) for one in value.values()]
    return None if None in parts else tuple(parts)


def _parsed(filters: object, unicode: Unicode) -> Filter:
    root = Every(tuple(_Reader(unicode == "nfc").joined(filters, "filters")) if filters is not None else ())
    conditions = list(conditions_of(root))
    if len(conditions) > MAX_CONDITIONS or sum(len(one.values) for one in conditions) > MAX_VALUES:
        largest = max(conditions, key=lambda one: len(one.values))
        raise InvalidFilterError(
            f"filters hold more than {MAX_CONDITIONS} operators or {MAX_VALUES:,} values, most of them under "
            f"{'.'.join(largest.path)!r}; split the query"
        )
    return Filter(root, _key(root))


def _key(node: Node) -> str:
    if isinstance(node, Condition):
        return node.spec
    if isinstance(node, Not):
        return f"not({_key(node.part)})"
    parts = sorted({_key(part) for part in node.parts})
    return parts[0] if len(parts) == 1 else f"{type(node).__name__}({','.join(parts)})"


class _Reader:
    """Reads filters of either spelling."""

    def __init__(self, nfc: bool) -> None:
        self._nfc = nfc

    def joined(self, filters: object, where: str, depth: int = 0) -> Iterator[Node]:
        """The nodes of a filter, or of a list of filters, all of which must hold."""
        if depth > MAX_DEPTH:
            raise InvalidFilterError(f"{where} is nested more than {MAX_DEPTH} deep; flatten it")
        if isinstance(filters, Filter):
            yield from filters.root.parts
        elif isinstance(filters, (list, tuple)) and filters:
            for at, one in enumerate(filters):
                yield from self.joined(one, f"{where}[{at}]", depth + 1)
        elif isinstance(filters, Mapping):
            for key, value in filters.items():
                yield from self._entry(key, value, where, depth)
        else:
            raise InvalidFilterError(f"{where} must be a mapping of paths to conditions, not {type(filters).__name__}")

    def _entry(self, key: Json, value: object, where: str, depth: int) -> Iterator[Node]:
        join = key.removeprefix("$") if isinstance(key, str) else ""
        if join in _JOINS:
            node = self._join(join, value, f"{where}[{key!r}]", depth)
            yield from () if node == Every(()) else (node,)
        elif join != key and (join in OPERATORS or _nearest(join, _JOINS)):
            raise InvalidFilterError(
                f"filters[{key!r}]: unknown here{_nearest(join, _JOINS)}; operators stand below a path, and a field of "
                f"that name is written '\"{key}\"'"
            )
        else:
            yield from self._conditions(key, path_of(key), value, depth)

    def _join(self, join: str, value: Json, where: str, depth: int) -> Node:
        many = isinstance(value, (list, tuple))
        if not many and not (isinstance(value, Mapping) and join == "not"):
            raise InvalidFilterError(
                f"{where} takes a list of filters, not {type(value).__name__}; a field of that name is written "
                f"'\"{join}\"'"
            )
        if join in ("and", "not"):
            every = Every(tuple(self.joined(value, where, depth + 1)) if len(value) else ())
            return Not(every) if join == "not" else every
        some = Some(tuple(Every(tuple(self.joined(one, f"{where}[{at}]", depth + 1))) for at, one in enumerate(value)))
        return Not(some) if join == "nor" else some

    def _conditions(self, key: str, path: tuple[str, ...], value: object, depth: int) -> Iterator[Node]:
        if isinstance(value, Mapping):
            if not len(value):
                raise InvalidFilterError(f"filters[{key!r}] names no operator; use one of {', '.join(OPERATORS)}")
            for op, operand in value.items():
                yield self._operator(key, path, op, operand, depth)
        elif isinstance(value, (list, tuple)):
            yield self._operator(key, path, "in", value, depth)
        else:
            yield self._operator(key, path, "eq", value, depth)

    def _operator(self, key: str, path: tuple[str, ...], given: Json, operand: object, depth: int) -> Node:
        op = given.removeprefix("$") if isinstance(given, str) else given
        if op not in OPERATORS:
            raise InvalidFilterError(
                f"filters[{key!r}]: unknown operator {given!r}{_nearest(op, OPERATORS)}; use one of "
                f"{', '.join(OPERATORS)}, or '{key}.{given}' for a nested field"
            )
        if op == "not":
            if depth > MAX_DEPTH:
                raise InvalidFilterError(f"filters[{key!r}] is nested more than {MAX_DEPTH} deep; flatten it")
            return Not(Every(tuple(self._conditions(key, path, operand, depth + 1))))
        if op in ("ne", "nin", "not_contains"):
            return Not(self._operator(key, path, {"ne": "eq", "nin": "in"}.get(op, "contains"), operand, depth))
        if op in ("in", "all", "between"):
            return self._several(key, path, op, operand)
        return self._condition(key, path, op, operand)

    def _several(self, key: str, path: tuple[str, ...], op: str, operand: object) -> Node:
        if not isinstance(operand, (list, tuple)):
            raise InvalidFilterError(f"filters[{key!r}]: {op} takes a list, not {type(operand).__name__}")
        if op == "all":
            if not operand:
                raise InvalidFilterError(f"filters[{key!r}]: all takes a list that is not empty; leave it out")
            return Every(tuple(self._condition(key, path, "eq", one) for one in operand))
        if op == "between":
            if len(operand) != 2:
                raise InvalidFilterError(f"filters[{key!r}]: between takes [least, largest], got {len(operand)} values")
            bounds = zip(("gte", "lte"), operand, strict=True)
            return Every(tuple(self._condition(key, path, side, bound) for side, bound in bounds))
        return self._made(path, op, tuple(self._scalar(key, path, op, one) for one in operand))

    def _condition(self, key: str, path: tuple[str, ...], op: str, operand: object) -> Condition:
        if op in ("exists", "is_null"):
            operand = plain_scalar(operand)
            if not isinstance(operand, bool):
                raise InvalidFilterError(f"filters[{key!r}]: {op} takes True or False, not {shown(operand)}")
            return self._made(path, op, (operand,))
        if op == "size":
            return self._made(path, op, _sizes(key, operand))
        value = self._scalar(key, path, op, operand)
        if op in RANGES and kind_of(value) not in ("number", "text", "instant"):
            raise InvalidFilterError(f"filters[{key!r}]: {op} compares numbers, strings or times, not {value!r}")
        if op in TEXT_OPERATORS:
            value = _pattern(key, op, plain_scalar(operand), self._nfc)
        if isinstance(value, Instant) and op == "contains":
            return self._made(path, op, (composed(plain_scalar(operand)) if self._nfc else plain_scalar(operand),))
        return self._made(path, "in" if op == "eq" else op, (value,))

    def _made(self, path: tuple[str, ...], op: str, values: tuple[Json, ...]) -> Condition:
        return Condition(path, op, values, self._nfc and path != ("id",))

    def _scalar(self, key: str, path: tuple[str, ...], op: str, given: object) -> Scalar:
        value = plain_scalar(given)
        kind = kind_of(value)
        if kind == "text":
            _refuse_surrogates(key, value)
            if path == ("id",):
                return str(value)
            micros = micros_of(value) if isinstance(given, (date, datetime)) or _ZONED.search(value) else None
            return (composed(value) if self._nfc else value) if micros is None else Instant(micros)
        if kind == "number":
            return _number(key, op, value)
        if kind in ("array", "object"):
            raise InvalidFilterError(
                f"filters[{key!r}]: {op} takes None, True, False, a number, a string or a time, not "
                f"{type(given).__name__}"
            )
        return bool(value) if value is not None else None


_ZONED = re.compile(r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d.*([Zz]|[+-]\d\d(:?\d\d)?)$", re.ASCII)


def _nearest(word: object, known: tuple[str, ...]) -> str:
    found = get_close_matches(word, known, n=1, cutoff=0.5) if isinstance(word, str) else []
    word = _OTHER_NAMES.get(word, found[0] if found else "") if isinstance(word, str) else ""
    return f", did you mean {word!r}?" if word else ""


_OTHER_NAMES = {
    "==": "eq",
    "=": "eq",
    "!=": "ne",
    "<>": "ne",
    ">": "gt",
    ">=": "gte",
    "<": "lt",
    "<=": "lte",
    "ge": "gte",
    "le": "lte",
    "match": "regex",
    "prefix": "startswith",
    "suffix": "endswith",
    "null": "is_null",
    "has": "contains",
}


def path_of(key: object) -> tuple[str, ...]:
    """The keys of a dotted path. Raises InvalidFilterError."""
    if not isinstance(key, str):
        raise InvalidFilterError(f"filters[{shown(key)}]: a path must be a string, not {type(key).__name__}")
    parts = [_part(found) for found in _PARTS.finditer(plain_text(key))]
    if not all(found[1] or found[0] for found in parts):
        raise InvalidFilterError(
            f"filters[{key!r}]: an empty path or an empty part of one; write 'field' or 'field.part'"
        )
    _refuse_surrogates(key, key)
    return tuple(found[0] for found in parts)


_PARTS = re.compile(r'(?:^|(?<=\.))(?:"((?:[^"\\]|\\["\\])*)"(?=\.|\Z)|([^.]*))', re.DOTALL)
"""The parts of a path: those in double quotes may hold dots, and both signs after a backslash."""


def _part(found: re.Match[str]) -> tuple[str, bool]:
    quoted = found[1]
    return (found[2], False) if quoted is None else (re.sub(r"\\(.)", r"\1", quoted), True)


def _sizes(key: str, operand: object) -> tuple[float, float]:
    """Least and largest length: of a number, or of a mapping with eq and ranges."""
    low: float = 0
    high: float = math.inf
    for op, given in (operand if isinstance(operand, Mapping) else {"eq": operand}).items():
        bound, name = plain_scalar(given), str(op).removeprefix("$")
        if isinstance(bound, bool) or not isinstance(bound, int) or bound < 0 or name not in ("eq", *RANGES):
            raise InvalidFilterError(
                f"filters[{key!r}]: size takes a whole number, or a mapping of eq, gt, gte, lt or lte to one"
            )
        if name in ("eq", "gte", "gt"):
            low = max(low, bound + (name == "gt"))
        if name in ("eq", "lte", "lt"):
            high = min(high, bound - (name == "lt"))
    return low, (2**62 if high == math.inf else high)


def _pattern(key: str, op: str, value: object, nfc: bool) -> str:
    if not isinstance(value, str):
        raise InvalidFilterError(f"filters[{key!r}]: {op} takes a string, not {type(value).__name__}")
    if op in ("like", "ilike", "regex") and len(value) > MAX_PATTERN:
        raise InvalidFilterError(f"filters[{key!r}]: {op} has {len(value)} characters, the most is {MAX_PATTERN}")
    text = composed(value) if nfc else value
    try:
        _TEXT_TESTS[op](text)
    except InvalidFilterError as error:
        raise InvalidFilterError(f"filters[{key!r}]: {error}") from error
    return text


def _number(key: str, op: str, value: float) -> float:
    number = doubled(value)
    if not math.isfinite(number):
        raise InvalidFilterError(f"filters[{key!r}]: {op} takes a finite number, not {number}; leave the bound out")
    return number


def _refuse_surrogates(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidFilterError(f"filters[{key!r}]: the text is not valid Unicode ({error.reason})") from error


def _spelled(value: Instant) -> dict[str, int]:
    return {"micros": value.micros}


# The builder


class Where(JsonObject):
    """A filter that :class:`F` built: a mapping like any other filter, which ``&``, ``|`` and ``~`` combine."""

    def __and__(self, other: Filters) -> Where:
        """Both must hold."""
        return Where({"and": [self, other]})

    def __or__(self, other: Filters) -> Where:  # type: ignore[override]
        """At least one must hold."""
        return Where({"or": [self, other]})

    __ror__ = __or__  # type: ignore[assignment]

    def __invert__(self) -> Where:
        """The filter must not hold."""
        return Where({"not": self})

    def __bool__(self) -> bool:
        """Raise TypeError: ``and``, ``or``, ``not`` and ``0 < F(...) < 1`` would drop a condition."""
        raise TypeError("combine conditions with & | ~ in brackets: (F('a') > 0) & (F('a') < 1)")


class F:
    """Builds filters: ``F(path)`` compared with a value is a filter.

    Examples:
        >>> from memevolve_gpu import F
        >>> (F("metadata.score") >= 0.5) & (F("type") == "skill")
        {'and': [{'metadata.score': {'gte': 0.5}}, {'type': {'eq': 'skill'}}]}
        >>> ~F("tags").isin(["old", "draft"]) | F("content").contains("git")
        {'or': [{'not': {'tags': {'in': ['old', 'draft']}}}, {'content': {'contains': 'git'}}]}
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, path: str) -> None:
        """Name a field.

        Args:
            path: Its dotted path, as in a filter.
        """
        self._path = path

    def __eq__(self, value: object) -> Where:  # type: ignore[override]
        return self._is("eq", value)

    def __ne__(self, value: object) -> Where:  # type: ignore[override]
        return self._is("ne", value)

    def __gt__(self, value: object) -> Where:
        return self._is("gt", value)

    def __ge__(self, value: object) -> Where:
        return self._is("gte", value)

    def __lt__(self, value: object) -> Where:
        return self._is("lt", value)

    def __le__(self, value: object) -> Where:
        return self._is("lte", value)

    def isin(self, values: object) -> Where:
        """Equal one of several values.

        Args:
            values: The values.

        Returns:
            The filter.

        Raises:
            InvalidFilterError: ``values`` are not several.
        """
        return self._is("in", listed("values", values, InvalidFilterError))

    def all(self, values: object) -> Where:
        """Hold every one of several values.

        Args:
            values: The values.

        Returns:
            The filter.

        Raises:
            InvalidFilterError: ``values`` are not several.
        """
        return self._is("all", listed("values", values, InvalidFilterError))

    def contains(self, value: object) -> Where:
        """Be a text that holds the value, or a list that has it as an element.

        Args:
            value: The value.

        Returns:
            The filter.
        """
        return self._is("contains", value)

    def startswith(self, text: str) -> Where:
        """Begin with a text.

        Args:
            text: The text.

        Returns:
            The filter.
        """
        return self._is("startswith", text)

    def endswith(self, text: str) -> Where:
        """End with a text.

        Args:
            text: The text.

        Returns:
            The filter.
        """
        return self._is("endswith", text)

    def like(self, pattern: str, *, case: bool = True) -> Where:
        """Be a text like a pattern.

        Args:
            pattern: ``%`` stands for any characters, ``_`` for one, and a backslash makes the next one literal.
            case: Whether case counts.

        Returns:
            The filter.
        """
        return self._is("like" if switch("case", case) else "ilike", pattern)

    def regex(self, pattern: str) -> Where:
        """Be a text in which a regular expression is found.

        Args:
            pattern: The expression, in RE2's syntax.

        Returns:
            The filter.
        """
        return self._is("regex", pattern)

    def ieq(self, text: str) -> Where:
        """Equal a text but for case.

        Args:
            text: The text.

        Returns:
            The filter.
        """
        return self._is("ieq", text)

    def size(self, size: object) -> Where:
        """Be a list of so many elements.

        Args:
            size: The number, or a mapping such as ``{"gte": 2}``.

        Returns:
            The filter.
        """
        return self._is("size", size)

    def exists(self, wanted: bool = True) -> Where:
        """Exist.

        Args:
            wanted: False for not to exist.

        Returns:
            The filter.
        """
        return self._is("exists", wanted)

    def is_null(self, wanted: bool = True) -> Where:
        """Be missing or null.

        Args:
            wanted: False for to have a value.

        Returns:
            The filter.
        """
        return self._is("is_null", wanted)

    def _is(self, op: str, value: object) -> Where:
        return Where({self._path: {op: value}})
