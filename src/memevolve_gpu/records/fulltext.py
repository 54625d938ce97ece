"""Keyword search: BM25 over the FTS5 index and the pending rows, with selective terms only.

    score(doc) = sum over query tokens of idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len / avglen))
    idf = ln((N - n + 0.5) / (n + 0.5)), at least 1e-6;  k1 = 1.2, b = 0.75

Source: S. Robertson and H. Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009), with the constants
and the floor of idf that SQLite's FTS5 documents, so that folded and pending rows are scored alike.

FTS5 scores every row that holds any of the words, so a query of common words reads most of the index. Therefore only
the selective words of a query propose rows: those in at most 5 % of the rows, the rarest ones until they match enough
of them. The slots of the other words are read while they are few, and choose among the proposed rows those that are
scored, by all words. So the rows that a query reads are bounded and do not grow with the store.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import apsw
import numpy as np

from ..types import IntArray
from .connections import all_rows, first_row
from .damage import read_unit
from .filter_sql import intersection, matching, slot_list, slots_read, where
from .filters import Filter
from .fulltext_buffer import TextOf
from .keyword_query import KeywordQuery, with_prefixes
from .tokenizer import STEMMING, words_of

FREQUENT_SHARE = 0.05
FREQUENT_ROWS = 500
"""A word is frequent when it is in more than this share of the units, and in more than this many."""

MOST_ROWS = 3000
"""Most rows that several selective words of a query match together. Scoring one takes 2 us."""

_AGE = 0.05
_EXACT_ROWS = 1000
"""A word is counted again when the number of units has changed by this share; below so many units, by any change."""

_MOST_WORDS = 20_000


@dataclass
class WordCache:
    """What keyword queries keep between calls.

    pending: words of rows that are not folded yet, by slot; rows never change their text. counts: for a namespace and a
    word, how many folded rows hold it, and of how many folded rows that was said. lengths: for another namespace than
    the default one, its folded rows and how many words they had.
    """

    pending: dict[int, Counter[str]] = field(default_factory=dict)
    counts: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    lengths: dict[int, tuple[int, int]] = field(default_factory=dict)


class _Space(NamedTuple):
    """A namespace: its key, the index that holds it, what limits a query of that index to it, and its folded rows."""

    key: int
    table: str
    limits: str
    folded: int

    def slots(self, con: apsw.Connection, match: str) -> IntArray:
        """The folded slots that match, ascending."""
        sql = f"SELECT rowid AS slot FROM {self.table} WHERE {self.table} MATCH ?"
        return slots_read(con, sql, (f"{self.limits}({match})",))


def _space(con: apsw.Connection, ns: int) -> _Space:
    lacking = f"(SELECT count(*) FROM units AS u WHERE u.slot > folded AND +u.ns = {int(ns)})"
    if ns == 0:
        sql = f"SELECT count - others - {lacking} FROM counters"
        return _Space(0, "words", "", int(first_row(con, sql)[0]))
    sql = f"SELECT n.count - {lacking} FROM namespaces AS n, counters WHERE n.key = ?"
    held = all_rows(con, sql, (ns,))
    return _Space(ns, "space_words", f'space : "n{ns}" AND ', int(held[0][0]) if held else 0)


def _is_old(rows: int, of: int) -> bool:
    return of < 0 or abs(rows - of) > (_AGE * of if of >= _EXACT_ROWS else 0)


def _frequencies(con: apsw.Connection, words: Iterable[str], cache: WordCache, space: _Space) -> dict[str, int]:
    """For each word the number of folded rows that hold it, or held it a little while ago."""
    if len(cache.counts) > _MOST_WORDS:
        cache.counts = {}
    sql = f"SELECT count(*) FROM {space.table} WHERE {space.table} MATCH ?"
    found = {}
    for word in words:
        count, of = cache.counts.get((space.key, word), (0, -1))
        if _is_old(space.folded, of):
            count = int(first_row(con, sql, (space.limits + _MATCH([word]),))[0])
            cache.counts[space.key, word] = count, space.folded
        found[word] = count
    return found


def selective_terms(units: int, counts: Mapping[str, int]) -> list[str]:
    """The words to look up, rarest first; counts: how many of the ``units`` hold each word of the query."""
    frequent = max(FREQUENT_ROWS, FREQUENT_SHARE * units)
    chosen: list[str] = []
    rows = 0
    for word in sorted(counts, key=lambda one: counts[one]):
        rows += counts[word]
        if chosen and counts[chosen[-1]] and (counts[word] > frequent or rows > MOST_ROWS):
            break
        chosen.append(word)
    return chosen


_MATCH = KeywordQuery().match


K1, B, LEAST_IDF = 1.2, 0.75, 1e-6

MOST_READ = 20_000
"""Most slots that are read for the words of a query, unless a single word has more."""

PROPOSED, PROPOSED_FACTOR = 64, 2
"""Rows that are scored: this many, and at least so many times the limit. On 39,320 real units 64 of them hold the
wanted unit as often as 256 do."""


def _corpus_size(api: apsw.FTS5ExtensionApi, /, *_: object) -> str:
    return f"{api.row_count} {api.column_total_size(0) + api.column_total_size(1)}"


def _tally(api: apsw.FTS5ExtensionApi, /, *_: object) -> str:
    """The words of the row, and how often it holds each phrase of the query."""
    found = [api.column_size(0) + api.column_size(1)]
    for phrase in range(api.phrase_count):
        columns = api.phrase_locations(phrase)
        found.append(len(columns[0]) + len(columns[1]))
    return " ".join(map(str, found))


class _Doc(NamedTuple):
    slot: int
    id: str
    counts: Counter[str]
    length: int
    admitted: bool = True


def register(con: apsw.Connection) -> None:
    """Make the size of the index readable in SQL. Every connection that calls :func:`keyword` needs it."""
    con.register_fts5_function("corpus_size", _corpus_size)
    con.register_fts5_function("tally", _tally)


def keyword(
    con: apsw.Connection,
    query: KeywordQuery,
    limit: int,
    filters: Filter,
    cache: WordCache,
    text_of: TextOf,
    ns: int = 0,
    now: float = 0.0,
    stemming: str = STEMMING,
    within: IntArray | None = None,
    relative: bool = False,
) -> list[tuple[float, str]]:
    """The best rows that hold a selective word of ``query``: (score, id), best first. Call inside a read transaction.

    text_of: the text of a unit. ns: key of the namespace, whose rows alone count. now: the Unix time at which expiry is
    judged. cache, stemming: of the index. within: the slots that match ``filters``, ascending, which are looked up if
    it is None; words are counted among them alone. relative: scores as shares, see :func:`full_score`.
    """
    if not query.weights or limit < 1:
        return []
    if within is None and filters.root.parts:
        within = matching(con, filters, None)
    space = _space(con, ns)
    pending = _pending(con, query, filters, cache, text_of, ns, now, stemming)
    folded = _frequencies(con, query.weights, cache, space)
    average = _average(con, space, folded, cache, pending)
    hits = _hits(con, query, folded, within, space)
    rows = space.folded + len(pending) if within is None else len(within)
    if within is not None:  # words that too many rows hold are as frequent there as elsewhere
        share = rows / max(1, space.folded)
        folded = {word: len(hits[word]) if word in hits else round(share * count) for word, count in folded.items()}
    counts = {word: count + sum(word in doc.counts for doc in pending) for word, count in folded.items()}
    words = [word for word in selective_terms(rows, query.proposing(counts)) if word in hits]
    idf = inverse_frequencies(rows, counts, query.weights)
    proposed = _proposed(con, query, hits, words, idf, limit, within, space, now)
    score = bm25(average, idf)
    found = [(score(held, length), name) for name, held, length in _tallied(con, query, words, proposed, space, now)]
    held = [doc for doc in pending if doc.admitted and not doc.counts.keys().isdisjoint(words)]
    found += [(score(doc.counts, doc.length), doc.id) for doc in held]
    found.sort(key=lambda pair: -pair[0])
    full = full_score(rows, idf)
    return [(min(1.0, score / full) if relative else score, unit_id) for score, unit_id in found[:limit]]


def _hits(
    con: apsw.Connection, query: KeywordQuery, folded: Mapping[str, int], within: IntArray | None, space: _Space
) -> dict[str, IntArray]:
    """The folded slots among ``within`` that hold each word, ascending; without the words that too many rows hold."""
    read = 0
    hits: dict[str, IntArray] = {}
    for word in sorted(query.weights, key=lambda one: (query.weights[one] < 1.0, folded[one])):
        if not read or read + folded[word] <= MOST_READ:
            read += folded[word]
            slots = space.slots(con, _MATCH([word])) if folded[word] else _NONE
            hits[word] = slots if within is None else intersection(within, slots)
    return hits


_NONE: IntArray = np.empty(0, dtype=np.int64)
_GONE = "SELECT slot FROM stale UNION SELECT slot FROM units WHERE expires_at IS NOT NULL AND expires_at <= ?"


def _proposed(
    con: apsw.Connection,
    query: KeywordQuery,
    hits: Mapping[str, IntArray],
    words: Sequence[str],
    idf: Mapping[str, float],
    limit: int,
    within: IntArray | None,
    space: _Space,
    now: float,
) -> IntArray:
    """The slots with the most telling words, of those that hold one of ``words`` and that the query admits."""
    every = np.unique(np.concatenate([hits[word] for word in words])) if words else _NONE
    if query.demanding and words:
        every = intersection(every, space.slots(con, query.match(words)))
    if within is None and len(every):
        every = every[~np.isin(every, slots_read(con, _GONE, (now,)))]
    most = max(PROPOSED, PROPOSED_FACTOR * limit)
    if len(every) <= most:
        return every
    sums = np.zeros(len(every))
    for word, held in hits.items():
        at = np.searchsorted(every, held)
        at = at[every[np.minimum(at, len(every) - 1)] == held]
        sums[at] += idf[word]
    return np.sort(every[np.argsort(-sums, kind="stable")[:most]])


def _tallied(
    con: apsw.Connection, query: KeywordQuery, words: Sequence[str], proposed: IntArray, space: _Space, now: float
) -> list[tuple[str, dict[str, int], int]]:
    """The proposed rows: (id, how often each word of the query occurs, length). All hold one of ``words``."""
    if not len(proposed):
        return []
    every = list(query.weights)
    subquery, listed = slot_list(proposed)
    rows = all_rows(
        con,
        f"SELECT u.id, tally({space.table}) FROM {space.table} CROSS JOIN units AS u ON u.slot = {space.table}.rowid "
        f"WHERE {space.table} MATCH ?1 AND +{space.table}.rowid IN ({subquery.replace('?', '?3')}) "
        "AND ifnull(u.expires_at > ?2, 1)",
        (f"{space.limits}({_MATCH(every)}) AND ({_MATCH(words)})", now, listed),
    )
    found = []
    for unit_id, tally in rows:
        length, *numbers = map(int, tally.split())
        found.append((unit_id, dict(zip(every, numbers[1:] if space.key else numbers, strict=False)), length))
    return found


def _average(
    con: apsw.Connection, space: _Space, folded: Mapping[str, int], cache: WordCache, pending: list[_Doc]
) -> float:
    """How many words the rows of a namespace have on average. folded: as :func:`_frequencies` gives it."""
    rows, words = _size_of(con, space, cache) if space.key else _whole_size(con, folded)
    return (words + sum(doc.length for doc in pending)) / max(1, rows + len(pending))


def _size_of(con: apsw.Connection, space: _Space, cache: WordCache) -> tuple[int, int]:
    """The folded rows of another namespace than the default one, and how many words they have."""
    of, words = cache.lengths.get(space.key, (-1, 0))
    if _is_old(space.folded, of):
        sizes = all_rows(
            con,
            "SELECT d.sz FROM units AS u CROSS JOIN space_words_docsize AS d ON d.id = u.slot "
            f"WHERE u.ns = {space.key} AND u.ns <> 0",
        )
        words = sum(_first_varints(sz) for (sz,) in sizes)
        if len(cache.lengths) > _MOST_WORDS:
            cache.lengths = {}
        cache.lengths[space.key] = space.folded, words
    return space.folded, words


def _first_varints(raw: bytes) -> int:
    """The sum of the first two numbers in SQLite's encoding: seven bits a byte, high ones first."""
    values = [0]
    for byte in raw:
        values[-1] = values[-1] << 7 | byte & 0x7F
        if byte < 0x80:
            values.append(0)
    return sum(values[:2])


def _pending(
    con: apsw.Connection,
    query: KeywordQuery,
    filters: Filter,
    cache: WordCache,
    text_of: TextOf,
    ns: int,
    now: float,
    stemming: str,
) -> list[_Doc]:
    """The rows of a namespace that are not folded yet; all of them count, those that the query admits are found."""
    bound: list[apsw.Binding] = [ns, now]
    sql = (
        "SELECT u.slot, u.id, CAST(u.unit AS BLOB) FROM units AS u WHERE u.slot > (SELECT folded FROM counters) "
        f"AND +u.ns = ?1 AND ifnull(u.expires_at > ?2, 1) AND {where(filters, bound)}"
    )
    rows = all_rows(con, sql, bound)
    docs, kept = [], cache.pending
    for slot, unit_id, raw in rows:
        admitted = True
        if slot not in kept or query.demanding:
            words = words_of(text_of(read_unit(raw, unit_id)), stemming)
            admitted = query.admits(words)
            kept[slot] = words.counts
        docs.append(_doc(query, slot, unit_id, kept[slot])._replace(admitted=admitted))
    return docs


def _doc(query: KeywordQuery, slot: int, unit_id: str, counts: Counter[str]) -> _Doc:
    return _Doc(slot, unit_id, with_prefixes(counts, query.prefixes), counts.total())


def inverse_frequencies(documents: int, holding: Mapping[str, int], words: Mapping[str, float]) -> dict[str, float]:
    """The weight of each word of a query; arguments as for :func:`bm25`."""
    idf = {}
    for word, factor in words.items():
        n = min(max(1, holding[word]), documents)
        idf[word] = factor * max(LEAST_IDF, math.log(max(LEAST_IDF, documents - n + 0.5) / (n + 0.5)))
    return idf


def full_score(documents: int, idf: Mapping[str, float]) -> float:
    """The score of a text of mean length that holds every word of a query once.

    Words that no document holds count too, and all together count as much as one word of one document at least, so a
    share of this says how much of the query a text holds, and is comparable between queries.
    """
    return max(sum(idf.values()), *inverse_frequencies(documents, {"": 1}, {"": 1.0}).values())


def bm25(average: float, idf: Mapping[str, float]) -> Callable[[Mapping[str, int], int], float]:
    """The function that scores a document, given how often it holds each word, and its length.

    average: mean length of the documents in words; idf: the :func:`inverse_frequencies` of the query.
    """
    norm, average = K1 * (1 - B), average or 1.0

    def score(counts: Mapping[str, int], length: int) -> float:
        base = norm + K1 * B * length / average
        return sum(weight * f * (K1 + 1) / (f + base) for word, weight in idf.items() if (f := counts.get(word, 0)))

    return score


def _whole_size(con: apsw.Connection, folded: Mapping[str, int]) -> tuple[int, int]:
    """Rows and words of the index of the default namespace, read off its rarest word; zeros when no row holds any."""
    known = [word for word, count in folded.items() if count]
    word = _MATCH([min(known, key=lambda one: folded[one])]) if known else ""
    sizes = all_rows(con, "SELECT corpus_size(words) FROM words WHERE words MATCH ? LIMIT 1", (word,)) if word else []
    rows, words = map(int, sizes[0][0].split()) if sizes else (0, 0)
    return rows, words
