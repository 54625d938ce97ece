"""What may be kept: units are checked before anything is embedded or written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ...errors import InvalidUnitError
from ...types import MemoryUnit
from ...utils.plain import as_plain, plain_scalar, plain_text

__all__ = [
    "MAX_ID_CHARS",
    "MAX_UNIT_BYTES",
    "checked_id",
    "checked_unit",
    "is_id",
    "one_id",
    "text_to_embed",
    "texts_of",
    "unit_to_text",
]

MAX_UNIT_BYTES = 4 * 2**20
"""A unit whose JSON is longer is refused: memories are read into prompts, and one row must not stall the log."""

MAX_ID_CHARS = 1024


def checked_unit(unit: Any, where: str = "unit") -> MemoryUnit:
    """A copy of the unit in plain JSON values, which is what is stored, embedded and compared from here on.

    Tuples become lists; members of ``str`` and ``int`` enumerations, NumPy's scalars and moments in time become what
    :func:`~memevolve_gpu.utils.plain.plain_scalar` says. The caller may change the given unit afterwards.

    Raises InvalidUnitError, naming ``where`` and the remedy: no dict, keys that are no strings, values that JSON has
    no word for (NaN and infinity among them), an id that cannot be one, metadata that is no dict, too large.
    """
    if not isinstance(unit, dict):
        raise InvalidUnitError(f"{where} must be a dict, got {type(unit).__name__}; pass a JSON object")
    try:
        _check_keys(unit, where)
    except RecursionError:
        raise _too_deep(where) from None
    if unit.get("id") is not None:
        checked_id(unit["id"], f"{where}['id']")
    metadata = unit.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise InvalidUnitError(f"{where}['metadata'] must be a dict, got {type(metadata).__name__}")
    return _through_json(unit, where)


def checked_id(unit_id: Any, where: str = "unit_id") -> str:
    """The id as a plain string of 1 to MAX_ID_CHARS characters without NUL; else InvalidUnitError."""
    if not isinstance(unit_id, str):
        raise InvalidUnitError(f"{where} must be a string, got {type(unit_id).__name__}")
    if not unit_id or len(unit_id) > MAX_ID_CHARS or "\0" in unit_id:
        raise InvalidUnitError(f"{where} must have 1 to {MAX_ID_CHARS} characters and no NUL, got {unit_id[:40]!r}")
    return plain_text(unit_id)


def one_id(value: Any, batch: str) -> bool:
    """May ``value`` be looked up as an id? Several ids at once are a TypeError that names ``batch``."""
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        raise TypeError(f"unit_id must be one id, got a {type(value).__name__}; for several ids call {batch}")
    return is_id(value)


def is_id(value: object) -> TypeGuard[str]:
    """May ``value`` be looked up as an id? What cannot be one is not in the store."""
    return isinstance(value, str)


def unit_to_text(unit: Mapping[str, Any]) -> str:
    """The text that is embedded: content, reasoning, query, tags and type, joined by spaces."""
    parts = []
    if unit.get("content") is not None:
        parts.append(_spoken(unit["content"]))
    if unit.get("reasoning"):
        parts.append(f"Reasoning: {_spoken(unit['reasoning'])}")
    if unit.get("query"):
        parts.append(f"Query: {_spoken(unit['query'])}")
    if isinstance(unit.get("tags"), (list, tuple)):
        parts.append(" ".join(_spoken(tag) for tag in unit["tags"]))
    if unit.get("type") is not None:
        parts.append(_spoken(unit["type"]))
    return " ".join(part for part in parts if part)


def text_to_embed(unit: Mapping[str, Any], where: str = "unit") -> str:
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


def texts_of(units: Sequence[Mapping[str, Any]], *, to_embed: bool) -> list[str]:
    """The text of each unit of a batch, which must have one where it is ``to_embed``; see :func:`text_to_embed`."""
    if not to_embed:
        return [unit_to_text(unit) for unit in units]
    return [text_to_embed(unit, f"units[{i}]") for i, unit in enumerate(units)]


_OTHER_TEXT_KEYS = ("text", "page_content", "message", "document", "body", "memory", "summary", "description")


def _holds_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (dict, list)) and bool(value)


def _spoken(value: Any) -> str:
    return str(plain_scalar(value))


def _check_keys(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InvalidUnitError(f"{where} has the key {key!r}; JSON keys are strings: use {str(key)!r}")
            if "\0" in key:
                raise InvalidUnitError(
                    f"{where} has a key with NUL, {key[:40]!r}; no filter could name it: leave NUL out"
                )
            if isinstance(inner, (dict, list, tuple)):
                _check_keys(inner, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            if isinstance(inner, (dict, list, tuple)):
                _check_keys(inner, where)


def _too_deep(where: str) -> InvalidUnitError:
    return InvalidUnitError(f"{where} is nested too deeply or contains itself; flatten it")


def _through_json(unit: MemoryUnit, where: str) -> MemoryUnit:
    try:
        text = json.dumps(unit, ensure_ascii=False, allow_nan=False, default=as_plain)
        size = len(text.encode())
        plain: MemoryUnit = json.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except (TypeError, ValueError) as error:
        raise InvalidUnitError(f"{where} cannot be kept as JSON: {error}; use plain JSON values") from error
    if size > MAX_UNIT_BYTES:
        raise InvalidUnitError(f"{where} has {size} bytes as JSON, the most is {MAX_UNIT_BYTES}; split it")
    return plain
