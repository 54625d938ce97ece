"""How many rows hold a word, and which words of a query are worth looking up.

A word in every twentieth row costs much and tells little, so it is dropped from the lookup unless nothing else is left;
and so are the more frequent of the rest once the rarer ones match enough rows. What a query reads is thereby bounded,
and does not grow with the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import apsw

from .sql import all_rows, first_row

__all__ = ["FREQUENT_ROWS", "FREQUENT_SHARE", "MOST_ROWS", "WordCache", "holding", "quoted", "telling"]

FREQUENT_SHARE = 0.05
FREQUENT_ROWS = 500
"""A word is frequent when it is in more than this share of the units, and in more than this many."""

MOST_ROWS = 3000
"""Rows that the telling words of a query match in all, at most, but for a single word. Scoring one takes 2 us."""

_AGE = 0.05
_EXACT_ROWS = 1000
"""A count is taken anew when the number of units has changed by this share; below so many units, by any change."""

_MOST_WORDS = 20_000


@dataclass
class WordCache:
    """What keyword queries need not read twice.

    pending: words of rows that are not folded yet, by slot; rows never change their text. counts: for a word, how many
    folded rows hold it, and of how many folded rows that was said.
    """

    pending: dict[int, Counter[str]] = field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)


def holding(con: apsw.Connection, words: Sequence[str], cache: WordCache) -> dict[str, int]:
    """For each word the number of folded rows that hold it, or held it a little while ago."""
    folded = _folded_rows(con)
    if len(cache.counts) > _MOST_WORDS:
        cache.counts = {}
    found = {}
    for word in words:
        count, of = cache.counts.get(word, (0, -1))
        if of < 0 or abs(folded - of) > (_AGE * of if of >= _EXACT_ROWS else 0):
            count = int(first_row(con, "SELECT count(*) FROM words WHERE words MATCH ?", (quoted(word),))[0])
            cache.counts[word] = count, folded
        found[word] = count
    return found


def telling(con: apsw.Connection, counts: Mapping[str, int]) -> list[str]:
    """The words to look up, rarest first; counts: how many rows hold each word of the query."""
    units = int(first_row(con, "SELECT count FROM counters")[0])
    frequent = max(FREQUENT_ROWS, FREQUENT_SHARE * units)
    chosen: list[str] = []
    rows = 0
    for word in sorted(counts, key=lambda one: counts[one]):
        rows += counts[word]
        if chosen and counts[chosen[-1]] and (counts[word] > frequent or rows > MOST_ROWS):
            break
        chosen.append(word)
    return chosen


def quoted(word: str) -> str:
    """The word as FTS5 takes it literally."""
    return '"' + word.replace('"', '""') + '"'


def _folded_rows(con: apsw.Connection) -> int:
    count, pending = all_rows(con, "SELECT count, (SELECT count(*) FROM pending) FROM counters")[0]
    return int(count) - int(pending)
