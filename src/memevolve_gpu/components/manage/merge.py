"""Several units become one that says what they said and where it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...types import MemoryUnit
from ..stamps import now_text, parse_stamp

__all__ = ["MAX_CHARACTERS", "merged_unit", "portions"]

MAX_CHARACTERS = 8000
"""Characters of a merged content: about what embedding models read of a text before they cut it off."""

SOURCES_NAMED = 1000
"""Ids of sources that a merged unit names at most; their number is exact."""

_TEXTS = ("content", "reasoning", "query")
_OWN = ("consolidated_from", "consolidated_count", "consolidated_at", "first_created_at", "last_created_at")


def merged_unit(units: Sequence[MemoryUnit]) -> MemoryUnit:
    """One unit, without an id, of two or more, oldest first.

    Distinct texts are joined by an empty line, tags are united, ``type`` is the most frequent. Of other fields, and of
    ``metadata``, the newest value stays. ``metadata`` says whence: ``consolidated_from`` (ids, those of earlier merges
    included), ``consolidated_count``, ``first_created_at`` and ``last_created_at`` (the span of the sources),
    ``consolidated_at``. ``created_at`` is that of the newest source, so that merging makes nothing younger.
    """
    merged: MemoryUnit = {}
    for unit in units:
        merged.update({key: value for key, value in unit.items() if key != "id"})
    merged.update({key: _joined(units, key) for key in _TEXTS if any(unit.get(key) for unit in units)})
    types = Counter(unit["type"] for unit in units if isinstance(unit.get("type"), str))
    if types:
        merged["type"] = types.most_common(1)[0][0]
    tags = [tag for unit in units if isinstance(unit.get("tags"), list) for tag in unit["tags"]]
    merged["tags"] = list({repr(tag): tag for tag in tags}.values())
    merged["metadata"] = _metadata(units)
    return merged


def portions(units: Iterable[MemoryUnit], most: int = MAX_CHARACTERS) -> Iterator[list[MemoryUnit]]:
    """Cut into runs of two or more whose joined contents have at most ``most`` characters; others are left out."""
    run: list[MemoryUnit] = []
    length = 0
    for unit in units:
        size = len(str(unit.get("content") or "")) + 2
        if run and length + size > most:
            if len(run) > 1:
                yield run
            run, length = [], 0
        run.append(unit)
        length += size
    if len(run) > 1:
        yield run


def _joined(units: Sequence[MemoryUnit], key: str) -> str:
    texts = [str(unit[key]).strip() for unit in units if unit.get(key)]
    return "\n\n".join(dict.fromkeys(texts))


def _metadata(units: Sequence[MemoryUnit]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for unit in units:
        found.update({key: value for key, value in _metadata_of(unit).items() if key not in _OWN})
    sources = [source for unit in units for source in _sources(unit)]
    found["consolidated_from"] = list(dict.fromkeys(sources))[:SOURCES_NAMED]
    found["consolidated_count"] = sum(_counted(unit) for unit in units)
    first, last = _span(units)
    if first is not None and last is not None:
        found.update(created_at=last, first_created_at=first, last_created_at=last)
    found["consolidated_at"] = now_text()
    return found


def _metadata_of(unit: MemoryUnit) -> dict[str, Any]:
    metadata = unit.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _sources(unit: MemoryUnit) -> list[str]:
    """The units that it was merged from, else itself."""
    sources = _metadata_of(unit).get("consolidated_from")
    named = [source for source in sources if isinstance(source, str)] if isinstance(sources, list) else []
    return named or [str(unit.get("id", ""))]


def _counted(unit: MemoryUnit) -> int:
    count = _metadata_of(unit).get("consolidated_count")
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else len(_sources(unit))


def _span(units: Sequence[MemoryUnit]) -> tuple[str | None, str | None]:
    """``created_at`` of the oldest and of the newest unit that was ever merged into these."""
    stamps: list[tuple[float, str]] = []
    for unit in units:
        held = _metadata_of(unit)
        for key in ("first_created_at", "created_at", "last_created_at"):
            moment = parse_stamp(held.get(key))
            if moment is not None:
                stamps.append((moment, held[key]))
    return (min(stamps)[1], max(stamps)[1]) if stamps else (None, None)
