"""Options that commands share, the filter they build and the store they open."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer

from ..errors import EmbeddingError
from .app import InputError, NotFoundError, chosen
from .files import json_object

if TYPE_CHECKING:  # imported where they are used: --help needs none of them
    from ..backends import AnyStore
    from ..components.store.vector_store import VectorStore
    from ..types import Json, JsonObject
    from ..utils.embeddings import EmbeddingFunction

EmbedderName = Literal["auto", "hashing", "local", "openai"]
"""Embedders; ``auto`` follows the settings and the model of the store."""

MetricName = Literal["l2", "cosine", "ip"]
IndexTypeName = Literal["flat", "ivf", "hnsw", "auto"]

DEFAULT_STORE = "memory"
"""Path prefix of the store where neither option nor setting names one."""

_CONDITION = re.compile(r"(?P<key>[^=<>!]+)(?P<operator>>=|<=|!=|=|>|<)(?P<value>.*)", re.DOTALL)
_OPERATORS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt", "!=": "ne"}


def parse_filters(conditions: list[str] | None, text: str | None) -> JsonObject | None:
    """Return what ``VectorStore.search(filters=...)`` takes; None without a condition.

    conditions: ``type=skill``, ``metadata.score>=0.5``, ``tags!=git``. One key with = several times matches any of the
    values, with < and > a range. A value that is a JSON number, true, false, null or list is read as JSON; quotes make
    it a text (``id='"123"'``). text: a filter as JSON.

    Raises InputError; the store checks operators and paths.
    """
    found = {} if text is None else json_object(text, "--filters")
    for condition in conditions or []:
        match = _CONDITION.fullmatch(condition)
        key = match["key"].strip() if match else ""
        if match is None or not key:
            raise InputError(
                f"--filter {condition!r}: write KEY=VALUE, KEY!=VALUE, KEY>=VALUE or KEY<VALUE, as in type=skill"
            )
        problem = _add(found, key, match["operator"], _value(match["value"].strip()))
        if problem:
            raise InputError(f"--filter {condition!r}: {key} has {problem}")
    return found or None


def _value(text: str) -> Json:
    """Read JSON, except an object; any other text is a text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict) else value


def _add(found: JsonObject, key: str, operator: str, value: Json) -> str:
    """Add a condition; return what the key has already if the two cannot be combined."""
    held = found.get(key)
    if operator != "=":
        bounds = found.setdefault(key, {})
        if not isinstance(bounds, dict):
            return "a value already, and only = can be combined with ="
        if _OPERATORS[operator] in bounds:
            return f"a {operator} already; use --filters JSON for more"
        bounds[_OPERATORS[operator]] = value
    elif key not in found:
        found[key] = value
    elif isinstance(held, dict):
        return "another condition, and only = can be combined with ="
    else:
        found[key] = [*(held if isinstance(held, list) else [held]), *(value if isinstance(value, list) else [value])]
    return ""


class StoredModel:
    """Names the model whose vectors a command stores unchanged; it embeds nothing."""

    def __init__(self, model_name: str | None, dimension: int) -> None:
        self.model_name = model_name
        self.dimension = dimension

    def __call__(self, _text: str, /) -> NoReturn:
        """Refuse to embed."""
        raise EmbeddingError("this command stores given vectors and embeds nothing")


def open_existing(
    prefix: str, embedder: EmbedderName | None, index_type: IndexTypeName | None = None, *, as_served: bool = False
) -> AnyStore:
    """Open the store at ``prefix``; embedder None for commands that embed nothing.

    as_served: with DEVICE=auto, plan for a GPU as a long-running process would.

    Raises NotFoundError when there is none, and the errors of ``VectorStore`` and ``MilvusStore``.
    """
    if not exists(prefix):
        bare = prefix.removesuffix(".db")
        remedy = f"create one with: memevolve-store init --store {shlex.quote(bare)}"
        if bare != prefix and exists(bare):
            remedy = f"the prefix has no .db: use --store {shlex.quote(bare)}"
        raise NotFoundError(f"there is no store at {prefix!r}; {remedy}, or name another with --store")
    function = None if embedder is None else choose_embedder(embedder, stored_model(prefix))
    return open_or_create(prefix, function, index_type, as_served=as_served)


def open_local(prefix: str) -> VectorStore:
    """As :func:`open_existing` without an embedder, for operations on a store's files. Raises InputError for Milvus."""
    refuse_milvus(prefix)
    return cast("VectorStore", open_existing(prefix, None))


def refuse_milvus(prefix: str) -> None:
    """Raise InputError for a store on a server."""
    from ..utils.config import is_milvus_uri

    if is_milvus_uri(prefix):
        raise InputError(f"--store: {prefix} is on a Milvus server; use the tools of Milvus for this")


def exists(prefix: str) -> bool:
    """Whether there is a store at this prefix or address."""
    from ..backends import store_exists
    from ..utils.config import StorageConfig

    return store_exists(prefix, StorageConfig().replace(backend_type="vector"))


def open_or_create(
    prefix: str,
    function: EmbeddingFunction | None,
    index_type: IndexTypeName | None = None,
    metric: MetricName | None = None,
    *,
    as_served: bool = False,
    background: bool = False,
) -> AnyStore:
    """Open the store at ``prefix``, or create it and its folder.

    There is no background thread: a command maintains the store itself and shows a progress bar. With DEVICE=auto the
    index is built for the CPU, because one on a GPU would be lost when the command ends. A command that serves a store
    is different in both: as_served, background (as the settings say).
    """
    from ..backends import open_store
    from ..utils.config import StorageConfig, is_milvus_uri

    given = {"index_type": index_type, "metric": metric}
    config = StorageConfig()
    config = config.replace(
        background=background and config.background,
        **chosen,
        backend_type="vector",  # the prefix decides
        device="cpu" if config.device == "auto" and not as_served else config.device,
        **{name: value for name, value in given.items() if value is not None},
    )
    if not is_milvus_uri(prefix):
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    return open_store(prefix, function, storage_config=config)


def stored_model(prefix: str) -> str | None:
    """Name of the embedding model of the store's vectors; None without a store, or if the model has no name."""
    from ..utils.config import is_milvus_uri

    if is_milvus_uri(prefix):
        from ..backends import milvus_at
        from ..milvus.store import MilvusStore

        return MilvusStore.model_at(milvus_at(prefix))
    from ..records import Records

    facts = Records.peek(prefix)
    return None if facts is None else facts.model


def choose_embedder(name: EmbedderName, model: str | None) -> EmbeddingFunction:
    """Return the embedding function of that name.

    model: that of the store's vectors; ``auto`` continues a store of the hashing embedder with it.
    Raises ConfigurationError or EngineError when the function is not available.
    """
    from ..utils.config import EmbeddingConfig
    from ..utils.embeddings import HashingEmbedder, embedder_from_config

    hashing = re.fullmatch(r"hashing-lexical-([1-9]\d*)", model or "")
    if hashing and name in ("auto", "hashing"):
        return HashingEmbedder(int(hashing[1]))
    config = EmbeddingConfig() if name == "auto" else EmbeddingConfig().replace(provider=name)
    return embedder_from_config(config)


def _default_store() -> str:
    from ..utils.config import MilvusConfig, StorageConfig

    config = StorageConfig()
    if config.backend_type == "milvus":
        return MilvusConfig().address
    return str(dict(config).get("path") or DEFAULT_STORE)


def _stores(incomplete: str) -> list[str]:
    """Return the prefixes of the database files that begin so, for tab completion."""
    folder, name = os.path.split(incomplete)
    with contextlib.suppress(OSError):
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)  # noqa: PTH111
        found = [entry.name + "/" if entry.is_dir() else entry.name for entry in entries if entry.name.startswith(name)]
        return [os.path.join(folder, one.removesuffix(".db")) for one in found if one.endswith((".db", "/"))]  # noqa: PTH118
    return []


def _prefix(prefix: str) -> str:
    if not prefix.strip():  # such as an unset variable of a script, which must not lead to another store
        raise InputError("--store: the prefix is empty; give a path such as ./memory")
    return os.path.expanduser(prefix)  # noqa: PTH111 - a Milvus address is no path


def _file(path: str | None) -> str | None:
    return None if path is None else os.path.expanduser(path)  # noqa: PTH111 - as above


def file_argument(metavar: str, text: str) -> Any:
    """Return an argument that names a file or a store; ``~`` is expanded."""
    return typer.Argument(metavar=metavar, help=text, show_default=False, callback=_file)


Prefix = Annotated[
    str,
    typer.Option(
        "--store",
        "-s",
        envvar="MEMEVOLVE_STORE",
        default_factory=_default_store,
        autocompletion=_stores,
        callback=_prefix,
        show_default=False,
        metavar="PREFIX",
        help=f"Path prefix of the store's files.  \\[default: {DEFAULT_STORE}]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Embedder = Annotated[
    EmbedderName,
    typer.Option(
        "--embedder",
        "-e",
        metavar="NAME",
        help="Embeds texts: auto (by the settings and the model of the store), hashing, local or openai.",
    ),
]
Metric = Annotated[
    MetricName | None,
    typer.Option(
        "--metric",
        show_default=False,
        help="Distance of a new store; an existing one keeps its own.  \\[default: MEMEVOLVE_STORAGE_METRIC]",
    ),
]
IndexType = Annotated[
    IndexTypeName | None,
    typer.Option(
        "--index-type",
        show_default=False,
        help="Kind of index to build.  \\[default: MEMEVOLVE_STORAGE_INDEX_TYPE]",
    ),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        "-f",
        show_default=False,
        metavar="KEY=VALUE",
        help="Only units that match: type=skill, 'metadata.score>=0.5'. May be repeated; several values of one key "
        "match any of them.",
    ),
]
FilterJson = Annotated[
    str | None,
    typer.Option("--filters", show_default=False, metavar="JSON", help='The same as JSON: {"tags": ["git", "linux"]}.'),
]
