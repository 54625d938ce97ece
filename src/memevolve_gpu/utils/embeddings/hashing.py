"""Embeddings without a model: words and letters hashed into signed buckets. Lexical only.

Two texts are near when they share words, pairs of neighbouring words or runs of letters; a synonym is as far as any
other word. Good for tests, samples and a first look without downloads; no substitute for a language model.

Feature hashing with signs: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (2009). The mixing
function is the finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ...errors import ConfigurationError
from ...types import FloatArray, IntArray
from ..arguments import shown
from .adapter import TextEmbedder

MAX_CHARACTERS = 100_000
"""Characters of a text that are looked at; what follows is ignored, which bounds memory and time."""

_MOST_DIMENSIONS = 65_536
"""The most that a store takes."""

_WORD = re.compile(r"\w+")
_COMMON_WORDS = frozenset(
    ["a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "in", "is", "it", "of", "on", "or", "the", "to"]
)
_COMMON_WEIGHT, _GRAM_WEIGHT, _PAIR_WEIGHT, _WORD_WEIGHT = 1, 1, 2, 4
_GRAM = 3
_CHUNK_TEXTS, _CHUNK_CHARACTERS = 256, 200_000
_WORD_SPACE, _GRAM_SPACE = np.uint64(1 << 40), np.uint64(1 << 41)
"""Added before mixing, so that a word and a run of letters with equal codes are different features."""

_Hashes = npt.NDArray[np.uint64]
_Features = tuple[_Hashes, IntArray, IntArray]
"""Parallel arrays: the feature's hash, the text it is in, its weight."""


class HashingEmbedder(TextEmbedder):
    """A lexical embedding function: deterministic on every machine, no dependencies, vectors of L2 norm 1.

    Characters of a text beyond ``MAX_CHARACTERS`` are ignored.
    All sums are of integers, and the one square root and the one division are exact to the last bit under IEEE 754, so
    the bytes are the same everywhere.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder
        >>> embed = HashingEmbedder(64)
        >>> embed("git rebase").shape, embed.embed_batch(["git", "rebase"]).shape
        ((64,), (2, 64))
    """

    def __init__(self, dimension: int = 384) -> None:
        """Make an embedding function.

        Args:
            dimension: number of buckets; below about 64 unrelated texts collide often.

        Raises:
            ConfigurationError: ``dimension`` is not an integer from 1 to 65,536.
        """
        given: object = dimension
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= _MOST_DIMENSIONS:
            allowed = f"a positive integer, at most {_MOST_DIMENSIONS}"
            raise ConfigurationError(f"dimension must be {allowed}, got {shown(dimension)}; 384 is usual")
        self.dimension = dimension
        self.model_name = f"hashing-lexical-{dimension}"

    def _embed(self, texts: Sequence[str], prefix: str) -> FloatArray:
        del prefix
        chunks = [self._embed_chunk(chunk) for chunk in _chunks(texts)]
        return np.concatenate(chunks) if chunks else np.empty((0, self.dimension), dtype=np.float32)

    def _embed_chunk(self, texts: list[str]) -> FloatArray:
        hashes, rows, weights = _distinct(_features(texts))
        signs = np.where(hashes >> np.uint64(63), 1, -1)
        buckets = (hashes & np.uint64(0xFFFFFFFF)) % np.uint64(self.dimension)
        cells = rows * self.dimension + buckets.astype(np.int64)
        sums = np.bincount(cells, weights=weights * signs, minlength=len(texts) * self.dimension)
        table = sums.reshape(len(texts), self.dimension)
        squares = np.square(table).sum(axis=1)
        table[squares == 0, 0] = 1.0
        norms = np.sqrt(np.where(squares == 0, 1.0, squares))
        vectors: FloatArray = (table / norms[:, None]).astype(np.float32)
        return vectors


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Cut the texts into runs of bounded count and length."""
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text[:MAX_CHARACTERS])
        characters += len(chunk[-1])
        if len(chunk) == _CHUNK_TEXTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _features(texts: list[str]) -> _Features:
    words = [_WORD.findall(text.lower()) for text in texts]
    parts = (_letter_runs(words), *_words_and_pairs(words))
    hashes, rows, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    return hashes, rows, weights


def _letter_runs(words: list[list[str]]) -> _Features:
    """Runs of three UTF-8 bytes over the words of a text, joined and framed by single spaces."""
    encoded = [_encode(f" {' '.join(line)} ") for line in words]
    rows = np.repeat(np.arange(len(encoded)), [len(line) for line in encoded])
    letters = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.uint64)
    count = max(0, len(letters) - _GRAM + 1)
    codes = np.zeros(count, dtype=np.uint64)
    for offset in range(_GRAM):
        codes = (codes << np.uint64(8)) | letters[offset : offset + count]
    within = rows[:count] == rows[_GRAM - 1 : _GRAM - 1 + count]
    return _mix(codes[within] + _GRAM_SPACE), rows[:count][within], np.full(within.sum(), _GRAM_WEIGHT)


def _words_and_pairs(words: list[list[str]]) -> tuple[_Features, _Features]:
    flat = [word for line in words for word in line]
    rows = np.repeat(np.arange(len(words)), [len(line) for line in words])
    codes = np.fromiter((zlib.crc32(_encode(word)) for word in flat), np.uint64, len(flat))
    common = np.fromiter((word in _COMMON_WORDS for word in flat), np.bool_, len(flat))
    hashes = _mix(codes + _WORD_SPACE)
    pairs = _mix(hashes[:-1] * np.uint64(3) + hashes[1:])
    within = rows[:-1] == rows[1:]
    single = hashes, rows, np.where(common, _COMMON_WEIGHT, _WORD_WEIGHT)
    return single, (pairs[within], rows[:-1][within], np.full(within.sum(), _PAIR_WEIGHT))


def _distinct(features: _Features) -> _Features:
    """Count a feature once per text, so that repetition drowns nothing. For chunks of up to 256 texts."""
    hashes, rows, weights = features
    keys = (rows.astype(np.uint64) << np.uint64(56)) | (hashes >> np.uint64(8))
    first = np.unique(keys, return_index=True)[1]
    return hashes[first], rows[first], weights[first]


def _mix(codes: _Hashes) -> _Hashes:
    """Spread 64-bit codes evenly, one to one."""
    mixed: _Hashes = (codes ^ (codes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
