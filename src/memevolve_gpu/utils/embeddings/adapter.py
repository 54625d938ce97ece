"""The embedding function's protocol, and the store's adapter: batches, checks, and a query cache."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np

from ...errors import DimensionMismatchError, EmbeddingError, EngineError, InvalidVectorError
from ...types import FloatArray, T, Vectors
from ..arguments import texts_of
from ..forking import lock
from ..plain import plain_text
from ..vectors import check_vector, check_vectors, to_host, usual_vector


@runtime_checkable
class EmbeddingFunction(Protocol):
    """Maps a text to one vector, array-like of d real numbers, the same d for every text.

    Four attributes are read where a function offers them, and never asked for:

    - ``embed_batch(texts) -> (n, d)``, used instead of n single calls (see :class:`BatchEmbeddingFunction`);
    - ``embed_query(text) -> (d,)``, used for the text of a search where a model treats queries and documents apart;
    - ``dimension: int``, d, which spares the probe that would detect it;
    - ``model_name: str``, kept in the store so that it is not filled by two models.

    The store may call it from several threads at once.
    """

    def __call__(self, text: str, /) -> Vectors:
        """Embed one text: array-like (d,)."""
        ...  # pragma: no cover


@runtime_checkable
class BatchEmbeddingFunction(EmbeddingFunction, Protocol):
    """An embedding function that takes many texts at once."""

    def embed_batch(self, texts: Sequence[str], /) -> Vectors:
        """Embed n texts: array-like (n, d), in the order of the texts."""
        ...  # pragma: no cover


class TextEmbedder(ABC):
    """What the embedding functions of this package share."""

    def __call__(self, text: str, /) -> FloatArray:
        """Embed one document; raises as :meth:`embed_batch` does.

        Args:
            text: The text.

        Returns:
            float32 (dim,).
        """
        vector: FloatArray = self.embed_batch([text])[0]
        return vector

    def embed_query(self, text: str, /) -> FloatArray:
        """Embed one query: as a document, but with the prefix for queries where the model has one.

        Args:
            text: The query.

        Returns:
            float32 (dim,).

        Raises:
            MemEvolveError: As :meth:`embed_batch`.
        """
        vector: FloatArray = self._embed(texts_of([text]), self._prefixes()[0])[0]
        return vector

    def embed_batch(self, texts: Sequence[str], /) -> FloatArray:
        """Embed several documents.

        Args:
            texts: n texts.

        Returns:
            float32 (n, dim), row i for text i.

        Raises:
            EngineError: A package is missing or damaged; the message says what to install.
            EmbeddingError: ``texts`` is not a sequence of strings, the model or the service fails for good, or its
                answer is not one vector of the right length per text.
        """
        given = texts_of(texts)
        return self._embed(given, self._prefixes()[1] if given else "")

    @abstractmethod
    def _embed(self, texts: Sequence[str], prefix: str) -> FloatArray:
        """Embed n texts with a prefix before each: float32 (n, dim)."""

    def _prefixes(self) -> tuple[str, str]:
        """The prefixes of queries and of documents."""
        return "", ""


_RETRIEVE = "Represent this sentence for searching relevant passages: "
_PREFIXES: tuple[tuple[str, str, str], ...] = (
    (r"(^|[/-])e5-(small|base|large)", "query: ", "passage: "),
    (r"bge-(small|base|large)-en", _RETRIEVE, ""),
    (r"bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章：", ""),  # noqa: RUF001 - its colon is a wide one
    (r"nomic-embed-text", "search_query: ", "search_document: "),
    (r"mxbai-embed-large|snowflake-arctic-embed", _RETRIEVE, ""),
    (r"embeddinggemma", "task: search result | query: ", "title: none | text: "),
)
"""A pattern of model names, and what their model cards put before a query and before a document."""


def prefixes_of(model: str | None) -> tuple[str, str]:
    """Return what a model expects before a query and before a document; empty for models that need nothing."""
    name = (model or "").lower()
    return next(((query, text) for pattern, query, text in _PREFIXES if re.search(pattern, name)), ("", ""))


BATCH_SIZE = 256
"""Texts handed to ``embed_batch`` at once."""

QUERY_CACHE_SIZE = 256
"""Query vectors remembered by :meth:`Embedder.embed_query`."""

_LONGEST_CACHED_QUERY = 10_000
"""Characters; longer queries are not remembered, which bounds the cache's memory."""

_SHOWN_CHARACTERS = 60
_PROBE_TEXT = "dimension probe"


class Embedder:
    """Wraps an :class:`EmbeddingFunction`; every vector that leaves it is float32, finite and of one dimension.

    Thread-safe as far as the function is.
    """

    def __init__(self, function: EmbeddingFunction, dim: int | None = None) -> None:
        """``dim`` is the dimension to insist on; None takes the function's ``dimension``, else its first vector's.

        Raises EmbeddingError when ``function`` cannot be called.
        """
        if not callable(function):
            kind = type(function).__name__
            raise EmbeddingError(f"embedding_function must be callable with a text, got {kind}; pass a function")
        self._function = function
        self._lock = lock()
        self._dim = dim if dim is not None else _declared_dimension(function)
        self._cached_query = lru_cache(maxsize=QUERY_CACHE_SIZE)(self._embed_frozen)

    @property
    def dimension(self) -> int:
        """The length of every vector. Embeds one probe text while it is not known (raises as :meth:`embed` does)."""
        known = self._dim
        return known if known is not None else self.embed(_PROBE_TEXT).shape[0]

    @property
    def model_name(self) -> str | None:
        """The function's own ``model_name``, None when it has none."""
        name = getattr(self._function, "model_name", None)
        return name if isinstance(name, str) and name else None

    def embed(self, text: str) -> FloatArray:
        """Embed one text: float32 (dim,).

        Raises EmbeddingError when the function fails or returns anything but one finite vector of numbers, and
        DimensionMismatchError when its length is not ``dimension``.
        """
        return self._one(self._function, text, 0)

    def embed_query(self, text: str) -> FloatArray:
        """Embed the text of a search, with the function's ``embed_query`` where it has one.

        Raises as :meth:`embed` does. The result is read-only; the last 256 are remembered.
        """
        text = _plain(text, 0)
        if len(text) <= _LONGEST_CACHED_QUERY:
            return self._cached_query(text)
        return self._embed_frozen(text)

    def embed_many(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> FloatArray:
        """Embed n texts: float32 (n, dim), row i for text i, through ``embed_batch`` where the function offers it.

        ``progress(done, n)`` is called after every batch of 256. Raises as :meth:`embed` does; the message names the
        position of the text. Nothing is returned unless all texts succeed.
        """
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        batch_function = getattr(self._function, "embed_batch", None)
        for start in range(0, len(texts), BATCH_SIZE):
            batch = texts[start : start + BATCH_SIZE]
            if callable(batch_function):
                vectors[start : start + len(batch)] = self._batch(batch_function, batch, start)
            else:
                for position, text in enumerate(batch, start):
                    vectors[position] = self._one(self._function, text, position)
            if progress is not None:
                progress(start + len(batch), len(texts))
        return vectors

    def _one(self, function: Callable[[str], object], text: str, position: int) -> FloatArray:
        text = _plain(text, position)
        output = _call(function, text, lambda: _where(text, position))
        vector = usual_vector(output, self._dim)
        if vector is None:
            with _blaming(_where(text, position)):
                raw = to_host(output, name="output")
                vector = check_vector(raw, self._dim or max(1, raw.shape[-1] if raw.ndim else 1), "l2", name="output")
            self._learn(vector.shape[0])
        owned: FloatArray = vector.copy()
        return owned

    def _batch(self, batch_function: Callable[[Sequence[str]], object], batch: Sequence[str], start: int) -> FloatArray:
        batch = [_plain(text, position) for position, text in enumerate(batch, start)]
        where = f"texts {start} to {start + len(batch) - 1} (the first is {_start_of(batch[0])})"
        output = _call(batch_function, batch, lambda: where)
        with _blaming(where):
            rows = check_vectors(output, self.dimension, "l2", name="output")
        if rows.shape[0] != len(batch):
            got = f"{rows.shape[0]} vectors for {len(batch)} texts"
            raise EmbeddingError(f"embedding_function returned {got}: {where}; embed_batch must return one per text")
        return rows

    def _learn(self, dim: int) -> None:
        """Take ``dim`` as the dimension unless another thread was first and found a different one."""
        with self._lock:
            known = self._dim = self._dim or dim
        if known != dim:
            raise DimensionMismatchError(known, dim, "embedding_function must return vectors of one length")

    def _embed_frozen(self, text: str) -> FloatArray:
        for_queries = getattr(self._function, "embed_query", None)
        vector = self._one(for_queries if callable(for_queries) else self._function, text, 0)
        vector.flags.writeable = False
        return vector


def _declared_dimension(function: EmbeddingFunction) -> int | None:
    declared = getattr(function, "dimension", None)
    usable = isinstance(declared, (int, np.integer)) and not isinstance(declared, bool) and declared > 0
    return int(declared) if usable and declared is not None else None


def _call(function: Callable[[T], object], argument: T, where: Callable[[], str]) -> object:
    """The border to foreign code: whatever the user's function raises becomes an EmbeddingError."""
    try:
        return function(argument)
    except EngineError:
        raise
    except Exception as error:  # the user's function may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise EmbeddingError(f"embedding_function failed on {where()}: {reason}; mend it or retry") from error


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Vectors that cannot be used are the embedding function's fault here, not the caller's."""
    try:
        yield
    except DimensionMismatchError:
        raise
    except InvalidVectorError as error:
        raise EmbeddingError(f"embedding_function returned no usable vector for {where}: {error}") from error


def _plain(text: object, position: int) -> str:
    """The text as units hold it: of an enum's member its value, whatever ``str`` makes of it."""
    if not isinstance(text, str):
        raise EmbeddingError(f"text {position} must be a str, got {type(text).__name__}; pass the text to embed")
    return plain_text(text)


def _where(text: str, position: int) -> str:
    return f"text {position} ({_start_of(text)})"


def _start_of(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
