"""Whether two texts say the same, judged by what differs between them.

An embedding puts a statement beside its opposite: "Always retry" and "Never retry" have a cosine of 0.98 with MiniLM.
So the cosine only proposes pairs. Here each text becomes a sequence of terms: values (numbers in base units, names,
versions, paths, flags, identifiers), negations, and stems with synonyms and fillers folded. Two texts say the same if
nothing is left over on either side and the order agrees. Everything unknown counts as a difference.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .meaning_words import (
    ANTONYMS,
    CASED,
    CURRENCIES,
    DIRECTIONS,
    FILLERS,
    MODALS,
    MONTHS,
    NEGATED,
    NEGATIONS,
    NUMBERS,
    OTHER_NEGATIONS,
    PHRASES,
    ROLES,
    SINGULAR,
    SYNONYMS,
    UNITS,
)

NOT = "\u00acnot"
"""The term of a negation."""

_LETTERS = r"(?:[^\W\d_](?:(?!\d)[\u0300-\u036f\u0900-\u0963\u0971-\u0dff\u0e31-\u0e4e])*)+"
"""Letters with the marks on them, which are no letters to ``re``."""

_TOKEN = re.compile(
    r"(?P<url>\w+://\S+|[\w.+-]+@[\w-]+\.[\w.]+)"
    r"|(?P<flag>(?<![\w-])--?[A-Za-z][\w-]*)"
    r"|(?P<path>(?<!\w)[~.]{0,2}/[\w./~*-]+|\w[\w.-]*(?:/[\w.*-]+)+)"
    r"|(?P<version>\bv?\d+(?:\.\d+){2,}[\w.-]*|\bv\d+(?:\.\d+)*\b)"
    r"|(?P<time>\b\d{1,2}:\d{2}(?::\d{2})?\b|\b\d{4}-\d{2}-\d{2}\b)"
    r"|(?P<phone>\b\d+(?:-\d+)+\b)"
    r"|(?P<code>[A-Za-z_]\w*\(\)|\b\w+(?:[._~]\w+)+\b|\b[A-Za-z]+\d[\w]*\b|\b[a-z]+[A-Z]\w*\b|\b\w+~\d+)"
    r"|(?P<number>(?:(?<![\w.)])-)?[$\u20ac\u00a3\u00a5]?\d+(?:[.,]\d+)*)"
    r"|(?P<symbol>[%\u20ac$\u00a3\u00a5])"
    r"|(?P<han>[\u3400-\u9fff\u3040-\u30ff]+)"
    rf"|(?P<word>{_LETTERS}(?:['\u2019-]{_LETTERS})*)"
    r"|(?P<not>(?<!\w)!(?=[\w(=]))"
    r"|(?P<other>[^\s.,;:!'\"`()\[\]{}\u2010-\u201f\u2026\u0964\u0965\u3000-\u3002-])"
)
_OWNER = re.compile(r"\b([^\W\d_]+)['\u2019]s\b|\bof (?:(?:the|a|an|our|my|your) )?([^\W\d_]+)", re.IGNORECASE)
_ENDS = ".,;:!?)]}'\"`"
_HAN_NUMBER = re.compile("[\u96f6\u4e00\u4e8c\u4e24\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341\u767e\u5343]+")
_ENDINGS = {"de": ("en", "e", "n"), "fr": ("ez", "er", "es", "s", "e"), "es": ("es", "as", "ar", "er", "a", "e")}
_VOWEL = re.compile("[aeiouy]")
_STRENGTH = {"value": 0, "not": 1, "direction": 2, "word": 3}

Kind = Literal["same", "conflict", "different"]


class Term(NamedTuple):
    """A term of a text. ``kind`` is ``value``, ``not``, ``direction`` or ``word``."""

    text: str
    kind: str


class Verdict(NamedTuple):
    """``same``, ``conflict`` (one statement with another value or sense) or ``different``, and why in words."""

    kind: Kind
    reason: str


@dataclass(frozen=True)
class Meaning:
    """What :func:`compare` looks at: the terms of a text in order, and the words that own another (x's, of x).

    roles: whether a pronoun among the fillers may have changed places with a name.
    """

    terms: tuple[Term, ...]
    bag: frozenset[tuple[Term, int]]
    owners: frozenset[str]
    roles: bool


def meaning_of(text: str) -> Meaning:
    """Return the terms of a text.

    Args:
        text: In any language; function words, inflections and synonyms are known of en, de, fr, es and zh, negations
            of some twenty more.

    Returns:
        The terms.
    """
    text = unicodedata.normalize("NFKC", text)
    tokens = _tokens(text)
    language = _language(tokens)
    terms = _dates_ordered(_terms(tokens, language))
    owned = _OWNER.findall(text) if language == "en" else ()
    owners = frozenset(_english((own or of).casefold()) for own, of in owned)
    pronouns = ROLES.get(language, frozenset())
    roles = any(token.text.casefold() in pronouns for token in tokens)
    if language == "zh":
        roles = any(pronoun in text for pronoun in pronouns)
    return Meaning(tuple(terms), frozenset(Counter(terms).items()), owners, roles)


def compare(a: Meaning, b: Meaning) -> Verdict:
    """Judge whether two texts say the same.

    Args:
        a: One text's meaning.
        b: The other's.

    Returns:
        The verdict. ``conflict`` if at most a third of the terms differ, or one statement is the other's negation.
    """
    if not a.terms or not b.terms:
        return Verdict("different", "no words")
    if a.bag == b.bag:
        if a.owners and b.owners and a.owners != b.owners:
            return Verdict("conflict", "order of the words")
        return _order(a.terms, b.terms, roles=a.roles or b.roles)
    left, right = Counter(a.terms), Counter(b.terms)
    only_a, only_b = list((left - right).elements()), list((right - left).elements())
    common = sum((left & right).values())
    reason = _difference(only_a, only_b)
    changed = max(len(only_a), len(only_b))
    sharp = any(term.kind != "word" or term.text in MODALS for term in (*only_a, *only_b)) or _antonyms(only_a, only_b)
    replaced = len(only_a) == len(only_b) == 1
    near = common >= changed and common > 0 and (sharp or replaced)
    return Verdict("conflict" if near else "different", reason)


def _difference(only_a: Sequence[Term], only_b: Sequence[Term]) -> str:
    """Name the most telling difference."""
    both = [*only_a, *only_b]
    kind = min((term.kind for term in both), key=_STRENGTH.__getitem__)
    opposite = _antonyms(only_a, only_b)
    name = "opposite" if opposite or kind == "not" else {"value": "value", "direction": "order", "word": "words"}[kind]
    sides = (" ".join(term.text.replace(NOT, "not") for term in side) or "nothing" for side in (only_a, only_b))
    return f"{name}: {' | '.join(sides)}"


def _antonyms(only_a: Sequence[Term], only_b: Sequence[Term]) -> bool:
    return any(
        frozenset((x.text, y.text)) in ANTONYMS
        or x.text in (f"un{y.text}", f"dis{y.text}")
        or y.text in (f"un{x.text}", f"dis{x.text}")
        for x in only_a
        for y in only_b
    )


# --- order ----------------------------------------------------------------------------------------------------------


def _order(a: Sequence[Term], b: Sequence[Term], roles: bool) -> Verdict:
    """The bags are equal: the order must agree, up to a moved clause or a moved word."""
    same = Verdict("same", "nothing differs")
    if a == b:
        return same
    if _after_directions(a) == _after_directions(b) and (
        _rotated(a, b) or (not roles and (_one_moved(a, b) or _blocks(a, b)))
    ):
        return same
    return Verdict("conflict", "order of the words")


def _after_directions(terms: Sequence[Term]) -> Counter[tuple[str, str]]:
    pairs = zip(terms, (*terms[1:], Term("", "")), strict=True)
    return Counter((one.text, after.text) for one, after in pairs if one.kind in ("direction", "not"))


def _rotated(a: Sequence[Term], b: Sequence[Term]) -> bool:
    """Whether a clause at the end stands at the start; a direction begins it."""
    return any(
        tuple(a[at:]) + tuple(a[:at]) == tuple(b)
        for at in range(1, len(a))
        if a[at].kind == "direction" or a[0].kind == "direction" or b[0].kind == "direction"
    )


def _one_moved(a: Sequence[Term], b: Sequence[Term]) -> bool:
    """Whether one word, no value or negation, stands elsewhere."""
    for at, term in enumerate(a):
        if term.kind != "word":
            continue
        rest = [*a[:at], *a[at + 1 :]]
        for to, other in enumerate(b):
            if other == term and rest == [*b[:to], *b[to + 1 :]]:
                return True
    return False


def _blocks(a: Sequence[Term], b: Sequence[Term]) -> bool:
    """Whether two runs changed places and the values among themselves kept their order."""
    values_a, values_b = ([term for term in side if term.kind != "word"] for side in (a, b))
    if not values_a or (len(values_a) > 1 and values_a != values_b):
        return False
    start = next(at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    end = next(at for at, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=True)) if x != y)
    x, y = tuple(a[start : len(a) - end]), tuple(b[start : len(b) - end])
    return any(x[at:] + x[:at] == y for at in range(1, len(x)))


# --- terms ----------------------------------------------------------------------------------------------------------


class _Token(NamedTuple):
    text: str
    kind: str
    first: bool


def _tokens(text: str) -> list[_Token]:
    found: list[_Token] = []
    first = True
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        value = match.group()
        if kind in ("url", "path", "code", "version"):
            value = value.rstrip(_ENDS) + ("()" if value.endswith("()") else "")
        gap = text[: match.start()].rstrip(" \"'`([")[-1:]
        first = not found or gap in (".", "!", "?", ":", "\n")
        found.append(_Token(value, kind, first))
    return found


def _dates_ordered(terms: list[Term]) -> list[Term]:
    """Put the day before the month: "May 3" is "3 May"."""
    for at in range(len(terms) - 1):
        if terms[at].text.startswith("month") and terms[at].kind == "value" and terms[at + 1].text.startswith("#"):
            terms[at], terms[at + 1] = terms[at + 1], terms[at]
    return terms


def _language(tokens: Sequence[_Token]) -> str:
    """The language whose function words are most frequent; English if none is."""
    if any(token.kind == "han" for token in tokens):
        return "zh"
    words = [token.text.casefold().replace("\u2019", "'") for token in tokens if token.kind == "word"]
    known = {
        code: (FILLERS[code], NEGATIONS[code], DIRECTIONS[code], NUMBERS[code]) for code in FILLERS if code != "zh"
    }
    hits = {code: sum(any(word in table for table in tables) for word in words) for code, tables in known.items()}
    best = max(hits, key=lambda code: (hits[code], code == "en"))
    return best if hits[best] else "en"


def _terms(tokens: Sequence[_Token], language: str) -> list[Term]:
    if language == "zh":
        return _chinese(tokens)
    words = _phrased([_folded(token, language) for token in tokens], language)
    found: list[Term] = []
    for at, word in enumerate(words):
        if language == "en" and any(one.text == "be" for one in words[max(0, at - 2) : at]):
            _add(found, _Word(_base_of(word.text), word.kind), language)  # "should be enabled" asks for "enable"
        else:
            _add(found, word, language)
    return found


class _Word(NamedTuple):
    text: str
    kind: str


def _folded(token: _Token, language: str) -> _Word:
    """Names keep their capitals; other words lose them."""
    text, kind = token.text, token.kind
    if kind != "word":
        return _Word(text, kind)
    bare = re.sub(r"['\u2019]s$", "", text) if language == "en" else text
    if bare in CASED:
        return _Word(CASED[bare], "word")
    capital = bare[:1].isupper() and (not token.first or (bare[1:].isupper() and len(bare) > 1))
    if capital and bare in ("May", "March"):
        return _Word({"May": "mai", "March": "märz"}[bare], "word")
    if capital and language != "de":
        return _Word(bare.casefold(), "name")
    return _Word(bare.casefold(), "word")


def _phrased(words: list[_Word], language: str) -> list[_Word]:
    """Replace phrases of several words by one; longest first."""
    phrases = PHRASES.get(language, {})
    found: list[_Word] = []
    at = 0
    while at < len(words):
        for size in (4, 3, 2, 1):
            run = words[at : at + size]
            key = " ".join(word.text.replace("\u2019", "'") for word in run)
            if len(run) == size and key in phrases and all(word.kind in ("word", "name") for word in run):
                found += [_Word(part, "word") for part in phrases[key].split()]
                at += size
                break
        else:
            found.append(words[at])
            at += 1
    return found


def _add(found: list[Term], word: _Word, language: str) -> None:
    text, kind = word.text, word.kind
    if kind in ("word", "name"):
        text = text.replace("\u2019", "'")
        if language in ("fr", "it") and "'" in text:
            for part in text.split("'"):
                _add(found, _Word(part, "word"), language)
            return
        _add_word(found, text, language)
    elif kind in ("number", "symbol"):
        _add_number(found, text)
    else:
        found.append(Term(text.casefold().lstrip("v") if kind == "version" else text, "value"))


def _add_word(found: list[Term], text: str, language: str) -> None:
    if text in NEGATIONS[language] or text in OTHER_NEGATIONS or text.startswith(NEGATED):
        if not (language == "fr" and found and found[-1].text == NOT):
            found.append(Term(NOT, "not"))
    elif text in NUMBERS[language]:
        _number(found, NUMBERS[language][text], "")
    elif _unit(found, text):
        return
    elif text in MONTHS:
        found.append(Term(MONTHS[text], "value"))
    elif text in DIRECTIONS[language]:
        found.append(Term(DIRECTIONS[language][text], "direction"))
    elif text not in FILLERS[language]:
        stem = _stem(text, language)
        found.append(Term(SYNONYMS[language].get(text) or SYNONYMS[language].get(stem) or stem, "word"))


def _unit(found: list[Term], text: str) -> bool:
    """Join a unit to the number before it; whether it was one."""
    if text not in UNITS or not found or not found[-1].text.startswith("#") or " " in found[-1].text:
        return False
    factor, base = UNITS[text]
    value = float(found.pop().text[1:])
    _number(found, value * factor, base)
    return True


def _add_number(found: list[Term], text: str) -> None:
    if text in CURRENCIES:
        if not _unit(found, text):
            found.append(Term(text, "value"))
        return
    sign = "-" if text[0] == "-" else ""
    currency = text[len(sign)] if text[len(sign)] in CURRENCIES else ""
    digits = text[len(sign) + len(currency) :]
    if re.fullmatch(r"\d{1,3}(,\d{3})+", digits):
        digits = digits.replace(",", "")
    digits = digits.replace(",", ".")
    if digits.count(".") > 1:
        found.append(Term(text, "value"))
        return
    _number(found, float(sign + digits), "", exact=sign + digits)
    if currency:
        _unit(found, currency)


def _number(found: list[Term], value: float, base: str, exact: str = "") -> None:
    shown = exact if "." in exact else f"{value:.12g}"
    found.append(Term(f"#{shown} {base}" if base else f"#{shown}", "value"))


def _chinese(tokens: Sequence[_Token]) -> list[Term]:
    found: list[Term] = []
    for token in tokens:
        if token.kind == "han":
            _chinese_run(found, token.text)
        else:
            _add(found, _folded(token, "en"), "en")
    return found


def _chinese_run(found: list[Term], text: str) -> None:
    """Terms by longest match in the word lists; other characters are terms of one character."""
    tables: list[tuple[Container[str], Callable[[str], None]]] = [
        (NEGATIONS["zh"], lambda _: found.append(Term(NOT, "not"))),
        (DIRECTIONS["zh"], lambda word: found.append(Term(DIRECTIONS["zh"][word], "direction"))),
        (SYNONYMS["zh"], lambda word: found.extend([Term(SYNONYMS["zh"][word], "word")][: len(SYNONYMS["zh"][word])])),
        (FILLERS["zh"], lambda _: None),
    ]
    at = 0
    while at < len(text):
        number = _HAN_NUMBER.match(text, at)
        if number:
            _number(found, _chinese_number(number.group()), "")
            at = number.end()
            continue
        for size in (4, 3, 2, 1):
            word = text[at : at + size]
            if len(word) == size and _unit(found, word):
                break
            known = next((act for table, act in tables if word in table), None)
            if len(word) == size and known is not None:
                known(word)
                break
        else:
            found.append(Term(text[at], "word"))
            size = 1
        at += size


def _chinese_number(text: str) -> float:
    total, digit = 0, 0
    for sign in text:
        scale = {"\u5341": 10, "\u767e": 100, "\u5343": 1000}.get(sign)
        if scale:
            total, digit = total + (digit or 1) * scale, 0
        else:
            digit = int(NUMBERS["zh"][sign])
    return float(total + digit)


def _stem(word: str, language: str) -> str:
    """Drop endings that do not change what is said: plural and -ing, but not the past tense."""
    if language == "en":
        return _english(word)
    for ending in _ENDINGS[language]:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def _base_of(participle: str) -> str:
    if not participle.endswith("ed") or len(participle) < 5:
        return participle
    stem = participle[:-2]
    if stem.endswith("i"):
        return stem[:-1] + "y"
    return stem[:-1] if stem[-1] == stem[-2] and stem[-1] not in "lsz" else stem


def _english(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("ing") and len(word) > 5:
        stem = word[:-3] if _VOWEL.search(word[:-3]) else word
        doubled = len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "lsz"
        return (stem[:-1] if doubled else stem).rstrip("e")
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    plural = word.endswith("s") and not word.endswith(("ss", "us", "is")) and word not in SINGULAR
    if plural and len(word) > 3 and _VOWEL.search(word):  # https is not a number of http
        word = word[:-1]
    return word.rstrip("e") if len(word) > 3 else word
