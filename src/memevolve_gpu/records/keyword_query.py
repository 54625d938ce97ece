"""What a keyword query asks for: words, ``"exact words"``, ``beginnings*`` and ``-exclusions``.

Any text is a query. What is no operator is words, so brackets, ``AND`` and FTS5's own syntax mean nothing here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from .tokenizer import STEMMING, STOP_WORDS, Words, fold, is_spaceless, pieces_of, stemmer, terms_of, words_of

MOST_WORDS = 256
"""Distinct words of a query that are looked at."""

MOST_DEMANDS = 64
"""Phrases of a query that are looked at, and exclusions."""

STOP_WEIGHT = 0.1
"""Weight of a stop word in a query."""

FORM_WEIGHT = 0.3
"""Weight of the form in which a word is asked, beside its stem. Chosen on one half of two sets, held on four."""

_LEAST_PREFIX = 2

_PART = re.compile(r'(?<![A-Za-z0-9])(-?)"([^"]+)"|([^\s"]+)')
_FLAG = re.compile(r"-[^\W\d][\w-]*")


@dataclass(frozen=True, slots=True)
class Excluded:
    """Words in a row that no result holds, unless it holds ``flag``: ``-name`` finds the option of that name."""

    words: tuple[str, ...]
    flag: str | None = None


@dataclass(slots=True)
class KeywordQuery:
    """A query as it is looked up.

    weights: words to their weights; a word that ends in ``*`` is the beginning of one. phrases: words that are in each
    result in this order, one after the other. excluded: what is in none.
    """

    weights: dict[str, float] = field(default_factory=dict)
    phrases: list[tuple[str, ...]] = field(default_factory=list)
    excluded: list[Excluded] = field(default_factory=list)

    @property
    def demanding(self) -> bool:
        """Whether there are phrases or exclusions."""
        return bool(self.phrases or self.excluded)

    @property
    def prefixes(self) -> list[str]:
        """The words that are beginnings, without ``*``."""
        return [word[:-1] for word in self.weights if word[-1] == "*"]

    def proposing(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The words that find rows by themselves: stop words only where no row holds another one.

        counts: in how many rows each word is.
        """
        telling = {word: counts[word] for word, weight in self.weights.items() if weight == 1.0}
        return telling if any(telling.values()) else {word: counts[word] for word in self.weights}

    def match(self, words: Iterable[str]) -> str:
        """The FTS5 expression for the rows that hold any of ``words`` and all that the query demands."""
        demanded = [f"{{text more}} : ({' OR '.join(map(_literal, words))})"]
        demanded += [f'text : "{" ".join(phrase)}"' for phrase in self.phrases]
        found = " AND ".join(demanded)
        if self.excluded:
            found = f"({found}) NOT ({' OR '.join(map(_excluded, self.excluded))})"
        return found

    def admits(self, words: Words) -> bool:
        """Whether a text holds all phrases and nothing that is excluded."""
        if not self.demanding:
            return True
        text = f" {' '.join(words.text.split())} "
        if not all(f" {' '.join(phrase)} " in text for phrase in self.phrases):
            return False
        held = words.counts.keys()
        for one in self.excluded:
            row = f" {' '.join(one.words)}".removesuffix("*") + ("" if one.words[-1][-1] == "*" else " ")
            if (row in text if len(one.words) > 1 else _holds(held, one.words[0])) and one.flag not in held:
                return False
        return True


def parse_query(text: str, stemming: str = STEMMING) -> KeywordQuery:
    """Read a query. stemming: of the index.

    Examples:
        >>> parse_query('"exact words" fo* -not')
        KeywordQuery(weights={'exact': 1.0, 'word': 1.0, 'fo*': 1.0, '-not': 1.0}, phrases=[('exact', 'words')], \
excluded=[Excluded(words=('not',), flag='-not')])
    """
    query = KeywordQuery()
    for found in _PART.finditer(text):
        minus, quoted, bare = found.groups()
        if quoted is not None:
            _add_quoted(query, quoted, minus == "-", stemming)
        elif bare[0] == "-" and bare[1:2].isalpha():
            _add_excluded(query, bare, stemming)
        elif bare[-1] == "*" and bare[:-1]:
            _add_prefix(query, bare.rstrip("*"), stemming)
        else:
            _add_words(query, bare, stemming)
    query.weights = dict(islice(query.weights.items(), MOST_WORDS))
    query.phrases, query.excluded = query.phrases[:MOST_DEMANDS], query.excluded[:MOST_DEMANDS]
    return query


def _add_words(query: KeywordQuery, text: str, stemming: str) -> None:
    stem = stemmer(stemming)
    for piece in pieces_of(text) if len(query.weights) < MOST_WORDS else ():
        low = fold(piece).replace("'", "") in STOP_WORDS
        terms = terms_of(piece, stemming)
        for term in terms:
            query.weights.setdefault(term, STOP_WEIGHT if low else 1.0)
        for word in () if low else words_of(piece, stemming).text.split():
            if stem(word) in terms:
                query.weights.setdefault(word, FORM_WEIGHT)


def _add_quoted(query: KeywordQuery, text: str, excluded: bool, stemming: str) -> None:
    words = tuple(words_of(text, stemming).text.split()[:MOST_WORDS])
    if not words:
        return
    if not excluded:
        _add_words(query, text, stemming)
        query.phrases.append(words)
    else:
        query.excluded.append(Excluded(words))


def _add_excluded(query: KeywordQuery, bare: str, stemming: str) -> None:
    starts = bare[-1] == "*"
    words = words_of(bare[1:], stemming).text.split()
    if not words:
        return
    flag = fold(bare) if _FLAG.fullmatch(bare) else None
    if flag:
        query.weights.setdefault(flag, 1.0)
    if starts:
        words[-1] += "*"
    elif len(words) == 1:
        words = [stemmer(stemming)(words[0])]
    query.excluded.append(Excluded(tuple(words), flag))


def _add_prefix(query: KeywordQuery, bare: str, stemming: str) -> None:
    words = words_of(bare, stemming).text.split()
    if not words or len(words[-1]) < _LEAST_PREFIX or is_spaceless(pieces_of(bare)[-1]):
        _add_words(query, bare, stemming)
        return
    for word in words[:-1]:
        query.weights.setdefault(stemmer(stemming)(word), 1.0)
    query.weights.setdefault(words[-1] + "*", 1.0)


def _literal(word: str) -> str:
    return f'"{word[:-1]}" *' if word[-1] == "*" else f'"{word}"'


def _excluded(one: Excluded) -> str:
    row = _literal(" ".join(one.words))
    found = f"text : {row}" if len(one.words) > 1 else f"{{text more}} : {row}"
    return f'({found} NOT {{text more}} : "{one.flag}")' if one.flag else f"({found})"


def _holds(held: Iterable[str], word: str) -> bool:
    return any(one.startswith(word[:-1]) for one in held) if word[-1] == "*" else word in held


def with_prefixes(counts: Counter[str], prefixes: Iterable[str]) -> Counter[str]:
    """The counts, to which those of the beginnings are added as ``beginning*``."""
    added = {f"{one}*": sum(n for word, n in counts.items() if word.startswith(one)) for one in prefixes}
    return Counter({**counts, **{word: count for word, count in added.items() if count}}) if added else counts
