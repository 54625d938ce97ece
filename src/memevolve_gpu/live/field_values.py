"""The values of one field in many rows, by kind, and the rows that meet a condition on it."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..records.filters import RANGES, Condition, Instant, composed, doubled, element_test, kind_of
from ..types import IntArray, Json
from ..utils.timestamps import micros_of

BoolArray = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]
"""One that :class:`FieldReader` makes; the name says the type."""

_NO_MOMENT = np.iinfo(np.int64).min
_EXACT = 2.0**53
_KINDS = ("number", "text", "null", "true", "false")
_WIDEST = 64
"""Bytes of the longest text of those that NumPy sorts; it lets other threads run meanwhile."""


class _Texts(Sequence[str]):
    """Distinct texts, in ascending order, in one block: text i ends at byte ``ends[i + 1]``."""

    def __init__(self, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64], composed_all: bool) -> None:
        self._data, self._ends, self.composed = data, ends, composed_all

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, at: Any) -> Any:
        return self._data[self._ends[at] : self._ends[at + 1]].tobytes().decode()


class FieldReader:
    """Takes the values of rows in turn and keeps them by kind, in little more memory than the result."""

    def __init__(self) -> None:
        self._n = 0
        self._missing, self._null = array("i"), array("i")
        self._sized, self._sizes = array("i"), array("q")
        self._at = {kind: array("i") for kind in _KINDS}
        self._numbers, self._codes = array("d"), array("i")
        self._texts: dict[str, int] = {}
        self._big: list[tuple[int, Json]] = []

    def add(self, values: Sequence[Json]) -> None:
        """The next rows: values of JSON, NaN where a row has none."""
        for row, value in enumerate(values, self._n):
            if isinstance(value, str):
                self._text(row, value)
            elif value is not None and value != value:  # noqa: PLR0124 - NaN
                self._missing.append(row)
            elif isinstance(value, list):
                self._sized.append(row)
                self._sizes.append(len(value))
                for element in value:
                    self._other(row, element)
            else:
                if value is None:
                    self._null.append(row)
                self._other(row, value)
        self._n += len(values)

    def _text(self, row: int, value: str) -> None:
        self._at["text"].append(row)
        self._codes.append(self._texts.setdefault(value, len(self._texts)))

    def _other(self, row: int, value: Json) -> None:
        kind = kind_of(value)
        if kind == "text":
            self._text(row, value)
        elif kind != "number":
            if kind in self._at:
                self._at[kind].append(row)
        elif -_EXACT < value < _EXACT:
            self._at[kind].append(row)
            self._numbers.append(value)
        else:
            self._big.append((row, value))

    @property
    def distinct_texts(self) -> int:
        return len(self._texts)

    def finished(self) -> FieldValues:
        """The values of all rows that were added."""
        missing, null = np.zeros(self._n, dtype=np.bool_), np.zeros(self._n, dtype=np.bool_)
        missing[np.asarray(self._missing)], null[np.asarray(self._null)] = True, True
        data, ends, order = _sorted_texts(list(self._texts))
        places = np.empty(len(order), dtype=np.int32)
        places[order] = np.arange(len(order), dtype=np.int32)
        arrays: dict[str, Array] = {
            "missing": missing,
            "null": null,
            "sized": np.array(self._sized, dtype=np.int32),
            "sizes": np.array(self._sizes, dtype=np.int64),
            "numbers": np.array(self._numbers, dtype=np.float64),
            "codes": places[np.asarray(self._codes, dtype=np.int32)],
            "text_data": data,
            "text_ends": ends,
            **{f"at_{kind}": np.array(rows, dtype=np.int32) for kind, rows in self._at.items()},
        }
        is_composed = bool((data < 128).all()) or all(composed(text) == text for text in self._texts)
        return FieldValues(self._n, arrays, self._big, is_composed)


def _sorted_texts(texts: list[str]) -> tuple[npt.NDArray[np.uint8], IntArray, IntArray]:
    """The texts in ascending order as one block of UTF-8, uint8, where each ends, int64 (n + 1,), and their order."""
    raw = [text.encode() for text in texts]
    sizes = np.fromiter(map(len, raw), dtype=np.int64, count=len(raw))
    if raw and sizes.max() <= _WIDEST and not any(one.endswith(b"\0") for one in raw):
        order = np.argsort(np.array(raw), kind="stable")
    else:
        order = np.array(sorted(range(len(raw)), key=raw.__getitem__), dtype=np.int64)
    data = np.frombuffer(b"".join([raw[at] for at in order.tolist()]), dtype=np.uint8)
    return data, np.concatenate([[0], np.cumsum(sizes[order])]), order


def values_of(values: Sequence[Json]) -> FieldValues:
    """The values of n rows: those of JSON, NaN where a row has none."""
    reader = FieldReader()
    reader.add(values)
    return reader.finished()


class FieldValues:
    """The values of n rows, by kind; an element of a list counts as a value of its row."""

    def __init__(
        self,
        n: int,
        arrays: Mapping[str, Array],
        big: Sequence[tuple[int, Json]],
        is_composed: bool,
        *,
        mapped: bool = False,
    ) -> None:
        """arrays: as :class:`FieldReader` makes them; big: numbers that no double holds exactly, with their rows.
        is_composed: whether every text is in NFC. mapped: whether the arrays lie in a file.
        """
        self.n, self.arrays, self.big, self.is_composed = n, dict(arrays), list(big), is_composed
        self.missing, self.null = self.arrays["missing"], self.arrays["null"]
        self.sizes = self.arrays["sized"], self.arrays["sizes"]
        self.at = {kind: self.arrays[f"at_{kind}"] for kind in _KINDS}
        self.numbers, self.codes = self.arrays["numbers"], self.arrays["codes"]
        self.texts = _Texts(self.arrays["text_data"], self.arrays["text_ends"], is_composed)
        self.nbytes = 64 * len(self.big) + (0 if mapped else sum(one.nbytes for one in self.arrays.values()))
        """Bytes of memory that cannot be dropped."""

    @property
    def has_moments(self) -> bool:
        """Whether a filter asked for moments."""
        return "micros" in self.arrays

    def mask(self, one: Condition) -> BoolArray:
        """The rows that meet the condition."""
        if one.op == "exists":
            return ~self.missing if one.values[0] else self.missing
        if one.op == "is_null":
            empty: BoolArray = self.missing | self.null
            return empty if one.values[0] else ~empty
        found = np.zeros(self.n, dtype=np.bool_)
        if one.op == "size":
            rows, sizes = self.sizes
            found[rows[(sizes >= one.values[0]) & (sizes <= one.values[1])]] = True
        elif one.op == "in":
            self._mark_equal(one, found)
        elif one.op == "contains":
            self._mark_contains(one, found)
        elif one.op in RANGES and not isinstance(one.values[0], (str, Instant)):
            compare, bound = RANGES[one.op], one.values[0]
            self._mark(found, "number", self._in_range(compare, bound))
            test = element_test(one, False)
            found[[row for row, value in self.big if test(value)]] = True
        else:
            self._mark(found, "text", self._texts_that(one)[self.codes])
        return found

    def order_keys(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """What sorts the rows: the kind of the value (0 null or missing, 1 false, 2 true, 3 number, 4 text, 5 list or
        object), int64 (n,), and the number, or the place of the text among the texts, float64 (n,).
        """
        kinds = np.where(self.missing | self.null, 0, 5)
        values = np.zeros(self.n)
        for kind, name in enumerate(("false", "true", "number", "text"), start=1):
            kinds[self.at[name]] = kind
        values[self.at["number"]] = self.numbers
        values[self.at["text"]] = self.codes
        for row, number in self.big:
            kinds[row], values[row] = 3, doubled(number)
        kinds[self.sizes[0]], values[self.sizes[0]] = 5, 0.0
        return kinds, values

    def by_row(self, *, moments: bool) -> npt.NDArray[np.float64]:
        """The number, or the Unix time of the text, of each row, float64 (n,); NaN where the value is no such one."""
        found = np.full(self.n, np.nan)
        if moments:
            micros = self._moments()
            known = micros[self.codes] != _NO_MOMENT
            found[self.at["text"][known]] = micros[self.codes[known]] / 1e6
        else:
            found[self.at["number"]] = self.numbers
            for row, number in self.big:
                found[row] = doubled(number)
        found[self.sizes[0]] = np.nan
        return found

    def counts(self, rows: BoolArray) -> dict[tuple[Json, ...], int]:
        """How many of the rows have each value: (kind as in :meth:`order_keys`, value) to the number."""
        found: dict[tuple[Json, ...], int] = {}
        for kind, name in enumerate(("null", "false", "true")):
            found[kind, 0] = len(np.unique(self.at[name][rows[self.at[name]]]))
        numbers = np.concatenate([self.numbers, [float(doubled(value)) for _, value in self.big]])
        numbered = np.concatenate([self.at["number"], np.array([row for row, _ in self.big], dtype=np.int32)])
        for kind, at, values in ((3, numbered, numbers), (4, self.at["text"], self.codes)):
            inside = rows[at]
            pairs = np.unique(np.stack([at[inside].astype(float), values[inside].astype(float)]), axis=1)
            each, many = np.unique(pairs[1], return_counts=True)
            names = each.tolist() if kind == 3 else [self.texts[int(code)] for code in each]
            found.update({(kind, name): count for name, count in zip(names, many.tolist(), strict=True)})
        return {key: count for key, count in found.items() if count}

    def _mark(self, found: BoolArray, kind: str, inside: BoolArray) -> None:
        """Set the rows of those values of a kind that are ``inside``."""
        rows = self.at[kind]
        if len(rows) == self.n and not len(self.sizes[0]):  # one value in every row
            found |= inside
        else:
            found[rows[inside]] = True

    def _in_range(self, compare: Callable[[Json, Json], Json], bound: float) -> BoolArray:
        if isinstance(bound, int) and abs(bound) > _EXACT:  # as a double it might be another number
            bound = np.inf if bound > 0 else -np.inf
        inside: BoolArray = compare(self.numbers, bound)
        return inside

    def _mark_equal(self, one: Condition, found: BoolArray) -> None:
        kinds: dict[str, list[Json]] = {}
        for value in one.values:
            kinds.setdefault(kind_of(value), []).append(value)
        for kind in kinds.keys() & {"null", "true", "false"}:
            found[self.at[kind]] = True
        small = [value for value in kinds.get("number", ()) if abs(value) < _EXACT]
        if small:
            equal = self.numbers == small[0] if len(small) == 1 else np.isin(self.numbers, np.array(small, dtype=float))
            self._mark(found, "number", equal)
        if len(small) < len(kinds.get("number", ())):
            test = element_test(one, False)
            found[[row for row, value in self.big if test(value)]] = True
        if "text" in kinds or "instant" in kinds:
            self._mark(found, "text", self._texts_that(one)[self.codes])

    def _mark_contains(self, one: Condition, found: BoolArray) -> None:
        self._mark_equal(Condition(one.path, "in", one.values, one.nfc), found)
        lists = np.zeros(self.n, dtype=np.bool_)
        lists[self.sizes[0]] = True
        found &= lists
        if isinstance(one.values[0], str):
            held = self.at["text"][self._texts_that(one)[self.codes]]
            found[held[~lists[held]]] = True

    def _texts_that(self, one: Condition) -> BoolArray:
        """The texts that meet a condition, as single values."""
        first = one.values[0]
        found = np.zeros(len(self.texts), dtype=np.bool_)
        if one.op in RANGES and isinstance(first, Instant):
            micros = self._moments()
            found = RANGES[one.op](micros, first.micros) & (micros != _NO_MOMENT)
        elif one.op in RANGES and (self.texts.composed or not one.nfc):
            low, high = bisect_left(self.texts, first), bisect_right(self.texts, first)
            starts, ends = {"gt": (high, None), "gte": (low, None), "lt": (0, low), "lte": (0, high)}[one.op]
            found[starts:ends] = True
        elif one.op == "in" and (self.texts.composed or not one.nfc):
            for value in one.values:
                if isinstance(value, Instant):
                    found |= self._moments() == value.micros
                elif isinstance(value, str):
                    at = bisect_left(self.texts, value)
                    if at < len(found) and self.texts[at] == value:
                        found[at] = True
        else:
            test = element_test(one, False)
            found = np.fromiter(map(test, self.texts), dtype=np.bool_, count=len(self.texts))
        return found

    def _moments(self) -> IntArray:
        """The texts as microseconds, computed when a filter first asks for moments."""
        if "micros" not in self.arrays:
            moments = (micros_of(text) for text in self.texts)
            found = np.array([_NO_MOMENT if one is None else one for one in moments], dtype=np.int64)
            self.nbytes += found.nbytes
            self.arrays["micros"] = found
        return self.arrays["micros"]
