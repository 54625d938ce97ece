"""Keyword search: BM25 over the FTS5 index and the pending rows, with selective terms only.

    score(doc) = sum over query tokens of idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len / avglen))
    idf = ln((N - n + 0.5) / (n + 0.5)), at least 1e-6;  k1 = 1.2, b = 0.75

Source: S. Robertson and H. Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009), with the constants
and the floor of idf that SQLite's FTS5 documents, so that folded and pending rows are scored alike.

FTS5 scores every row that holds any of the words, so a query of common words reads most of the index. Therefore only
the selective words of a query propose rows, and all of its words score what they propose.

A word that is in more than 5 % of the rows is not looked up unless nothing else is left, and neither are the more
frequent of the others once the rarer ones match enough rows. So the rows that a query reads are bounded and do not grow
with the store.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import apsw
import numpy as np

from ..types import IntArray, MemoryUnit
from .connections import all_rows, first_row
from .damage import read_unit
from .filter_sql import intersection, slot_list, slots_read, where
from .filters import Filter
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

    pending: words of rows that are not folded yet, by slot; rows never change their text. counts: for a word, how many
    folded rows of the default namespace hold it, and of how many folded rows that was said. lengths: for another
    namespace, its folded rows and how many words they had.
    """

    pending: dict[int, Counter[str]] = field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    lengths: dict[int, tuple[int, int]] = field(default_factory=dict)


def doc_frequencies(con: apsw.Connection, words: Sequence[str], cache: WordCache) -> dict[str, int]:
    """For each word the number of folded rows that hold it, or held it a little while ago."""
    folded = _folded_rows(con)
    if len(cache.counts) > _MOST_WORDS:
        cache.counts = {}
    found = {}
    for word in words:
        count, of = cache.counts.get(word, (0, -1))
        if of < 0 or abs(folded - of) > (_AGE * of if of >= _EXACT_ROWS else 0):
            count = int(first_row(con, "SELECT count(*) FROM words WHERE words MATCH ?", (_MATCH([word]),))[0])
            cache.counts[word] = count, folded
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


def _folded_rows(con: apsw.Connection) -> int:
    count, pending = all_rows(con, f"{_ROWS}, (SELECT count(*) FROM pending WHERE ns = 0) FROM counters")[0]
    return int(count) - int(pending)


_ROWS = "SELECT count - others"
_MATCH = KeywordQuery().match


K1, B, LEAST_IDF = 1.2, 0.75, 1e-6

MOST_READ = 20_000
"""Most rows that the words of a query match together in a search with a filter."""

PROPOSED, PROPOSED_FACTOR = 64, 2
"""Rows that the selective words propose: this many, and at least so many times the limit. On 39,320 real units 64 of
them hold the wanted unit as often as 200 do."""


def _corpus_size(api: apsw.FTS5ExtensionApi, /, *_: object) -> str:
    return f"{api.row_count} {api.column_total_size(0) + api.column_total_size(1)}"


def _tally(api: apsw.FTS5ExtensionApi, /, *_: object) -> str:
    """The words of the row, and how often it holds each phrase of the query."""
    found = [api.column_size(0) + api.column_size(1)]
    for phrase in range(api.phrase_count):
        columns = api.phrase_locations(phrase)
        found.append(len(columns[0]) + len(columns[1]))
    return " ".join(map(str, found))


class _Corpus(NamedTuple):
    rows: int
    tokens: int


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
    text_of: Callable[[MemoryUnit], str],
    ns: int = 0,
    now: float = 0.0,
    stemming: str = STEMMING,
    within: IntArray | None = None,
    relative: bool = False,
) -> list[tuple[float, str]]:
    """The best rows that hold a selective word of ``query``: (score, id), best first. Call inside a read transaction.

    text_of: the text of a unit that was given to the index. ns: key of the namespace, whose rows alone count. now: the
    Unix time at which expiry is judged. cache, stemming: of the index. within: the slots that match ``filters``,
    ascending; the words are then counted among them alone. relative: scores as shares, see :func:`full_score`.
    """
    if not query.weights or limit < 1:
        return []
    pending = _pending(con, query, filters, cache, ns, now, stemming)
    if within is not None:
        found, full = _narrowed(con, query, limit, filters, cache, pending, within, ns, now)
    elif ns != 0:
        found, full = _in_namespace(con, query, filters, cache, pending, ns, now)
    else:
        found, full = _in_default(con, query, limit, filters, cache, pending, text_of, now, stemming)
    found.sort(key=lambda pair: -pair[0])
    return [(min(1.0, score / full) if relative else score, unit_id) for score, unit_id in found[:limit]]


def _in_default(
    con: apsw.Connection,
    query: KeywordQuery,
    limit: int,
    filters: Filter,
    cache: WordCache,
    pending: list[_Doc],
    text_of: Callable[[MemoryUnit], str],
    now: float,
    stemming: str,
) -> tuple[list[tuple[float, str]], float]:
    """The best rows of the default namespace, in any order, and the score of a full match."""
    tokens = list(query.weights)
    folded = doc_frequencies(con, tokens, cache)
    counts = {token: folded[token] + sum(token in doc.counts for doc in pending) for token in tokens}
    units = int(first_row(con, f"{_ROWS} FROM counters")[0])
    words = selective_terms(units, query.proposing(counts))
    hits = [doc for doc in pending if doc.admitted and not doc.counts.keys().isdisjoint(words)]
    if query.plain and len(words) == len(tokens):
        found = _ranked(con, query.match(words), limit, filters, now)
    else:
        proposed = _ranked(con, query.match(words), max(PROPOSED, PROPOSED_FACTOR * limit), filters, now)
        hits += _read(con, query, [unit_id for _, unit_id in proposed], text_of, stemming)
        found = []
    if hits:
        corpus = _corpus(con, folded)
        rows = max(1, corpus.rows + len(pending))
        average = (corpus.tokens + sum(doc.length for doc in pending)) / rows
        score = bm25(rows, average, counts, query.weights)
        found += [(score(doc.counts, doc.length), doc.id) for doc in hits]
    return found, full_score(units, counts, query.weights)


def _narrowed(
    con: apsw.Connection,
    query: KeywordQuery,
    limit: int,
    filters: Filter,
    cache: WordCache,
    pending: list[_Doc],
    within: IntArray,
    ns: int,
    now: float,
) -> tuple[list[tuple[float, str]], float]:
    """The best rows among ``within``, in any order, and the score of a full match, as if there were no other rows.

    Only the mean length of a row is that of the namespace, and the most frequent words may be left out.
    """
    table, space = ("words", "") if ns == 0 else ("space_words", f'space : "n{ns}" AND ')
    hits = _hits(con, query, cache, within, table, space)
    counts = {word: len(held) + sum(word in doc.counts for doc in pending) for word, held in hits.items()}
    weights = {word: query.weights[word] for word in hits}
    proposing = query.proposing({**dict.fromkeys(query.weights, 0), **counts})
    words = [word for word in selective_terms(len(within), proposing) if word in hits]
    if query.demanding:
        admitted = _slots_of(con, table, f"{space}({query.match(words)})")
        hits = {word: intersection(held, admitted) for word, held in hits.items()}
    proposed = _proposed(hits, words, inverse_frequencies(len(within), counts, weights), limit)
    if ns == 0:
        corpus = _corpus(con, {word: cache.counts[word][0] for word in hits})
        average = corpus.tokens / max(1, corpus.rows)
    else:
        average = _size_of(con, ns, cache, pending)[1]
    score = bm25(max(1, len(within)), average, counts, weights)
    found = _tallied(con, list(hits), proposed, filters, table, space, now)
    held = [doc for doc in pending if doc.admitted and not doc.counts.keys().isdisjoint(words)]
    scored = [(score(numbers, length), unit_id) for unit_id, numbers, length in found]
    scored += [(score(doc.counts, doc.length), doc.id) for doc in held]
    return scored, full_score(len(within), counts, weights)


def _hits(
    con: apsw.Connection, query: KeywordQuery, cache: WordCache, within: IntArray, table: str, space: str
) -> dict[str, IntArray]:
    """The folded slots among ``within`` that hold each word, ascending; without the words that too many rows hold."""
    held = dict.fromkeys(query.weights, 0) if space else doc_frequencies(con, list(query.weights), cache)
    read = 0
    hits: dict[str, IntArray] = {}
    for word in sorted(held, key=lambda one: (query.weights[one] < 1.0, held[one])):
        read += held[word]
        if not hits or read <= MOST_READ:
            hits[word] = intersection(within, _slots_of(con, table, space + _MATCH([word])))
    return hits


def _slots_of(con: apsw.Connection, table: str, match: str) -> IntArray:
    """The folded slots that match, ascending."""
    return slots_read(con, f"SELECT rowid AS slot FROM {table} WHERE {table} MATCH ?", (match,))


def _proposed(hits: Mapping[str, IntArray], words: Sequence[str], idf: Mapping[str, float], limit: int) -> IntArray:
    """The slots that hold the most telling of all words, of those that hold one of ``words``; ascending."""
    every = np.unique(np.concatenate([hits[word] for word in words])) if words else np.empty(0, dtype=np.int64)
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
    con: apsw.Connection,
    words: Sequence[str],
    proposed: IntArray,
    filters: Filter,
    table: str,
    space: str,
    now: float,
) -> list[tuple[str, dict[str, int], int]]:
    """The proposed rows that match: (id, how often each word occurs, length)."""
    if not len(proposed):
        return []
    subquery, listed = slot_list(proposed)
    bound: list[Any] = [f"{space}{_MATCH(words)}", now, listed]
    rows = all_rows(
        con,
        f"SELECT u.id, tally({table}) FROM {table} CROSS JOIN units AS u ON u.slot = {table}.rowid "
        f"WHERE {table} MATCH ?1 AND +{table}.rowid IN ({subquery.replace('?', '?3')}) "
        f"AND ifnull(u.expires_at > ?2, 1) AND {where(filters, bound)}",
        bound,
    )
    found = []
    for unit_id, tally in rows:
        length, *numbers = map(int, tally.split())
        found.append((unit_id, dict(zip(words, numbers[1:] if space else numbers, strict=False)), length))
    return found


def _in_namespace(
    con: apsw.Connection,
    query: KeywordQuery,
    filters: Filter,
    cache: WordCache,
    pending: list[_Doc],
    ns: int,
    now: float,
) -> tuple[list[tuple[float, str]], float]:
    """All rows of a namespace that hold a selective word, and the score of a full match. Its rows alone count."""
    space = f'space : "n{ns}"'
    sql = "SELECT count(*) FROM space_words WHERE space_words MATCH ?"
    counts = {
        token: int(first_row(con, sql, (f"{space} AND {_MATCH([token])}",))[0])
        + sum(token in doc.counts for doc in pending)
        for token in query.weights
    }
    rows, average = _size_of(con, ns, cache, pending)
    words = selective_terms(rows, query.proposing(counts))
    others = [token for token in query.weights if token not in words]
    # The second part is true wherever the third is: it lets the other words be counted there.
    asked = [*words, *others, *words] if others else words
    every = f" AND {_MATCH([*words, *others])}" if others else ""
    bound: list[Any] = [f"{space}{every} AND ({query.match(words)})", now]
    found = all_rows(
        con,
        "SELECT u.slot, u.id, tally(space_words) FROM space_words CROSS JOIN units AS u ON u.slot = space_words.rowid "
        f"WHERE space_words MATCH ?1 AND ifnull(u.expires_at > ?2, 1) AND {where(filters, bound)}",
        bound,
    )
    score = bm25(max(1, rows), average, counts, query.weights)
    docs = []
    for slot, unit_id, tally in found:
        length, _, *numbers = map(int, tally.split())
        docs.append((slot, unit_id, dict(zip(asked, numbers, strict=False)), length))
    hits = (doc for doc in pending if doc.admitted and not doc.counts.keys().isdisjoint(words))
    docs += [(doc.slot, doc.id, doc.counts, doc.length) for doc in hits]
    docs.sort(key=lambda doc: doc[0])
    scored = [(score(held, length), unit_id) for _, unit_id, held, length in docs]
    return scored, full_score(rows, counts, query.weights)


def _size_of(con: apsw.Connection, ns: int, cache: WordCache, pending: list[_Doc]) -> tuple[int, float]:
    """The rows of a namespace, and how many words they have on average."""
    sql = "SELECT n.count - (SELECT count(*) FROM pending AS p WHERE p.ns = n.key) FROM namespaces AS n WHERE n.key = ?"
    held = all_rows(con, sql, (ns,))
    folded = int(held[0][0]) if held else 0
    of, words = cache.lengths.get(ns, (-1, 0))
    if of < 0 or abs(folded - of) > (_AGE * of if of >= _EXACT_ROWS else 0):
        sizes = all_rows(
            con,
            "SELECT d.sz FROM units AS u CROSS JOIN space_words_docsize AS d ON d.id = u.slot "
            f"WHERE u.ns = {ns} AND u.ns <> 0",
        )
        words = sum(_first_varints(sz) for (sz,) in sizes)
        if len(cache.lengths) > _MOST_WORDS:
            cache.lengths = {}
        cache.lengths[ns] = folded, words
    rows = folded + len(pending)
    return rows, (words + sum(doc.length for doc in pending)) / max(1, rows)


def _first_varints(raw: bytes) -> int:
    """The sum of the first two numbers in SQLite's encoding: seven bits a byte, high ones first."""
    values = [0]
    for byte in raw:
        values[-1] = values[-1] << 7 | byte & 0x7F
        if byte < 0x80:
            values.append(0)
    return sum(values[:2])


def _ranked(con: apsw.Connection, match: str, limit: int, filters: Filter, now: float) -> list[tuple[float, str]]:
    """The best folded rows of the default namespace that match."""
    bound: list[Any] = [match, limit, now]
    sql = (
        "SELECT -words.rank, u.id FROM words CROSS JOIN units AS u ON u.slot = words.rowid "
        f"WHERE words MATCH ?1 AND ifnull(u.expires_at > ?3, 1) AND {where(filters, bound)} "
        "ORDER BY words.rank LIMIT ?2"
    )
    return all_rows(con, sql, bound)


def _pending(
    con: apsw.Connection,
    query: KeywordQuery,
    filters: Filter,
    cache: WordCache,
    ns: int,
    now: float,
    stemming: str,
) -> list[_Doc]:
    """The rows of a namespace that are not folded yet; all of them count, those that the query admits are found."""
    bound: list[Any] = [ns, now]
    restriction = f"p.ns = ?1 AND ifnull(u.expires_at > ?2, 1) AND {where(filters, bound)}"
    sql = (
        "SELECT p.slot, u.id, CAST(p.text AS BLOB) FROM pending AS p CROSS JOIN units AS u ON u.slot = p.slot "
        f"WHERE {restriction}"
    )
    rows = all_rows(con, sql, bound)
    docs, kept = [], cache.pending
    for slot, unit_id, raw in rows:
        admitted = True
        if raw is None:
            raise apsw.CorruptError(f"the keyword text of slot {slot} is missing")
        if slot not in kept or query.demanding:
            words = words_of(raw.decode(errors="replace"), stemming)
            admitted = query.admits(words)
            kept[slot] = words.counts
        docs.append(_doc(query, slot, unit_id, kept[slot])._replace(admitted=admitted))
    return docs


def _doc(query: KeywordQuery, slot: int, unit_id: str, counts: Counter[str]) -> _Doc:
    return _Doc(slot, unit_id, with_prefixes(counts, query.prefixes), counts.total())


def _read(
    con: apsw.Connection,
    query: KeywordQuery,
    ids: list[str],
    text_of: Callable[[MemoryUnit], str],
    stemming: str,
) -> list[_Doc]:
    """Folded rows with the words of their texts."""
    sql = "SELECT slot, id, CAST(unit AS BLOB) FROM units WHERE ns = 0 AND id IN (SELECT value FROM json_each(?))"
    rows = all_rows(con, sql, (json.dumps(ids),))
    return [
        _doc(query, slot, unit_id, words_of(text_of(read_unit(unit, unit_id)), stemming).counts)
        for slot, unit_id, unit in rows
    ]


def inverse_frequencies(documents: int, holding: Mapping[str, int], words: Mapping[str, float]) -> dict[str, float]:
    """The weight of each word of a query; arguments as for :func:`bm25`."""
    idf = {}
    for word, factor in words.items():
        n = min(max(1, holding[word]), documents)
        idf[word] = factor * max(LEAST_IDF, math.log(max(LEAST_IDF, documents - n + 0.5) / (n + 0.5)))
    return idf


def full_score(documents: int, holding: Mapping[str, int], words: Mapping[str, float]) -> float:
    """The score of a text of mean length that holds every word of a query once; arguments as for :func:`bm25`.

    Words that no document holds count too, and all together count as much as one word of one document at least, so a
    share of this says how much of the query a text holds, and is comparable between queries.
    """
    idf = inverse_frequencies(documents, {**holding, "": 1}, {**words, "": 1.0})
    rarest = idf.pop("")
    return max(sum(idf.values()), rarest)


def bm25(
    documents: int, average: float, holding: Mapping[str, int], words: Mapping[str, float]
) -> Callable[[Mapping[str, int], int], float]:
    """The function that scores a document, given how often it holds each word, and its length, for these query words.

    documents: their number; average: their mean length in words; holding: how many of them hold each word, which may
    be a little old; words: those of the query, with their weights.
    """
    norm, average = K1 * (1 - B), average or 1.0
    idf = inverse_frequencies(documents, holding, words)

    def score(counts: Mapping[str, int], length: int) -> float:
        base = norm + K1 * B * length / average
        return sum(weight * f * (K1 + 1) / (f + base) for word, weight in idf.items() if (f := counts.get(word, 0)))

    return score


def _corpus(con: apsw.Connection, folded: Mapping[str, int]) -> _Corpus:
    """Rows and tokens of the index, read off its rarest word; zeros when no folded row holds any of the words."""
    known = [word for word, count in folded.items() if count]
    word = _MATCH([min(known, key=lambda one: folded[one])]) if known else ""
    sizes = all_rows(con, "SELECT corpus_size(words) FROM words WHERE words MATCH ? LIMIT 1", (word,)) if word else []
    return _Corpus(*map(int, sizes[0][0].split())) if sizes else _Corpus(0, 0)
