"""Embeddings from a service with OpenAI's interface."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...errors import ConfigurationError, EmbeddingError, EngineError, InvalidVectorError
from ...types import FloatArray, T
from ..arguments import optional_text, real_number, whole_number, word
from ..vectors import check_vectors, unpacked
from .adapter import TextEmbedder, prefixes_of

if TYPE_CHECKING:
    from openai import OpenAI

_log = logging.getLogger("memevolve_gpu.embeddings")

MAX_TOKENS = 8_000
"""Default bound of a text: OpenAI's models read 8,192."""

_REQUEST_TOKENS = 100_000
"""Estimated tokens of one request: OpenAI takes 300,000."""

_CHARACTERS_PER_TOKEN = 3
"""Of ASCII text, where about four are usual; any other character counts as one token."""

_SHORTEST = 16
"""Characters below which a text that the service refuses is not cut further."""

_MAY_BE_LENGTH = frozenset({400, 413, 422})
"""Status codes with which services refuse too many or too long texts."""

_OFFICIAL_MODEL = "text-embedding-3-small"
_SHORTENED = "text-embedding-3"
"""Models of which a shorter vector may be asked for."""

_NO_KEY = "not-needed"


class _RefusedError(EmbeddingError):
    """The service refused a request, perhaps for its size."""


class OpenAIEmbedder(TextEmbedder):
    """An embedding model behind ``POST <base_url>/embeddings``.

    Needs the ``openai`` package, which is imported at the first call. It retries what may pass (timeouts, lost
    connections, 408, 409, 429 and 5xx) ``max_retries`` times, waiting longer each time.

    A text is cut to ``max_tokens`` tokens by estimate: three ASCII characters or one other character each. When a
    service refuses a request for its size, the request is split, and then the text cut, until it is accepted. An empty
    text is sent as a space, because services refuse it. Queries and documents get the prefixes that models of the e5,
    bge, nomic, mxbai and arctic families expect. Thread-safe; a forked process opens connections of its own.

    Examples:
        >>> from memevolve_gpu import OpenAIEmbedder
        >>> embed = OpenAIEmbedder("http://localhost:11434/v1", model="all-minilm")  # nothing is sent yet
        >>> embed.model_name
        'all-minilm'
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float = 60.0,
        dimension: int | None = None,
        batch_size: int = 64,
        *,
        max_tokens: int = MAX_TOKENS,
        max_retries: int = 4,
        encoding: Literal["float", "base64"] = "float",
    ) -> None:
        """Describe the service; nothing is sent yet.

        Args:
            base_url: address of the service, up to ``/embeddings``; None for OpenAI.
            api_key: key of the service; None for OPENAI_API_KEY at OpenAI, and for no key elsewhere.
            model: None for text-embedding-3-small at OpenAI, elsewhere for the only model that the service lists.
            timeout: seconds for one request.
            dimension: expected length of the vectors; requested where the model is of OpenAI's third generation.
            batch_size: most texts in one request.
            max_tokens: most tokens of one text.
            max_retries: how often a request that may succeed later is repeated.
            encoding: how the service is asked to send numbers; both forms are read.

        Raises:
            ConfigurationError: An argument is not allowed.
        """
        optional_text("base_url", base_url)
        optional_text("model", model)
        if not isinstance(api_key, (str, type(None))):
            raise ConfigurationError(f"api_key must be a text or None, got {type(api_key).__name__}")
        if dimension is not None:
            whole_number("dimension", dimension, error=ConfigurationError)
        word("encoding", encoding, ("float", "base64"), ConfigurationError)
        most = sys.float_info.max
        self.dimension = dimension
        self.model_name = model or (None if base_url else _OFFICIAL_MODEL)
        self._base_url = base_url
        self._shown_url = re.sub("//[^/]*@", "//***@", base_url or "").partition("?")[0]
        self._api_key = api_key or (_NO_KEY if base_url else None)  # else a key for OpenAI would go to that address
        self._timeout = real_number("timeout", timeout, "seconds above 0", sys.float_info.min, most, ConfigurationError)
        self._batch_size = whole_number("batch_size", batch_size, error=ConfigurationError)
        self._max_tokens = whole_number("max_tokens", max_tokens, error=ConfigurationError)
        self._warned = False
        self._max_retries = whole_number("max_retries", max_retries, least=0, error=ConfigurationError)
        self._encoding = encoding
        self._client: OpenAI | None = None
        self._inherited: OpenAI | None = None
        self._client_of = 0

    def _prefixes(self) -> tuple[str, str]:
        return prefixes_of(self._model())

    def _embed(self, texts: Sequence[str], prefix: str) -> FloatArray:
        parts = [part for batch in self._requests(texts, prefix) for part in self._accepted(batch)[0]]
        if len({part.shape[1] for part in parts}) > 1:
            raise EmbeddingError(f"{self._where()} changed the length of its vectors between requests; pin its model")
        return np.concatenate(parts) if parts else np.empty((0, self.dimension or 0), dtype=np.float32)

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        client, self._client = self._client, None
        if client is not None and self._client_of == os.getpid():
            client.close()

    def _requests(self, texts: Sequence[str], prefix: str) -> Iterator[list[str]]:
        """Cut the texts, and gather them into requests of bounded count and length."""
        batch: list[str] = []
        tokens = 0
        for text in texts:
            cut, length = _cut(prefix + text, self._max_tokens)
            if len(cut) < len(prefix + text):
                self._warn_of_cut(len(text))
            if batch and (len(batch) >= self._batch_size or tokens + length > _REQUEST_TOKENS):
                yield batch
                batch, tokens = [], 0
            batch.append(cut or " ")
            tokens += length
        if batch:
            yield batch

    def _accepted(self, texts: list[str]) -> tuple[list[FloatArray], bool]:
        """Request the vectors; split the request, then cut the text, where the service refuses their size.

        Returns the parts of the answer, and whether the first request was accepted.
        """
        try:
            return [self._request(texts)], True
        except _RefusedError as refused:
            error = refused
        if len(texts) > 1:
            half = -(-len(texts) // 2)
            (first, first_whole), (second, second_whole) = (
                self._accepted(part) for part in (texts[:half], texts[half:])
            )
            if first_whole and second_whole:  # so their number was too large, and not one of them
                self._batch_size = min(self._batch_size, half)
            return first + second, False
        if len(texts[0]) <= _SHORTEST:
            raise EmbeddingError(str(error)) from None
        vectors, _ = self._accepted([texts[0][: len(texts[0]) // 2]])
        self._warn_of_cut(len(texts[0]))
        return vectors, False

    def _warn_of_cut(self, characters: int) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "a text of %d characters is longer than %s reads: the rest is not embedded, here and in later texts",
                characters, self._where(),
            )  # fmt: skip

    def _request(self, texts: list[str]) -> FloatArray:
        client, model = self._connected(), self._model()
        options = {"dimensions": self.dimension} if self.dimension and _SHORTENED in model else {}
        answer = self._call(
            client.embeddings.create, model=model, input=texts, encoding_format=self._encoding, **options
        )
        return self._vectors(getattr(answer, "data", None), len(texts))

    def _vectors(self, items: object, count: int) -> FloatArray:
        if not isinstance(items, list) or len(items) != count:
            got = len(items) if isinstance(items, list) else "no list of"
            raise EmbeddingError(f"{self._where()} answered with {got} vectors for {count} texts; check base_url")
        try:
            sent = [item.embedding for item in _in_order(items)]
            rows = [unpacked(one) if isinstance(one, str) else one for one in sent]
            return check_vectors(rows, self.dimension or max(1, len(rows[0])), "l2", name="embeddings")
        except (AttributeError, TypeError, ValueError, InvalidVectorError) as error:
            raise EmbeddingError(f"{self._where()} answered with unusable vectors: {error}; check model") from error

    def _model(self) -> str:
        """Return the name of the model; ask the service for it, once, when none was given."""
        if self.model_name is not None:
            return self.model_name
        listed = getattr(self._call(self._connected().models.list), "data", None)
        names = [str(getattr(model, "id", "")) for model in listed] if isinstance(listed, list) else []
        if len(names) != 1:
            shown = ", ".join(names[:5]) or "none"
            raise EmbeddingError(f"{self._where()} has {len(names)} models ({shown}); set model to the one to use")
        self.model_name = names[0]
        return names[0]

    def _connected(self) -> OpenAI:
        if self._client is None or self._client_of != os.getpid():
            if importlib.util.find_spec("openai") is None:
                raise EngineError("an embedding service needs the openai package; pip install 'memevolve-gpu[openai]'")
            import openai

            self._inherited = self._client  # kept, because closing it would end the parent's connections
            self._client = self._call(
                openai.OpenAI,
                base_url=self._base_url,
                api_key=self._api_key,
                timeout=self._timeout,
                max_retries=self._max_retries,
            )
            self._client_of = os.getpid()
        return self._client

    def _call(self, function: Callable[..., T], **arguments: object) -> T:
        """The border to the openai package: its errors become EmbeddingError, without the key."""
        import openai

        try:
            return function(**arguments)
        except (openai.OpenAIError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            hidden = reason.replace(self._api_key, "***") if self._api_key else reason
            kind = _RefusedError if getattr(error, "status_code", None) in _MAY_BE_LENGTH else EmbeddingError
            raise kind(f"{self._where()} failed ({hidden}); check base_url, api_key and model") from None

    def _where(self) -> str:
        return f"the embedding service {self._shown_url or 'of OpenAI'} (model {self.model_name or 'not set'})"


def _cut(text: str, tokens: int) -> tuple[str, int]:
    """Return the start of a text that has at most so many tokens by estimate, and its estimate."""
    if text.isascii():
        cut = text[: tokens * _CHARACTERS_PER_TOKEN]
        return cut, -(-len(cut) // _CHARACTERS_PER_TOKEN)
    thirds = 0
    for position, character in enumerate(text):
        thirds += 1 if character < "\x80" else _CHARACTERS_PER_TOKEN
        if thirds > tokens * _CHARACTERS_PER_TOKEN:
            return text[:position], tokens
    return text, -(-thirds // _CHARACTERS_PER_TOKEN)


def _in_order(items: list[Any]) -> list[Any]:
    """Sort by the position that the service gives; refuse positions that leave a doubt which text a vector is of."""
    positions = [item.index for item in items]
    if all(position is None for position in positions):
        return items
    if sorted(positions) != list(range(len(items))):
        raise ValueError(f"its positions are {positions[:10]}, not 0 to {len(items) - 1}")
    return sorted(items, key=lambda item: int(item.index))
