"""Keyword search: BM25 over the FTS5 index and the few rows that are not folded into it yet.

    score(doc) = sum over query tokens of idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len / avglen))
    idf = ln((N - n + 0.5) / (n + 0.5)), at least 1e-6;  k1 = 1.2, b = 0.75

Source: S. Robertson and H. Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009), with the constants
and the floor of idf that SQLite's FTS5 documents, so that folded and pending rows are scored alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import apsw

from .filter_sql import where
from .filters import Condition
from .sql import all_rows

__all__ = ["TokenCache", "keyword", "register"]

K1, B, LEAST_IDF = 1.2, 0.75, 1e-6


def _corpus_size(api: apsw.FTS5ExtensionApi, /, *_: object) -> str:
    return f"{api.row_count} {api.column_total_size(0)}"


class _Corpus(NamedTuple):
    rows: int
    tokens: int


class _Doc(NamedTuple):
    slot: int
    id: str
    counts: Counter[str]


TokenCache = dict[int, Counter[str]]
"""Tokens of pending rows by slot, so that each is read once. Rows never change their text."""


def register(con: apsw.Connection) -> None:
    """Make the size of the index readable in SQL. Every connection that calls :func:`keyword` needs it."""
    all_rows(con, "SELECT 1 FROM sqlite_schema")  # a full disk says so here; the next call would only miss FTS5
    con.register_fts5_function("corpus_size", _corpus_size)


def keyword(
    con: apsw.Connection, text: str, limit: int, conditions: Sequence[Condition], cache: TokenCache
) -> list[tuple[float, str]]:
    """The best rows that hold any token of ``text``: (score, id), best first. Call inside a read transaction."""
    tokens = list(dict.fromkeys(_tokens(con, text)))
    if not tokens or limit < 1:
        return []
    bound: list[Any] = [_query(tokens), limit]
    sql = (
        "SELECT -words.rank, u.id FROM words CROSS JOIN units AS u ON u.slot = words.rowid "
        f"WHERE words MATCH ?1 AND {where(conditions, bound)} ORDER BY words.rank LIMIT ?2"
    )
    found = all_rows(con, sql, bound)
    found += _pending(con, tokens, conditions, cache)
    found.sort(key=lambda pair: -pair[0])
    return found[:limit]


def _pending(
    con: apsw.Connection, tokens: list[str], conditions: Sequence[Condition], cache: TokenCache
) -> list[tuple[float, str]]:
    bound: list[Any] = []
    restriction = where(conditions, bound)
    sql = f"SELECT p.slot, u.id, p.text FROM pending AS p CROSS JOIN units AS u ON u.slot = p.slot WHERE {restriction}"
    rows = all_rows(con, sql, bound)
    docs = [_Doc(slot, unit_id, _counts(con, slot, text, cache)) for slot, unit_id, text in rows]
    hits = [doc for doc in docs if not doc.counts.keys().isdisjoint(tokens)]
    if not hits:
        return []
    score = _Scorer(con, tokens, docs)
    return [(score(doc.counts), doc.id) for doc in hits]


class _Scorer:
    """BM25 of a pending row among the folded and the pending ones."""

    def __init__(self, con: apsw.Connection, tokens: list[str], docs: list[_Doc]) -> None:
        corpus = _corpus(con, tokens)
        rows = corpus.rows + len(docs)
        self._average = (corpus.tokens + sum(doc.counts.total() for doc in docs)) / rows or 1.0
        self._idf = {}
        for token in tokens:
            holding = sum(token in doc.counts for doc in docs)
            if holding:
                holding += all_rows(con, "SELECT count(*) FROM words WHERE words MATCH ?", (_query([token]),))[0][0]
                self._idf[token] = max(LEAST_IDF, math.log((rows - holding + 0.5) / (holding + 0.5)))

    def __call__(self, counts: Counter[str]) -> float:
        norm = K1 * (1 - B + B * counts.total() / self._average)
        return sum(idf * counts[token] * (K1 + 1) / (counts[token] + norm) for token, idf in self._idf.items())


def _corpus(con: apsw.Connection, tokens: list[str]) -> _Corpus:
    """Rows and tokens of the index; zeros when no folded row holds any of the tokens."""
    sizes = all_rows(con, "SELECT corpus_size(words) FROM words WHERE words MATCH ? LIMIT 1", (_query(tokens),))
    return _Corpus(*map(int, sizes[0][0].split())) if sizes else _Corpus(0, 0)


def _query(tokens: list[str]) -> str:
    return " OR ".join('"' + token.replace('"', '""') + '"' for token in tokens)


def _counts(con: apsw.Connection, slot: int, text: str, cache: TokenCache) -> Counter[str]:
    counts = cache.get(slot)
    if counts is None:
        counts = cache[slot] = Counter(_tokens(con, text))
    return counts


def _tokens(con: apsw.Connection, text: str) -> list[str]:
    tokenizer: Any = con.fts5_tokenizer("unicode61", ["remove_diacritics", "2"])
    found: list[str] = tokenizer(
        text.encode(errors="replace"),
        apsw.FTS5_TOKENIZE_DOCUMENT,
        None,
        include_offsets=False,
        include_colocated=False,
    )
    return found
