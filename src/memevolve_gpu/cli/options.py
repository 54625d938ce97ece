"""Options that commands share, the filter they build and the store they open."""

from __future__ import annotations

import json
import re
import shlex
from enum import Enum
from typing import Annotated, Any, Optional

import typer

from ..backends import AnyStore, milvus_at, store_exists
from ..components.store.vector_store import VectorStore
from ..errors import EmbeddingError
from ..milvus.store import MilvusStore
from ..records import Records
from ..utils.config import EmbeddingConfig, MilvusConfig, StorageConfig, is_milvus_uri
from ..utils.embeddings import EmbeddingFunction, HashingEmbedder, embedder_from_config
from .app import InputError, NotFoundError
from .files import json_value

__all__ = [
    "AsJson",
    "Conditions",
    "Embedder",
    "EmbedderName",
    "FilterJson",
    "IndexType",
    "KeptModel",
    "Metric",
    "MetricName",
    "Prefix",
    "choose_embedder",
    "exists",
    "open_existing",
    "open_local",
    "open_or_make",
    "parse_filters",
    "remembered_model",
    "store_at",
]

_CONDITION = re.compile(r"(?P<key>[^=<>!]+)(?P<operator>>=|<=|!=|=|>|<)(?P<value>.*)", re.DOTALL)
_OPERATORS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt", "!=": "ne"}


def parse_filters(conditions: list[str] | None, text: str | None) -> dict[str, Any] | None:
    """None when nothing is asked for, else what ``VectorStore.search(filters=...)`` takes.

    conditions: ``type=skill``, ``metadata.score>=0.5``, ``tags!=git``; the same key with = several times means any of
    the values, with < and > a range. A value that is a JSON number, true, false, null or list is taken as that; quote
    it to make it a text (``id='"123"'``). text: a filter as JSON.

    Raises InputError; operators and paths that the store does not know are left to the store.
    """
    found = _from_json(text) if text is not None else {}
    for condition in conditions or []:
        _add(found, condition)
    return found or None


def _from_json(text: str) -> dict[str, Any]:
    value = json_value(text, "--filters")
    if not isinstance(value, dict):
        raise InputError(f'--filters: must be a JSON object such as {{"type": "skill"}}, got {text!r}')
    return value


def _add(found: dict[str, Any], condition: str) -> None:
    match = _CONDITION.fullmatch(condition)
    key = match["key"].strip() if match else ""
    if match is None or not key:
        raise InputError(
            f"--filter {condition!r}: write KEY=VALUE, KEY!=VALUE, KEY>=VALUE or KEY<VALUE, as in type=skill"
        )
    value = _value(match["value"].strip())
    if match["operator"] == "=":
        _add_value(found, key, value, condition)
    else:
        _add_bound(found, key, _OPERATORS[match["operator"]], value, condition)


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict) else value


def _add_value(found: dict[str, Any], key: str, value: Any, condition: str) -> None:
    if key not in found:
        found[key] = value
        return
    if isinstance(found[key], dict):
        raise InputError(f"--filter {condition!r}: {key} has another condition; only = and = go together")
    held = found[key] if isinstance(found[key], list) else [found[key]]
    found[key] = [*held, *(value if isinstance(value, list) else [value])]


def _add_bound(found: dict[str, Any], key: str, operator: str, value: Any, condition: str) -> None:
    bounds = found.setdefault(key, {})
    if not isinstance(bounds, dict):
        raise InputError(f"--filter {condition!r}: {key} has a value already; only = goes with =")
    if operator in bounds:
        raise InputError(f"--filter {condition!r}: {key} has a {operator} already; for more write --filters JSON")
    bounds[operator] = value


DEFAULT_STORE = "memory"
"""Path prefix of the store where neither option nor setting names one."""


class EmbedderName(str, Enum):
    """Who embeds; ``auto`` takes the settings and what the store was filled with."""

    AUTO = "auto"
    HASHING = "hashing"
    LOCAL = "local"
    OPENAI = "openai"


class MetricName(str, Enum):
    """Distances."""

    L2 = "l2"
    COSINE = "cosine"
    IP = "ip"


class IndexTypeName(str, Enum):
    """Kinds of index."""

    FLAT = "flat"
    IVF = "ivf"
    HNSW = "hnsw"
    AUTO = "auto"


class KeptModel:
    """Stands for the model that made vectors which are stored as they are; it embeds nothing."""

    def __init__(self, model_name: str | None, dimension: int) -> None:
        self.model_name = model_name
        self.dimension = dimension

    def __call__(self, _text: str, /) -> Any:
        raise EmbeddingError("this command stores given vectors and embeds nothing")


def store_at(prefix: str | None) -> str:
    """The prefix or ``milvus://`` address that was given, else what the settings name, else ``memory`` here.

    Raises InputError for an empty one: a script's variable that is not set must not lead to another store.
    """
    if prefix is not None and not prefix.strip():
        raise InputError("--store: the prefix is empty; give a path such as ./memory")
    config = StorageConfig()
    if prefix is None and config.backend_type == "milvus":
        return MilvusConfig().address
    return prefix or str(dict(config).get("path") or DEFAULT_STORE)


def open_existing(
    prefix: str, embedder: EmbedderName | None, index_type: IndexTypeName | None = None, *, as_served: bool = False
) -> AnyStore:
    """Open the store at ``prefix``; embedder None for commands that embed nothing.

    as_served: plan as a process would that stays, so under DEVICE=auto for a GPU too.

    Raises NotFoundError when there is none, else as ``VectorStore`` and ``MilvusStore`` do.
    """
    if not exists(prefix):
        remedy = f"make one with: memevolve-store init --store {shlex.quote(prefix)}"
        raise NotFoundError(f"there is no store at {prefix!r}; {remedy}, or name another with --store")
    function = None if embedder is None else choose_embedder(embedder, remembered_model(prefix))
    return _opened(prefix, function, _config(index_type, None, as_served=as_served))


def open_local(prefix: str) -> VectorStore:
    """As :func:`open_existing` without an embedder, for what only a store in files can do.

    Raises InputError for one on a server.
    """
    opened = open_existing(prefix, None)
    if isinstance(opened, MilvusStore):
        opened.close()
        raise InputError(
            f"--store: {prefix} is on a Milvus server, which has this command's work done by its own tools"
        )
    return opened


def exists(prefix: str) -> bool:
    """Is there a store at this prefix or address?"""
    return store_exists(prefix, StorageConfig().replace(backend_type="vector"))


def open_or_make(
    prefix: str,
    function: EmbeddingFunction,
    index_type: IndexTypeName | None = None,
    metric: MetricName | None = None,
) -> AnyStore:
    """Open the store at ``prefix``, or make one there."""
    return _opened(prefix, function, _config(index_type, metric))


def remembered_model(prefix: str) -> str | None:
    """Name of the embedding model that filled the store; None when there is no store, or the model has no name."""
    if is_milvus_uri(prefix):
        return MilvusStore.model_at(milvus_at(prefix))
    facts = Records.peek(prefix)
    return None if facts is None else facts.model


def choose_embedder(name: EmbedderName, held: str | None) -> EmbeddingFunction:
    """The embedding function of that name.

    held is the model that filled the store: under ``auto`` a store filled by the hashing embedder goes on with it.
    Raises ConfigurationError or EngineError when the function cannot be had.
    """
    hashing = re.fullmatch(r"hashing-lexical-([1-9]\d*)", held or "")
    if hashing and name in (EmbedderName.AUTO, EmbedderName.HASHING):
        return HashingEmbedder(int(hashing[1]))
    config = EmbeddingConfig() if name is EmbedderName.AUTO else EmbeddingConfig().replace(provider=name.value)
    return embedder_from_config(config)


def _opened(prefix: str, function: EmbeddingFunction | None, config: StorageConfig) -> AnyStore:
    if is_milvus_uri(prefix):
        return MilvusStore(function, storage_config=config, milvus_config=milvus_at(prefix))
    return VectorStore(prefix, function, storage_config=config)


def _config(index_type: IndexTypeName | None, metric: MetricName | None, *, as_served: bool = False) -> StorageConfig:
    """The settings, without a background thread: a command does its upkeep in the open, with a progress bar.

    Under DEVICE=auto it does so for the CPU: what lies on a GPU would be gone when the command ends.
    """
    given = {"index_type": index_type, "metric": metric}
    changes = {name: value.value for name, value in given.items() if value is not None}
    config = StorageConfig()
    device = "cpu" if config.device == "auto" and not as_served else config.device
    return config.replace(background=False, device=device, **changes)


# typer reads these at run time, and its older versions know Optional only.
Prefix = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--store",
        "-s",
        show_default=False,
        metavar="PREFIX",
        help=f"Path prefix of the store's files.  \\[default: {DEFAULT_STORE}]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Embedder = Annotated[
    EmbedderName,
    typer.Option("--embedder", "-e", help="Who embeds; auto follows the settings and what filled the store."),
]
Metric = Annotated[
    Optional[MetricName],  # noqa: UP045
    typer.Option(
        "--metric",
        show_default=False,
        help="Distance of a new store; a store keeps its own.  \\[default: the setting's]",
    ),
]
IndexType = Annotated[
    Optional[IndexTypeName],  # noqa: UP045
    typer.Option("--index-type", show_default=False, help="Kind of index to build.  \\[default: the setting's]"),
]
Conditions = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--filter",
        "-f",
        show_default=False,
        metavar="KEY=VALUE",
        help="Only units of which this is true: type=skill, 'metadata.score>=0.5'. May be repeated; one key with "
        "several values means any of them.",
    ),
]
FilterJson = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--filters", show_default=False, metavar="JSON", help='The same as JSON: {"tags": ["git", "linux"]}.'),
]
