"""Parse the timestamps of units: ISO 8601 in its usual forms, and MemEvolve's ``...+00:00Z``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone

_OFFSET = re.compile(r"[+-]\d\d:?\d\d$")
_SHORT_OFFSET = re.compile(r"(?<=\d[+-]\d\d)(?=\d\d$)")
_FRACTION = re.compile(r"\.(\d+)")


_EPOCH, _MICRO = datetime(1970, 1, 1, tzinfo=timezone.utc), timedelta(microseconds=1)
_DATED = re.compile(r"\d{4}-\d\d-\d\d(?:\Z|[T ]\d\d:)", re.ASCII)


def moment_of(value: object) -> datetime | None:
    """The moment of an ISO 8601 text; None for anything else. Without an offset it is taken as UTC."""
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text[-1:] in ("Z", "z"):
        text = text[:-1] if _OFFSET.search(text[:-1]) else text[:-1] + "+00:00"
    text = _SHORT_OFFSET.sub(":", text)
    text = _FRACTION.sub(lambda found: "." + found[1][:6].ljust(6, "0"), text, count=1)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)


def parse_stamp(value: object) -> float | None:
    """Unix time of an ISO 8601 text; None for anything else. Without an offset it is taken as UTC."""
    try:
        moment = moment_of(value)
        return None if moment is None else moment.timestamp()
    except OverflowError:
        return None


def micros_of(text: str) -> int | None:
    """Microseconds since 1970 of a text that says a date, or a date and a time, in ISO 8601; None for other texts."""
    if not _DATED.match(text):
        return None
    try:
        moment: datetime | None = datetime.fromisoformat(text)  # most texts, in a tenth of the time
    except ValueError:
        moment = moment_of(text)
    if moment is None:
        return None
    return ((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)) - _EPOCH) // _MICRO


def age_stamp(unit: Mapping[str, object]) -> float | None:
    """Unix time of ``metadata.created_at``; None when it is missing or unreadable."""
    metadata = unit.get("metadata")
    return parse_stamp(metadata.get("created_at")) if isinstance(metadata, Mapping) else None


def now_text() -> str:
    """Now, as ISO 8601 in UTC with its offset."""
    return datetime.now(timezone.utc).isoformat()
