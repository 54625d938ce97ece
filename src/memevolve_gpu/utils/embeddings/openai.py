"""Embeddings from a service with OpenAI's interface."""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from ...errors import ConfigurationError, EmbeddingError, EngineError, InvalidVectorError
from ...types import FloatArray
from ..arguments import optional_text, real_number, texts_of, whole_number, word
from ..vectors import check_vectors

__all__ = ["MAX_CHARACTERS", "OpenAIEmbedder"]

MAX_CHARACTERS = 24_000
"""Default bound of a text, about 8,000 tokens of English: OpenAI's models read 8,192."""

_REQUEST_CHARACTERS = 300_000
"""Characters of one request: OpenAI takes 300,000 tokens, and no text has more tokens than bytes."""

_OFFICIAL_MODEL = "text-embedding-3-small"
_SHORTENED = "text-embedding-3"
"""Models of which a shorter vector may be asked for."""

_NO_KEY = "not-needed"


class OpenAIEmbedder:
    """An embedding model behind ``POST <base_url>/embeddings``.

    Needs the ``openai`` package, which is imported at the first call. It retries what may pass (timeouts, lost
    connections, 408, 409, 429 and 5xx) ``max_retries`` times, waiting longer each time.

    Texts are cut to ``max_chars`` characters; an empty one is sent as a space, because services refuse it. Thread-safe;
    a forked process opens connections of its own.

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
        max_chars: int = MAX_CHARACTERS,
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
            max_chars: characters of a text that are sent.
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
        self._max_chars = whole_number("max_chars", max_chars, error=ConfigurationError)
        self._max_retries = whole_number("max_retries", max_retries, least=0, error=ConfigurationError)
        self._encoding = encoding
        self._client: Any = None
        self._inherited: Any = None
        self._client_of = 0

    def __call__(self, text: str, /) -> FloatArray:
        """Embed one text; raises as :meth:`embed_batch` does.

        Args:
            text: cut to ``max_chars`` characters.

        Returns:
            float32 (dim,).
        """
        vector: FloatArray = self.embed_batch([text])[0]
        return vector

    def embed_batch(self, texts: Sequence[str], /) -> FloatArray:
        """Embed several texts, in requests of at most ``batch_size`` texts.

        Args:
            texts: n texts.

        Returns:
            float32 (n, dim), row i for text i.

        Raises:
            EngineError: the ``openai`` package is missing; the message says what to install.
            EmbeddingError: the service fails for good, or its answer is not one vector of the right length per text.
        """
        parts = [self._request(batch) for batch in self._requests(texts_of(texts))]
        if len({part.shape[1] for part in parts}) > 1:
            raise EmbeddingError(f"{self._where()} changed the length of its vectors between requests; pin its model")
        return np.concatenate(parts) if parts else np.empty((0, self.dimension or 0), dtype=np.float32)

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        client, self._client = self._client, None
        if client is not None and self._client_of == os.getpid():
            client.close()

    def _requests(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Cut the texts, and gather them into requests of bounded count and length."""
        batch: list[str] = []
        characters = 0
        for text in texts:
            cut = text[: self._max_chars] or " "
            if batch and (len(batch) == self._batch_size or characters + len(cut) > _REQUEST_CHARACTERS):
                yield batch
                batch, characters = [], 0
            batch.append(cut)
            characters += len(cut)
        if batch:
            yield batch

    def _request(self, texts: list[str]) -> FloatArray:
        client = self._connected()
        model = self.model_name or self._only_model(client)
        options = {"dimensions": self.dimension} if self.dimension and _SHORTENED in model else {}
        answer = self._call(
            client.embeddings.create, model=model, input=texts, encoding_format=self._encoding, **options
        )
        return self._vectors(getattr(answer, "data", None), len(texts))

    def _vectors(self, items: Any, count: int) -> FloatArray:
        if not isinstance(items, list) or len(items) != count:
            got = len(items) if isinstance(items, list) else "no list of"
            raise EmbeddingError(f"{self._where()} answered with {got} vectors for {count} texts; check base_url")
        try:
            rows = [_numbers(item.embedding) for item in _in_order(items)]
            return check_vectors(rows, self.dimension or max(1, len(rows[0])), "l2", name="embeddings")
        except (AttributeError, TypeError, ValueError, InvalidVectorError) as error:
            raise EmbeddingError(f"{self._where()} answered with unusable vectors: {error}; check model") from error

    def _only_model(self, client: Any) -> str:
        """Ask the service which model it has, and keep the answer when there is no choice."""
        listed = getattr(self._call(client.models.list), "data", None)
        names = [str(getattr(model, "id", "")) for model in listed] if isinstance(listed, list) else []
        if len(names) != 1:
            shown = ", ".join(names[:5]) or "none"
            raise EmbeddingError(f"{self._where()} has {len(names)} models ({shown}); set model to the one to use")
        self.model_name = names[0]
        return names[0]

    def _connected(self) -> Any:
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

    def _call(self, function: Any, **arguments: Any) -> Any:
        """The border to the openai package: its errors become EmbeddingError, without the key."""
        import openai

        try:
            return function(**arguments)
        except (openai.OpenAIError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            hidden = reason.replace(self._api_key, "***") if self._api_key else reason
            raise EmbeddingError(f"{self._where()} failed ({hidden}); check base_url, api_key and model") from None

    def _where(self) -> str:
        return f"the embedding service {self._shown_url or 'of OpenAI'} (model {self.model_name or 'not set'})"


def _in_order(items: list[Any]) -> list[Any]:
    """Sort by the position that the service gives; refuse positions that leave a doubt which text a vector is of."""
    positions = [item.index for item in items]
    if all(position is None for position in positions):
        return items
    if sorted(positions) != list(range(len(items))):
        raise ValueError(f"its positions are {positions[:10]}, not 0 to {len(items) - 1}")
    return sorted(items, key=lambda item: int(item.index))


def _numbers(embedding: Any) -> Any:
    """Base64 of little-endian float32, or the numbers themselves."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    return embedding
