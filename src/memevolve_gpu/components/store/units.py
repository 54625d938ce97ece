"""Checks and embeds what callers give: units, ids, vectors, and the arguments of searches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeGuard, TypeVar

from ...errors import EmbeddingError, InvalidQueryError, InvalidUnitError
from ...records.transaction import EncodedUnit
from ...types import FloatArray, Json, JsonObject, MemoryUnit, Metric, Vectors
from ...utils.arguments import listed, shown, whole_number
from ...utils.embeddings import Embedder
from ...utils.plain import json_text, plain_scalar, plain_text
from ...utils.vectors import check_vector, check_vectors
from .base import Progress, StorageBackend

_Backend = TypeVar("_Backend", bound="OpenBackend")

MAX_UNIT_BYTES = 4 * 2**20
"""A unit whose JSON is longer is refused: memories are read into prompts, and one row must not stall the log."""

MAX_ID_CHARS = 1024

MAX_RESULTS = 10_000_000
"""Most results of one ``search_vectors``, queries times ``top_k``: 120 MB of distances and positions, and the ids."""


MAX_LEVELS = 100
"""Most dicts and lists within each other in a unit; parsers and writers of JSON stop at about 200."""


def checked_unit(unit: object, where: str = "unit") -> MemoryUnit:
    """A copy of the unit in plain JSON values, which is what is stored, embedded and compared from here on.

    Tuples become lists; members of ``str`` and ``int`` enumerations, NumPy's scalars and moments in time become what
    :func:`~memevolve_gpu.utils.plain.plain_scalar` says. The caller may change the given unit afterwards.

    Raises InvalidUnitError, naming ``where`` and the remedy: no dict, keys that are no strings, values that JSON has
    no word for (NaN and infinity among them), an id that cannot be one, metadata that is no dict, too large.
    """
    plain = plain_unit(unit, where)
    encoded(plain, where)
    return plain


def checked_units(units: object) -> list[MemoryUnit]:
    """Each unit of a batch as :func:`checked_unit` returns it."""
    return [checked_unit(unit, f"units[{i}]") for i, unit in enumerate(listed("units", units, InvalidUnitError))]


def plain_unit(unit: object, where: str = "unit") -> MemoryUnit:
    """As :func:`checked_unit`, except that :func:`encoded` refuses what is too large or has no form in JSON."""
    if not isinstance(unit, dict):
        raise InvalidUnitError(f"{where} must be a dict, got {type(unit).__name__}; pass a JSON object")
    try:
        plain: MemoryUnit = _plain_dict(unit, where)
    except RecursionError:
        raise _too_deep(where) from None
    if unit.get("id") is not None:
        checked_id(unit["id"], f"{where}['id']")
    metadata = unit.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise InvalidUnitError(f"{where}['metadata'] must be a dict, got {type(metadata).__name__}")
    return plain


def checked_id(unit_id: object, where: str = "unit_id") -> str:
    """The id as a plain string of 1 to MAX_ID_CHARS characters without NUL; else InvalidUnitError."""
    if not isinstance(unit_id, str):
        raise InvalidUnitError(f"{where} must be a string, got {type(unit_id).__name__}")
    if not unit_id or len(unit_id) > MAX_ID_CHARS or "\0" in unit_id:
        raise InvalidUnitError(f"{where} must have 1 to {MAX_ID_CHARS} characters and no NUL, got {unit_id[:40]!r}")
    return plain_text(unit_id)


def one_id(value: object, batch: str) -> bool:
    """May ``value`` be looked up as an id? Several ids at once are a TypeError that names ``batch``."""
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        raise TypeError(f"unit_id must be one id, got a {type(value).__name__}; for several ids call {batch}")
    return is_id(value)


def is_id(value: object) -> TypeGuard[str]:
    """May ``value`` be looked up as an id? What cannot be one is not in the store."""
    return isinstance(value, str)


class OpenBackend(StorageBackend):
    """A backend that is opened and closed, and embeds the text of units."""

    @abstractmethod
    def close(self) -> None:
        """Release what the backend holds."""

    def __enter__(self: _Backend) -> _Backend:
        """Return the store itself."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """Close the store."""
        self.close()

    def _unit_to_text(self, unit: MemoryUnit) -> str:
        """Return the text that is embedded: content, then reasoning, query, tags and type."""
        return unit_to_text(unit)


class UnitMapping(Mapping[str, MemoryUnit]):
    """id -> unit, read from the backend at each access."""

    def __init__(self, backend: StorageBackend, ids: Callable[[], Iterator[str]]) -> None:
        self._backend = backend
        self._ids = ids

    def __getitem__(self, unit_id: str) -> MemoryUnit:
        unit = self._backend.retrieve_batch([unit_id]).get(unit_id) if unit_id in self._backend else None
        if unit is None:
            raise KeyError(unit_id)
        return unit

    def __contains__(self, unit_id: object) -> bool:
        return unit_id in self._backend

    def __iter__(self) -> Iterator[str]:
        return self._ids()

    def __len__(self) -> int:
        return self._backend.count()

    def __repr__(self) -> str:
        return f"<{len(self)} memory units>"


class UnitEmbedder:
    """Embeds the texts of units and queries for one store, and checks vectors that are given instead."""

    def __init__(self, embedder: Embedder | None, dim: int, metric: Metric) -> None:
        """``embedder`` is None for a store that was opened without a function."""
        self.embedder, self._dim, self._metric = embedder, dim, metric

    def embed(self, text: str) -> FloatArray:
        """Embed the text of a unit: float32 (dim,)."""
        vector = self._required().embed(text)
        if self._metric == "cosine":  # everything else about it has been checked
            check_vector(vector, self._dim, "cosine")
        return vector

    def embed_query(self, text: str) -> FloatArray:
        """Embed a query: float32 (dim,)."""
        return check_vector(self._required().embed_query(text), self._dim, self._metric, name="query")

    def vectors_for(self, texts: list[str], embeddings: Vectors | None, progress: Progress | None) -> FloatArray:
        """Check the given vectors, or embed the texts: float32 (n, dim)."""
        if embeddings is None:
            report = None if progress is None else (lambda done, of: progress("embed", done / of))
            embeddings = self._required().embed_many(texts, report)
        vectors = check_vectors(embeddings, self._dim, self._metric)
        if len(vectors) != len(texts):
            raise EmbeddingError(f"embeddings has {len(vectors)} rows for {len(texts)} units; pass one row per unit")
        return vectors

    def _required(self) -> Embedder:
        if self.embedder is None:
            raise EmbeddingError("embedding_function is None: open the store with one, or give embeddings")
        return self.embedder


def looked_up(ids: Sequence[str]) -> list[str]:
    """The distinct ids that can be looked up, in order."""
    return list(dict.fromkeys(plain_text(unit_id) for unit_id in listed("ids", ids) if is_id(unit_id)))


def with_id(unit: object, unit_id: str) -> Json:
    """A copy of the unit with that id; what is no unit stays as it is, for ``checked_unit`` to refuse."""
    return {**unit, "id": unit_id} if isinstance(unit, dict) else unit


def check_arguments(top_k: object, recall: object, query: object = "") -> int:
    """``top_k`` as an int; InvalidQueryError for what no search can answer."""
    if not isinstance(query, str):
        raise InvalidQueryError(f"query must be a string, got {type(query).__name__}; see search_vectors")
    wanted = whole_number("top_k", top_k)
    if recall is not None and (isinstance(recall, bool) or not isinstance(recall, (int, float)) or not 0 < recall <= 1):
        raise InvalidQueryError(f"recall must be a number above 0 and at most 1, got {shown(recall)}")
    return wanted


def check_width(queries: int, top_k: int) -> None:
    """Raise InvalidQueryError where so many queries with so many results each are more than one call may return."""
    if queries * top_k > MAX_RESULTS:
        raise InvalidQueryError(
            f"top_k={shown(top_k)} for {queries} queries are more than {MAX_RESULTS:,} results; ask for fewer, or "
            "for fewer queries at once"
        )


def unit_to_text(unit: MemoryUnit) -> str:
    """The text that is embedded: content, reasoning, query, tags and type, joined by spaces."""
    content, reasoning, query, tags, kind = map(unit.get, ("content", "reasoning", "query", "tags", "type"))
    parts = [
        "" if content is None else _spoken(content),
        f"Reasoning: {_spoken(reasoning)}" if reasoning else "",
        f"Query: {_spoken(query)}" if query else "",
        " ".join(map(_spoken, tags)) if isinstance(tags, (list, tuple)) else "",
        "" if kind is None else _spoken(kind),
    ]
    return " ".join(filter(None, parts))


def text_to_embed(unit: MemoryUnit, where: str = "unit") -> str:
    """As :func:`unit_to_text`, for a unit whose vector is to be made of it.

    Raises InvalidUnitError, naming ``where`` and the key to use, where the text that was meant is not in it: content,
    reasoning and query hold none, and neither do tags and type, or the text is under a key that is not embedded.
    """
    if any(_holds_text(unit.get(key)) for key in ("content", "reasoning", "query")):
        return unit_to_text(unit)
    elsewhere = next((key for key in _OTHER_TEXT_KEYS if _holds_text(unit.get(key))), None)
    if elsewhere is not None:
        raise InvalidUnitError(f"{where} has its text under {elsewhere!r}, which is not embedded; use 'content'")
    if unit.get("content") is not None and not isinstance(unit["content"], (str, dict, list)):
        raise InvalidUnitError(f"{where}['content'] is a {type(unit['content']).__name__}; 'content' must be a text")
    if not _holds_text(unit.get("tags")) and not _holds_text(unit.get("type")):
        raise InvalidUnitError(f"{where} has no text to embed, so nothing could find it; put one under 'content'")
    return unit_to_text(unit)


def texts_of(units: Sequence[MemoryUnit], *, to_embed: bool) -> list[str]:
    """The text of each unit of a batch, which must have one where it is ``to_embed``; see :func:`text_to_embed`."""
    if not to_embed:
        return [unit_to_text(unit) for unit in units]
    return [text_to_embed(unit, f"units[{i}]") for i, unit in enumerate(units)]


_OTHER_TEXT_KEYS = ("text", "page_content", "message", "document", "body", "memory", "summary", "description")


def _holds_text(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (dict, list)) and bool(value)


def _spoken(value: object) -> str:
    return value if type(value) is str else str(plain_scalar(value))


def _plain_dict(value: dict[Json, Json], where: str, level: int = 1) -> JsonObject:
    """A copy in which every value is one of JSON, except those that JSON has no word for."""
    if level > MAX_LEVELS:
        raise RecursionError
    made: JsonObject = {}
    for key, inner in value.items():
        name = key if type(key) is str and "\0" not in key else _checked_key(key, where)
        if type(inner) in _SCALARS:
            made[name] = inner
        elif isinstance(inner, dict):
            made[name] = _plain_dict(inner, f"{where}[{key!r}]", level + 1)
        elif isinstance(inner, (list, tuple)):
            made[name] = _plain_list(inner, where, level + 1)
        else:
            made[name] = plain_scalar(inner)
    return made


def _checked_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise InvalidUnitError(f"{where} has the key {key!r}; JSON keys are strings: use {str(key)!r}")
    if "\0" in key:
        raise InvalidUnitError(f"{where} has a key with NUL, {key[:40]!r}; no filter could name it: leave NUL out")
    return plain_text(key)


_SCALARS = frozenset({str, int, float, bool, type(None)})


def _plain_list(values: list[Json] | tuple[Json, ...], where: str, level: int) -> list[Json]:
    if level > MAX_LEVELS:
        raise RecursionError
    return [
        value
        if type(value) in _SCALARS
        else _plain_dict(value, where, level + 1)
        if isinstance(value, dict)
        else _plain_list(value, where, level + 1)
        if isinstance(value, (list, tuple))
        else plain_scalar(value)
        for value in values
    ]


def _too_deep(where: str) -> InvalidUnitError:
    return InvalidUnitError(f"{where} is nested more than {MAX_LEVELS} levels deep or contains itself; flatten it")


def encoded(unit: MemoryUnit, where: str = "unit", dated: bool = False) -> EncodedUnit:
    """The unit with the JSON text that is stored. Raises InvalidUnitError where it is too large, or there is none."""
    try:
        text = json_text(unit)
        size = len(text) if text.isascii() else len(text.encode())
    except RecursionError:
        raise _too_deep(where) from None
    except (TypeError, ValueError) as error:
        raise InvalidUnitError(f"{where} cannot be kept as JSON: {error}; use plain JSON values") from error
    if size > MAX_UNIT_BYTES:
        raise InvalidUnitError(f"{where} has {size} bytes as JSON, the most is {MAX_UNIT_BYTES}; split it")
    return EncodedUnit.of(unit, text, dated)
