"""Words of a text for the keyword index, in every script.

:func:`words_of` gives two lists. ``text`` holds the words in their order, so that phrases and prefixes are exact:
``parseHTTPResponse`` is parse, http, response there, and a Chinese sentence its characters. ``more`` holds the other
forms under which the same words are found: the whole of a name of several parts, stems, and pairs of characters in
scripts that put no spaces between words.

The lists are made here and given to FTS5 joined by spaces, which its own ``ascii`` tokenizer takes apart again. See
``docs/decisions/0009-words-are-made-before-fts5.md`` for the reasons and the cost.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from ..errors import ConfigurationError

TOKENCHARS = "-_.+#/@"
"""What is in words beside letters, digits, marks and emoji."""

TOKENIZER = "words-1"
"""Name and version. Raise the number with every change of what a text is made of: stores are indexed again then."""

STEMMING = "light"
"""The stemming of a new store: plurals, ``-ing``, ``-ed`` and the final ``-e`` of English words."""

MOST_CHARS = 128
"""A longer name is cut into pieces of this length."""

_DATA_CHARS = 40
"""A longer word is not taken apart by its capitals: it is no name but data."""

_CACHED = 65_536
"""Most pieces whose words are kept: about 25 MB where all are different."""

_NAME = r"\w.+#/@'\-"
_ASCII_NAMES = re.compile(rf"[{_NAME}]{{1,{MOST_CHARS}}}", re.ASCII)

_SPACELESS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u3096\u3099-\u309f\u30a1-\u30ff\u3105-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han, Kana, Bopomofo
)
_FIRST_SPACELESS = "\u0e00"
_RUNS = re.compile(f"([{_SPACELESS}]+)")
_HANGUL = re.compile("[\uac00-\ud7a3]{3,}")

_PICTURE = (
    "[\u2139\u231a-\u23ff\u24c2\u25aa-\u25fe\u2600-\u27bf\u2934-\u2935\u2b00-\u2bff\U0001f000-\U0001f1e5"
    "\U0001f200-\U0001f3fa\U0001f400-\U0001faff]"
)
_TONE = "[\U0001f3fb-\U0001f3ff]"
_EMOJI = (
    f"[\U0001f1e6-\U0001f1ff]{{2}}|{_PICTURE}\ufe0f?{_TONE}?(?:\u200d{_PICTURE}\ufe0f?{_TONE}?)*|[0-9#*]\ufe0f?\u20e3"
)
_PICTURES = re.compile(_EMOJI)
_PICTURE_CHARS = re.compile(_PICTURE)

_MARK_BLOCKS = (
    *((0x300, 0x370), (0x483, 0x48A), (0x591, 0x5C8), (0x610, 0x1E00), (0x200C, 0x200E), (0x20D0, 0x20F1)),
    *((0x2CEF, 0x2CF2), (0x2D7F, 0x2E00), (0xA66F, 0xA6F2), (0xA802, 0xABEE), (0xFB1E, 0xFB1F), (0xFE20, 0xFE30)),
    *((0x10A00, 0x12000), (0x16AF0, 0x16F93), (0x1E000, 0x1E94B)),
)
_ACCENTS = re.compile("[\u0300-\u036f\u0591-\u05c7\u0640\u064b-\u0652\u0670\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]")
"""Left out of words: accents, the points of Hebrew and Arabic. The marks of other scripts are letters."""

_LETTERS = str.maketrans("łøđħıŧŋ", "lodhitn") | {ord("æ"): "ae", ord("œ"): "oe", ord("þ"): "th", ord("ð"): "d"}
_PUNCTUATION = str.maketrans("\u2019\u02bc\u2010\u2011\u2043", "''---", "\u00ad\u2060\ufeff")

_ALPHANUMERIC = "".join(char for char in map(chr, range(128)) if char.isalnum())
_FLAG = re.compile(r"--?[^\W\d][\w-]*")
_VERSION = re.compile(r"v?\d+(?:\.\d+)+")
_QUANTITY = re.compile(r"(\d+)([a-z]{1,3})")
_LANGUAGE = re.compile(r"[^\W\d_]\w{0,15}(?:\+\+|#)(?=\d|\W|$)")
_BREAKS = re.compile(r"\.{2,}|--+")
_PLAIN = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_SIMPLE = re.compile(rf"""["'(\[]*({_PLAIN.pattern})[.,;:!?"')\]]*""")
"""A word of which nothing but its stem is another form, between the marks of a sentence."""
_BY_CASE = re.compile(r"AA+a(?![aA])|A?a+0*|A+(?!a)0*|0+")

_LIGHT_LEAST = 4

_LEAST_SPOKEN = 3
"""Characters of a part before or after an apostrophe that is found on its own."""

_ODD = "\n"
_AS_TEXT = bytes.maketrans(
    bytes(range(128)), "".join(char.lower() if char in _ALPHANUMERIC else " " for char in map(chr, range(128))).encode()
)

_STOP_WORDS = """
a about after all also am an and any are as at be because been before being but by can could did do does doing done
for from get had has have having he her here hers him his how i if in into is it its just may me might more most
my no nor not of on or our ours out over s she should so some such than that the their theirs them then there these
they this those to too us very was we were what when where which while who whom whose why will with would you your
dont doesnt didnt isnt arent wasnt werent havent hasnt wont cant couldnt wouldnt shouldnt
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""English words that say little: they count a tenth in a query, see ``keyword_query.py``."""


Stem = Callable[[str], str]


class Words(NamedTuple):
    """Of a text, each list joined by spaces, of which there may be several in a row."""

    text: str
    more: str

    @property
    def counts(self) -> Counter[str]:
        """How often each word is in either list."""
        return Counter(f"{self.text} {self.more}".split())


def words_of(text: str, stemming: str = STEMMING) -> Words:
    """The words of a text, see the module. stemming: as :func:`stemmer` takes it.

    Raises ConfigurationError for a stemming that cannot be had.

    Examples:
        >>> words_of("parseHTTPResponse in C++")
        Words(text='parse http response in c', more='parsehttpresponse parsehttprespons pars respons c++')
        >>> words_of("用Redis缓存")
        Words(text='用 redis 缓 存', more='缓存')
    """
    known = _known(stemming)
    if len(known.ascii) + len(known.names) >= _CACHED:
        _known.cache_clear()  # other threads go on with theirs
        known = _known(stemming)
    if text.isascii():
        more = " ".join(filter(None, map(known.ascii.__getitem__, text.split())))
        if _ODD not in more:
            return Words(_as_text(text), more)
    made = [known.words(piece) for piece in pieces_of(text)]
    return Words(" ".join([one.text for one in made]), " ".join([one.more for one in made if one.more]))


def _as_text(text: str) -> str:
    """An ASCII text without apostrophes, in lower case, with a space for all but letters and digits."""
    return text.encode().translate(_AS_TEXT, b"'").decode()


def pieces_of(text: str) -> list[str]:
    """The parts of a text that are made into words on their own: names, emoji, runs without spaces."""
    if text.isascii():
        return _ASCII_NAMES.findall(text)
    text = unicodedata.normalize("NFKC", text.translate(_PUNCTUATION))
    pieces: list[str] = []
    for at, part in enumerate(_RUNS.split(text)):
        if at % 2:
            pieces.append(part)
        elif part:
            pieces += (_ASCII_NAMES if part.isascii() else _names()).findall(part)
    return pieces


def terms_of(piece: str, stemming: str = STEMMING) -> list[str]:
    """The words by which a piece of a query is looked up: stems and wholes; pairs where a run has any.

    A version is looked up as a whole: its numbers are in too many texts.
    """
    if version := _VERSION.fullmatch(fold(piece).rstrip(".")):
        return [version[0].removeprefix("v")]
    words = _known(stemming).words(piece)
    more = words.more.split()
    if more and is_spaceless(piece):
        return more
    stem = stemmer(stemming)
    return [*(word for word in words.text.split() if stem(word) == word), *more]


def is_spaceless(piece: str) -> bool:
    """Whether a piece is a run of a script without spaces between words."""
    return _RUNS.fullmatch(piece) is not None


def fold(word: str) -> str:
    """Case, accents and compatibility forms folded."""
    if word.isascii():
        return word.lower()
    bare = _ACCENTS.sub("", unicodedata.normalize("NFKD", word.casefold()))
    return unicodedata.normalize("NFKC", bare).casefold().translate(_LETTERS)


@cache
def stemmer(stemming: str) -> Stem:
    """The function that gives a word's stem: ``light``, ``none``, or a language of the library snowballstemmer.

    Raises ConfigurationError when the name is unknown or the library is not installed.
    """
    if stemming == "none":
        return str
    if stemming == "light":
        return light_stem
    try:
        import snowballstemmer  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ConfigurationError(
            f"keyword stemming {stemming!r} needs the library snowballstemmer: pip install 'memevolve-gpu[stemming]'; "
            "'light' and 'none' need no library"
        ) from error
    if stemming not in snowballstemmer.algorithms():
        raise ConfigurationError(
            f"keyword stemming must be light, none or one of {', '.join(snowballstemmer.algorithms())}; "
            f"got {stemming!r}"
        )
    return lambda word: str(snowballstemmer.stemmer(stemming).stemWord(word))  # a stemmer is not safe to share


def light_stem(word: str) -> str:
    """The word without an English plural, ``-ing``, ``-ed``, ``-ion`` and final ``-e``, where enough is left of it.

    Examples:
        >>> [light_stem(word) for word in ("running", "migrations", "migrate", "queries", "bus", "string")]
        ['run', 'migrat', 'migrat', 'query', 'bus', 'string']
    """
    if len(word) < _LIGHT_LEAST or not word.isascii() or not word.isalpha():
        return word
    stem = _singular(word)
    for ending, least in (("ing", 3), ("ed", 3), ("ion", 5)):
        base = stem.removesuffix(ending)
        if len(base) < len(stem):
            return _base(base) if _is_base(base, ending, least) else stem
    return stem[:-1] if stem[-1] == "e" and len(stem) > _LIGHT_LEAST else stem


def _is_base(base: str, ending: str, least: int) -> bool:
    return len(base) >= least and not _VOWEL.isdisjoint(base) and (ending != "ion" or base[-1] in "st")


def _base(base: str) -> str:
    if base[-1] == "i":
        return base[:-1] + "y"
    return base[:-1] if base[-1] == base[-2] and base[-1] not in "aeiolsz" else base


_VOWEL = frozenset("aeiouy")


def _singular(word: str) -> str:
    if word[-1] != "s" or word[-2:] in ("ss", "us", "is"):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y" if len(word) > _LIGHT_LEAST else word[:-1]
    return word[:-2] if word.endswith(("sses", "xes", "ches", "shes", "zzes")) else word[:-1]


@cache
def _names() -> re.Pattern[str]:
    """Emoji and names of text that is not ASCII. Marks are part of the words of many scripts, but not for `re`."""
    codes = (code for block in _MARK_BLOCKS for code in range(*block))
    marks = "".join(char for char in map(chr, codes) if unicodedata.category(char) in ("Mn", "Mc", "Cf"))
    return re.compile(f"{_EMOJI}|[{_NAME}{marks}]{{1,{MOST_CHARS}}}")


class _Mores(dict[str, str]):
    """``more`` of what stands between blanks, made when asked for; ``_ODD`` where ``text`` is not just ``_AS_TEXT``.

    A dict of texts keeps less of Python's garbage collector busy than one of :class:`Words`, and of each word of a
    text only this is looked up.
    """

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self._stem = stem

    def __missing__(self, chunk: str) -> str:
        if len(chunk) <= MOST_CHARS and (simple := _SIMPLE.fullmatch(chunk)):
            word = simple[1].lower()
            root = self._stem(word)
            self[chunk] = more = "" if root == word else root
            return more
        made = [_words_of_name(piece, self._stem) for piece in pieces_of(chunk)]
        plain = " ".join([one.text for one in made]).split() == _as_text(chunk).split()
        more = " ".join([one.more for one in made if one.more]) if plain else _ODD
        if len(chunk) <= MOST_CHARS:
            self[chunk] = more
        return more


class _Known:
    """What was made by one stemmer, kept."""

    def __init__(self, stem: Stem) -> None:
        self._stem = stem
        self.ascii = _Mores(stem)
        self.names: dict[str, Words] = {}

    def words(self, piece: str) -> Words:
        """Of one of the :func:`pieces_of` a text."""
        if piece[0] >= _FIRST_SPACELESS and is_spaceless(piece):
            return _words_of_run(piece)
        words = self.names.get(piece)
        if words is None:
            words = self.names[piece] = _words_of_name(piece, self._stem)
        return words


@cache
def _known(stemming: str) -> _Known:
    return _Known(stemmer(stemming))


def _words_of_run(run: str) -> Words:
    letters: list[str] = []
    for char in run:  # marks stay with the letter that they stand on
        if letters and char > _FIRST_SPACELESS and unicodedata.category(char)[0] == "M":
            letters[-1] += char
        else:
            letters.append(char)
    return Words(" ".join(letters), " ".join(map("".join, pairwise(letters))))


def _words_of_name(piece: str, stem: Stem) -> Words:
    if _PLAIN.fullmatch(piece):
        word = piece.lower()
        root = stem(word)
        return Words(word, "" if root == word else root)
    if not piece.isascii() and _PICTURES.fullmatch(piece):
        bare = piece.replace("\ufe0f", "")
        parts = dict.fromkeys(_PICTURE_CHARS.findall(bare))
        parts.pop(bare, None)
        return Words(bare, " ".join(parts))
    text: list[str] = []
    more: dict[str, None] = {}
    _add_name(piece, text, more, stem)
    for word in text:
        more[stem(word)] = None
        for run in _HANGUL.findall(word):
            more.update((run[at : at + 2], None) for at in range(len(run) - 1))
    for word in text:
        more.pop(word, None)
    return Words(" ".join(text), " ".join(more))


def _add_name(piece: str, text: list[str], more: dict[str, None], stem: Stem) -> None:
    """Add the words of a name to ``text``, and the wholes that it is or contains to ``more``."""
    if piece[0] == "-" and (flag := _FLAG.fullmatch(piece)):
        more[_whole(flag[0])] = None
    for path in _BREAKS.split(piece):
        steps = [step for step in path.split("/") if step.strip(".-'@+#_")]
        if len(steps) > 1:
            more[_whole("/".join(steps)).strip(".-@")] = None
        for step in steps:
            _add_step(step, text, more, stem)


def _whole(name: str) -> str:
    return fold(name).replace("'", "")


def _add_step(step: str, text: list[str], more: dict[str, None], stem: Stem) -> None:
    """Add one step of a path: a file name, a version, an address, a word."""
    step = step.lstrip("-'@+#").rstrip(".-'@")
    if language := _LANGUAGE.match(step):
        more[_whole(language[0])] = None
    step = step.rstrip("+#.-'@")
    for host in step.split("@") if "@" in step else (step,):
        whole = _whole(host)
        if "." in whole:
            more[whole] = None
        if version := _VERSION.match(whole):
            numbers = version[0].removeprefix("v").split(".")
            more.update((".".join(numbers[:count]), None) for count in range(2, min(len(numbers), 8) + 1))
    if "@" in step:
        more[_whole(step)] = None
    for one in re.split(r"[.@+#]+", step):
        _add_compound(one, text, more, stem)


def _add_compound(one: str, text: list[str], more: dict[str, None], stem: Stem) -> None:
    """Add a word, or the parts of one that is joined by hyphens, underscores, apostrophes or capitals."""
    bare = one.replace("'", "")
    words = [folded for part in re.split("[-_]+", bare) for word in _by_case(part) if (folded := fold(word))]
    if len(bare) < len(one):
        parts = [fold(part) for part in re.split("[-_']+", one) if len(part) >= _LEAST_SPOKEN]
        more.update(dict.fromkeys([*parts, *map(stem, parts)]))
    text += words
    if len(words) > 1:
        whole = "".join(words)
        more.update(dict.fromkeys((whole, stem(whole))))
    elif words and (amount := _QUANTITY.fullmatch(words[0])):
        more.update(dict.fromkeys(amount.groups()))


def _by_case(word: str) -> list[str]:
    if word[1:].islower() or word.isupper() or word.isdigit() or len(word) > _DATA_CHARS:
        return [word]
    cases = "".join("A" if char.isupper() else "0" if char.isdigit() else "a" for char in word)
    return [word[found.start() : found.end()] for found in _BY_CASE.finditer(cases)]
