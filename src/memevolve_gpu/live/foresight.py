"""Fields that are read into columns before a filter names them: those of past filters, and the usual ones of units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from ..records.records import Records
from ..types import IntArray
from .column_file import FieldPath
from .field_columns import MOST_COLUMNS, Column, FieldColumns, Log, in_order_of
from .field_values import FieldReader

MOST_FORESEEN, SAMPLED, DEPTH = 12, 64, 3
"""Fields that are read before a filter names them; units that say which there are, and how deep their fields lie."""

FORESEEN_GROWTH = 1.25
"""Growth of the store after which fields are read again."""

PAGE_SLOTS, PASS_VALUES = 2_048, 1_200_000
"""Slots of one page of that reading; values of one pass, which are in memory before they become a column."""

FORESEEN_TEXTS, FORESEEN_BYTES = 200_000, 48 << 20
"""A field with more different texts is read when a filter names it; columns in memory before they are in the file."""


class Foresight:
    """Reads fields of one store for its columns; filters go on meanwhile."""

    def __init__(self, columns: FieldColumns, records: Records) -> None:
        self._columns, self._records = columns, records
        self._epoch, self._rows = -1, 0
        """The columns for which fields were last read, and their rows then."""

    def is_due(self, count: int, growth: float = FORESEEN_GROWTH) -> bool:
        """Whether fields should be read: a filter had to wait for one, or the store is large.

        count: the units of the store; growth: since they were read.
        """
        known = self._epoch == self._columns.epoch
        wanted = self._columns.wants_foresight and not known
        return wanted or (self._columns.are_saved(count) and not (known and count < growth * self._rows))

    def read(
        self,
        log: Callable[[], Log],
        recalled: Mapping[FieldPath, bool],
        pause: Callable[[], None] = lambda: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read the recalled and the usual short fields of the units.

        Args:
            log: gives the state to follow.
            recalled: fields that were named before; True for those that hold moments.
            pause: called between pieces of a millisecond.
            stop: whether to give up.
        """
        columns, records = self._columns, self._records
        seq, slots, epoch = columns.state(log())
        columns.wants_foresight, self._epoch, self._rows = False, epoch, len(slots)
        paths = dict.fromkeys([*recalled, *self._usual_fields(slots)])
        lacking = [path for path in paths if not columns.holds([path]) and records.field_is_short(path)]
        lacking = lacking[: MOST_COLUMNS - len(columns)]
        at_once, made = max(1, PASS_VALUES // max(1, len(slots))), dict[FieldPath, Column]()
        for start in range(0, len(lacking), at_once):
            if sum(one.nbytes for one in made.values()) < FORESEEN_BYTES:
                made |= self._gathered(lacking[start : start + at_once], slots, recalled, pause, stop)
        for path, column in made.items():
            if recalled.get(path):
                column.read.by_row(moments=True)  # converts them now
        if made:
            columns.adopt(made, (seq, epoch), log())

    def _usual_fields(self, slots: IntArray) -> list[FieldPath]:
        """The paths of the values and lists of the newest units, most frequent first; without the id and the texts."""
        newest = self._records.units_at(slots[-SAMPLED:]).values()
        counts = Counter(path for unit in newest for path in _paths_in(unit))
        for path in (("id",), ("content",), ("reasoning",), ("query",)):
            counts.pop(path, None)
        return [path for path, _ in counts.most_common(MOST_FORESEEN)]

    def _gathered(
        self,
        paths: list[FieldPath],
        slots: IntArray,
        recalled: Mapping[FieldPath, bool],
        pause: Callable[[], None],
        stop: Callable[[], bool],
    ) -> dict[FieldPath, Column]:
        """The columns of several fields for these slots, read in one pass; none where that was stopped.

        Without fields of very many texts, unless they are recalled.
        """
        readers = {path: FieldReader() for path in paths}
        for start in range(0, len(slots), PAGE_SLOTS):
            page = slots[start : start + PAGE_SLOTS]
            if stop() or not readers:
                return {}
            found, fields = self._records.field_values(list(readers), within=(int(page[0]), int(page[-1])))
            for path, values in zip(list(readers), fields, strict=True):
                readers[path].add(in_order_of(page, found, values))
                if readers[path].distinct_texts > FORESEEN_TEXTS and path not in recalled:
                    del readers[path]
                pause()
        return {path: Column(reader.finished(), {}) for path, reader in readers.items()}


def _paths_in(value: Mapping[str, object], above: FieldPath = ()) -> Iterator[FieldPath]:
    for key, held in value.items():
        path = (*above, key)
        if not isinstance(held, dict):
            yield path
        elif len(path) < DEPTH:
            yield from _paths_in(held, path)
