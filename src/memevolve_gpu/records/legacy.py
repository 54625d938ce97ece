"""Units out of MemEvolve's old ``<prefix>.data``, a pickle, without running anything that is in it.

Bounded are the file, its instructions, the depth and size of a unit, and how far values that the file shares may
unfold. The old ``<prefix>.index`` is never opened: its positions are what went wrong.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LegacyImportError
from ..types import MemoryUnit
from ..utils.plain_pickle import PlainReader, RefusedError

__all__ = ["MAX_FILE_BYTES", "LegacyStore", "read_legacy"]

MAX_FILE_BYTES = 512 * 2**20
"""The old store rewrote the whole file at every change and never grew this far."""

_MAX_DEPTH = 100
_VALUE_SIZE = 16
_MAX_UNIT_SIZE = 16 * 2**20
"""Size of one unit: its characters, and 16 for every value, whether text or not."""

_MAX_UNFOLDING = 32
_FREE_UNFOLDING = 64 * 2**20
_LARGEST_UNFOLDING = 4 * 2**30
"""Values that the file holds once and uses often may unfold to 32 times the file, within these two sizes."""

_MAX_PROBLEMS = 1000


@dataclass(frozen=True, slots=True)
class LegacyStore:
    """What an old store held.

    ``units`` in their old order, each a fresh dict with its ``id``, not validated any further; ``source`` the file;
    ``problems`` one sentence for everything that was left out or changed, at most 1,001.
    """

    units: list[MemoryUnit]
    source: Path
    problems: list[str]


def read_legacy(prefix: str | Path) -> LegacyStore | None:
    """Read ``<prefix>.data``, None when there is no such file. The file is only read.

    It holds a dict of id to unit, or a dict whose ``data`` is one. Tuples and sets become lists, keys that are numbers
    become text; where a key and the unit's own id differ, the key wins.

    Raises LegacyImportError, naming the file and the reason, when it cannot be read, is too large, is no pickle, is cut
    off, or asks for anything but plain values.
    """
    source = Path(f"{prefix}.data")
    data = _read(source)
    if data is None:
        return None
    reader = PlainReader(data)
    try:
        loaded = reader.run()
        problems = _Problems()
        _report(reader, len(data), problems)
        return LegacyStore(_units(_unwrapped(loaded), _Copier(len(data)), problems), source, problems.listed())
    except RefusedError as refusal:
        raise LegacyImportError(f"{source}: {refusal}; it was left as it is, and nothing was imported") from None
    except (IndexError, KeyError, ValueError, struct.error) as error:
        reason = f"damaged or no pickle at byte {reader.at} ({type(error).__name__}: {error})"
        raise LegacyImportError(f"{source}: {reason}; restore it from a backup or move it away") from error


class _UnfitUnitError(Exception):
    """One unit cannot be taken; the others can."""


def _read(source: Path) -> bytes | None:
    try:
        if not stat.S_ISREG(source.stat().st_mode):
            raise LegacyImportError(f"{source}: no regular file; move it away")
        with source.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LegacyImportError(
            f"{source}: cannot be read ({error.strerror}); make it readable or move it away"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise LegacyImportError(f"{source}: larger than {MAX_FILE_BYTES} bytes; split it or move it away")
    return data


@dataclass
class _Problems:
    """Sentences for the operator; those beyond a bound are only counted."""

    kept: list[str] = field(default_factory=list)
    more: int = 0

    def add(self, sentence: str) -> None:
        if len(self.kept) < _MAX_PROBLEMS:
            self.kept.append(sentence)
        else:
            self.more += 1

    def listed(self) -> list[str]:
        return [*self.kept, f"and {self.more} more"] if self.more else self.kept


def _report(reader: PlainReader, size: int, problems: _Problems) -> None:
    if reader.at < size:
        problems.add(f"{size - reader.at} bytes after the end of the pickle were ignored")
    if reader.clashes:
        problems.add(f"{reader.clashes} values were left out: their keys, numbers, are keys as text as well")


def _unwrapped(loaded: object) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise RefusedError(f"holds a {type(loaded).__name__} where a dict of units is expected")
    inner = loaded.get("data")
    if isinstance(inner, dict) and not any(isinstance(inner.get(key), str) for key in ("id", "type", "content")):
        return inner
    return loaded  # one whose ``data`` looks like a unit is a store with a unit of that id


def _units(loaded: dict[str, Any], copier: _Copier, problems: _Problems) -> list[MemoryUnit]:
    units = []
    for key, value in loaded.items():
        try:
            unit = copier.unit(value)
        except _UnfitUnitError as reason:
            problems.add(f"unit {_short(key)} was left out: {reason}")
            continue
        if unit.get("id", key) != key:
            problems.add(f"unit {_short(key)} called itself {_short(unit['id'])}; the key was kept")
        units.append({**unit, "id": key})
    return units


class _Copier:
    """Copies units so that none shares a part with another, and notices those that unfold without end."""

    def __init__(self, file_bytes: int) -> None:
        self._left = min(max(_FREE_UNFOLDING, _MAX_UNFOLDING * file_bytes), _LARGEST_UNFOLDING)
        self._unit_left = 0

    def unit(self, value: object) -> MemoryUnit:
        if not isinstance(value, dict):
            raise _UnfitUnitError(f"it is a {type(value).__name__}, no dict")
        self._unit_left = _MAX_UNIT_SIZE
        unit: MemoryUnit = self._copy(value, 0)
        return unit

    def _copy(self, value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise _UnfitUnitError(f"it is nested more than {_MAX_DEPTH} deep or contains itself")
        self._spend(_VALUE_SIZE + (len(value) if isinstance(value, str) else 0))
        if isinstance(value, dict):
            self._spend(sum(map(len, value)))
            return {key: self._copy(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._copy(inner, depth + 1) for inner in value]
        if isinstance(value, bytes):
            raise _UnfitUnitError("it holds bytes, which JSON has no word for")
        return value

    def _spend(self, size: int) -> None:
        self._left -= size
        self._unit_left -= size
        if self._left < 0:
            raise RefusedError("its shared values unfold to many times the file's size")
        if self._unit_left < 0:
            raise _UnfitUnitError(f"its values unfold beyond {_MAX_UNIT_SIZE} characters")


def _short(value: object) -> str:
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."
