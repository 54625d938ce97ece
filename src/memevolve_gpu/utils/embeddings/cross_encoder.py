"""A cross-encoder on this machine: a model that reads a query and a text together and says how well they match."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigurationError, EmbeddingError, EngineError
from ..config import may_download, no_telemetry
from ..forking import lock, never_free, renew_in_child
from .local import INSTALL, OWN, hush, listed_name, model_errors, onnx_file, registered

if TYPE_CHECKING:
    from fastembed.rerank.cross_encoder import TextCrossEncoder


class CrossEncoder:
    """Calls a cross-encoder through fastembed; it is loaded at the first call. Thread-safe: one call at a time."""

    def __init__(self, model: str) -> None:
        """Choose a model.

        Args:
            model: A name that fastembed knows, with or without its organisation, which it downloads once and keeps; or
                an ONNX file, or the folder that holds ``model.onnx``, with its tokenizer beside it.

        Raises:
            EngineError: fastembed is not installed.
            ConfigurationError: fastembed does not know the name and there is no such path, or the path lacks a file.
        """
        self._model = model
        encoder = _fastembed()
        self._folder: str | None = None
        name = listed_name(encoder, model)
        if name is None:
            path = _existing(model)
            if path is None:
                known = (str(one["model"]) for one in encoder.list_supported_models())
                shown = ", ".join(name for name in known if not name.startswith(OWN))
                raise ConfigurationError(f"rerank must be a function, a path, or one of {shown}; got {model!r}")
            file = onnx_file(path)
            name, self._folder = registered(encoder, file), str(file.parent)
        self._name = name
        self._lock = lock(awaited=True)
        self._loaded: TextCrossEncoder | None = None
        renew_in_child(self)

    def after_fork(self) -> None:
        """Load the model again in a forked child: the old one waits for threads that only the parent has."""
        never_free(self._loaded)
        self._loaded = None

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]:
        """Return a number for each text, larger for a better match.

        Args:
            query: The query.
            texts: The texts.

        Returns:
            The numbers.

        Raises:
            EmbeddingError: The model cannot be loaded, or fails.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            try:
                return [float(score) for score in self._loaded.rerank(query, list(texts))]
            except model_errors() as error:
                raise EmbeddingError(f"cross-encoder {self._model!r} failed: {error}") from error

    def _load(self) -> TextCrossEncoder:
        local = self._folder is not None or not may_download()
        hush()
        try:
            return _fastembed()(self._name, specific_model_path=self._folder, local_files_only=local)
        except model_errors() as error:
            remedy = "check the connection, or give the path of an ONNX file" if self._folder is None else "check it"
            raise EmbeddingError(f"cross-encoder {self._model!r} cannot be loaded: {error}; {remedy}") from error


def _existing(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name that is too long; a home folder that nobody has
        return None


def _fastembed() -> Any:
    no_telemetry()
    try:
        from fastembed.rerank.cross_encoder import TextCrossEncoder
    except (ImportError, OSError) as error:
        raise EngineError(f"a cross-encoder needs fastembed ({error}); {INSTALL}") from error
    return TextCrossEncoder
