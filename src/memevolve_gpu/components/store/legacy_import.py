"""Import a store of MemEvolve: a safe reader for its pickle, and the one-time import at the same prefix.

Python's own unpickler is not used: it allocates for any memo number that a file names, hashes keys of any type, and
cannot bound the number of instructions. This one knows the part of the format that builds dicts, lists, tuples, sets,
strings, bytes, numbers, booleans and None (protocols 0 to 5) and refuses the rest: it cannot import, call, build or
look up anything. Tuples and sets become lists; keys become text.

The instructions and their encodings are those that the standard library documents in ``pickletools``.

Bounded are the file, its instructions, the depth and size of a unit, and how far values that the file shares may
unfold. The old ``<prefix>.index`` is never opened: its positions may belong to other units.
"""

from __future__ import annotations

import json
import logging
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import CapacityError, EmbeddingError, InvalidUnitError, InvalidVectorError, LegacyImportError
from ...live.delta_buffer import row_bytes
from ...monitoring.events import EventLog
from ...records.records import Records
from ...types import FloatArray, MemoryUnit
from ...utils.embeddings import Embedder
from ...utils.vectors import check_vectors
from .units import checked_unit, unit_to_text

__all__ = ["LegacyStore", "Limits", "PlainReader", "RefusedError", "import_legacy", "read_legacy"]

MAX_INSTRUCTIONS = 20_000_000
"""Bounds time, and memory to 2 GB: each takes at most some 90 bytes beyond its text. A unit has about 50 of them."""

_MAX_NUMBER_BYTES = 1024
_MAX_NUMBER_DIGITS = 2048
_LATEST_PROTOCOL = 5


class RefusedError(Exception):
    """The file holds something that is not read."""


class PlainReader:
    """A stack machine over one pickle; use it once.

    ``at`` is the position of the next byte; ``clashes`` counts the values that were left out because their keys,
    numbers, equal another key as text.
    """

    def __init__(self, data: bytes) -> None:
        self.at = 0
        self.clashes = 0
        self._data = data
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        """Return the value that the pickle holds; parts that it shares stay shared.

        Raises RefusedError when it asks for more than plain values or is too large, and IndexError, KeyError,
        ValueError or struct.error when it is damaged or no pickle at all.
        """
        data, handlers = self._data, _HANDLERS
        for _ in range(MAX_INSTRUCTIONS):
            code = data[self.at]
            self.at += 1
            handler = handlers.get(code)
            if handler is not None:
                handler(self)
            elif code == _STOP:
                return self._stack.pop()
            else:
                self._refuse(code)
        raise RefusedError(f"has more than {MAX_INSTRUCTIONS} instructions")

    def _refuse(self, code: int) -> None:
        if code in (_GLOBAL, _STACK_GLOBAL):
            raise RefusedError(f"refers to the Python object {self._named(code)}, and only plain values are read")
        if code in _FORBIDDEN:
            raise RefusedError(f"wants to run Python code ({_FORBIDDEN[code]}), and only plain values are read")
        raise ValueError(f"unknown instruction 0x{code:02x}")

    def _named(self, code: int) -> str:
        parts = [self._line().decode("latin-1") for _ in range(2)] if code == _GLOBAL else self._stack[-2:]
        return ".".join(part[:60] if isinstance(part, str) else "?" for part in parts)

    # what is read

    def _take(self, count: int) -> bytes:
        end = self.at + count
        taken = self._data[self.at : end]
        if count < 0 or len(taken) != count:
            raise ValueError("the file is cut off")
        self.at = end
        return taken

    def _line(self) -> bytes:
        end = self._data.index(b"\n", self.at)
        line = self._data[self.at : end]
        self.at = end + 1
        return line

    def _number(self, layout: struct.Struct) -> Any:
        value = layout.unpack_from(self._data, self.at)[0]
        self.at += layout.size
        return value

    # what is built

    def push(self, value: object) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def _popped(self) -> list[Any]:
        """Remove and return everything since the last mark."""
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def pop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def pop_mark(self) -> None:
        self._popped()

    def duplicate(self) -> None:
        self.push(self._stack[-1])

    def list_of(self, count: int) -> None:
        items = self._stack[-count:]
        if len(items) != count:
            raise IndexError("too few values on the stack")
        self._stack[-count:] = [items]

    def list_since_mark(self) -> None:
        self.push(self._popped())

    def dict_since_mark(self) -> None:
        items = self._popped()
        self.push({})
        self._set_items(items)

    def append(self) -> None:
        value = self._stack.pop()
        self._top_list().append(value)

    def extend(self) -> None:
        items = self._popped()
        self._top_list().extend(items)

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def set_items(self) -> None:
        self._set_items(self._popped())

    def _top_list(self) -> list[Any]:
        top = self._stack[-1]
        if not isinstance(top, list):
            raise ValueError(f"a {type(top).__name__} is filled like a list")
        return top

    def _set_items(self, items: list[Any]) -> None:
        top = self._stack[-1]
        if not isinstance(top, dict) or len(items) % 2:
            raise ValueError(f"a {type(top).__name__} is filled with {len(items)} keys and values")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):
                top[key] = value
            else:
                self._set_under_text(top, key, value)

    def _set_under_text(self, target: dict[str, Any], key: object, value: object) -> None:
        """Keys of JSON are text, and the hashes of text cannot be made to collide."""
        if key is not None and not isinstance(key, (int, float)):
            raise RefusedError(f"has a key of type {type(key).__name__}, and only text and numbers can be keys")
        text = str(key)
        if text in target:
            self.clashes += 1
        else:
            target[text] = value

    # numbers, texts and the memo

    def push_int_line(self) -> None:
        line = self._line()
        booleans = {b"00": False, b"01": True}  # as protocol 0 writes them
        self.push(booleans[line] if line in booleans else _whole_number(line))

    def push_long_line(self) -> None:
        self.push(_whole_number(self._line().removesuffix(b"L")))

    def push_long(self, layout: struct.Struct) -> None:
        count = self._number(layout)
        if count > _MAX_NUMBER_BYTES:
            raise RefusedError(f"has a whole number of {count} bytes, the most is {_MAX_NUMBER_BYTES}")
        self.push(int.from_bytes(self._take(count), "little", signed=True))

    def push_float_line(self) -> None:
        self.push(float(self._line()))

    def push_number(self, layout: struct.Struct) -> None:
        self.push(self._number(layout))

    def push_text(self, layout: struct.Struct) -> None:
        self.push(self._take(self._number(layout)).decode("utf-8", "surrogatepass"))

    def push_text_line(self) -> None:
        self.push(self._line().decode("raw-unicode-escape"))

    def push_bytes(self, layout: struct.Struct) -> None:
        self.push(self._take(self._number(layout)))

    def push_old_text(self, layout: struct.Struct) -> None:
        self.push(_python2_text(self._take(self._number(layout))))

    def push_old_text_line(self) -> None:
        quoted = self._line().strip()
        if len(quoted) < 2 or quoted[:1] not in (b"'", b'"') or quoted[-1:] != quoted[:1]:
            raise ValueError("a text without its quotes")
        self.push(_python2_text(quoted[1:-1].decode("unicode-escape").encode("latin-1")))

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def put(self, layout: struct.Struct) -> None:
        self._memo[self._number(layout)] = self._stack[-1]

    def put_line(self) -> None:
        self._memo[_whole_number(self._line())] = self._stack[-1]

    def get(self, layout: struct.Struct) -> None:
        self.push(self._memo[self._number(layout)])

    def get_line(self) -> None:
        self.push(self._memo[_whole_number(self._line())])

    def protocol(self) -> None:
        version = self._take(1)[0]
        if version > _LATEST_PROTOCOL:
            raise ValueError(f"pickle protocol {version} is unknown")

    def frame(self) -> None:
        self._number(_U8)


def _whole_number(digits: bytes) -> int:
    if len(digits) > _MAX_NUMBER_DIGITS:
        raise RefusedError(f"has a whole number of {len(digits)} digits, the most is {_MAX_NUMBER_DIGITS}")
    return int(digits)


def _python2_text(data: bytes) -> str:
    """Decode a text of Python 2, whose encoding is not known."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


_Handler = Callable[[PlainReader], None]
_U1, _U2, _U4, _U8, _I4, _F8 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q", "<i", ">d"))
_STOP, _GLOBAL, _STACK_GLOBAL = ord("."), ord("c"), 0x93
_FORBIDDEN = {
    ord("R"): "REDUCE",
    ord("b"): "BUILD",
    ord("i"): "INST",
    ord("o"): "OBJ",
    ord("P"): "PERSID",
    ord("Q"): "BINPERSID",
    0x81: "NEWOBJ",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x92: "NEWOBJ_EX",
    0x96: "BYTEARRAY8",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}


def _with(method: Callable[[PlainReader, Any], None], argument: Any) -> _Handler:
    return lambda reader: method(reader, argument)


_HANDLERS: dict[int, _Handler] = {
    ord("("): PlainReader.mark,
    ord("0"): PlainReader.pop,
    ord("1"): PlainReader.pop_mark,
    ord("2"): PlainReader.duplicate,
    ord("N"): lambda reader: reader.push(None),
    0x88: lambda reader: reader.push(True),
    0x89: lambda reader: reader.push(False),
    ord("I"): PlainReader.push_int_line,
    ord("L"): PlainReader.push_long_line,
    ord("F"): PlainReader.push_float_line,
    ord("J"): _with(PlainReader.push_number, _I4),
    ord("K"): _with(PlainReader.push_number, _U1),
    ord("M"): _with(PlainReader.push_number, _U2),
    ord("G"): _with(PlainReader.push_number, _F8),
    0x8A: _with(PlainReader.push_long, _U1),
    0x8B: _with(PlainReader.push_long, _I4),
    ord("S"): PlainReader.push_old_text_line,
    ord("T"): _with(PlainReader.push_old_text, _I4),
    ord("U"): _with(PlainReader.push_old_text, _U1),
    ord("V"): PlainReader.push_text_line,
    ord("X"): _with(PlainReader.push_text, _U4),
    0x8C: _with(PlainReader.push_text, _U1),
    0x8D: _with(PlainReader.push_text, _U8),
    ord("B"): _with(PlainReader.push_bytes, _U4),
    ord("C"): _with(PlainReader.push_bytes, _U1),
    0x8E: _with(PlainReader.push_bytes, _U8),
    ord("]"): lambda reader: reader.push([]),
    ord(")"): lambda reader: reader.push([]),
    0x8F: lambda reader: reader.push([]),
    ord("}"): lambda reader: reader.push({}),
    ord("l"): PlainReader.list_since_mark,
    ord("t"): PlainReader.list_since_mark,
    0x91: PlainReader.list_since_mark,
    ord("d"): PlainReader.dict_since_mark,
    0x85: _with(PlainReader.list_of, 1),
    0x86: _with(PlainReader.list_of, 2),
    0x87: _with(PlainReader.list_of, 3),
    ord("a"): PlainReader.append,
    ord("e"): PlainReader.extend,
    0x90: PlainReader.extend,
    ord("s"): PlainReader.set_item,
    ord("u"): PlainReader.set_items,
    0x94: PlainReader.memoize,
    ord("p"): PlainReader.put_line,
    ord("q"): _with(PlainReader.put, _U1),
    ord("r"): _with(PlainReader.put, _U4),
    ord("g"): PlainReader.get_line,
    ord("h"): _with(PlainReader.get, _U1),
    ord("j"): _with(PlainReader.get, _U4),
    0x80: PlainReader.protocol,
    0x95: PlainReader.frame,
}


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
    """The content of an old store.

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
    """One unit cannot be imported; the others can."""


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
    """Sentences for the operator; those beyond a limit are only counted."""

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
    """Copies units so that none shares a part with another, and refuses those that unfold without end."""

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
            raise _UnfitUnitError("it holds bytes, which JSON cannot hold")
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


DONE_KEY = "legacy_import"


class Limits(NamedTuple):
    """Most units, and most bytes of index and vectors."""

    units: int
    memory_bytes: int


def import_legacy(prefix: str, records: Records, embedder: Embedder | None, events: EventLog, limits: Limits) -> str:
    """Import ``<prefix>.data`` unless that has been done; return what an operator must know of it, or "".

    Units are embedded again, because the old file's positions cannot be trusted; one transaction holds all of them and
    the note that the import is done. Raises CapacityError, before anything is embedded, when they do not all fit.
    """
    if records.read_only or records.get_meta(DONE_KEY) is not None:
        return ""
    try:
        old = read_legacy(prefix)
        return _take_over(old, records, embedder, events, limits) if old is not None else ""
    except (LegacyImportError, EmbeddingError, InvalidVectorError) as error:
        problem = f"the old store at {prefix}.data was not imported and is untouched: {error}"
        events.record("legacy-refused", problem, level=logging.WARNING)
        return problem


def _take_over(old: LegacyStore, records: Records, embedder: Embedder | None, events: EventLog, limits: Limits) -> str:
    if embedder is None:
        raise EmbeddingError("embedding_function is None; open the store with one to import the old units")
    started = time.perf_counter()
    units, problems = _sound_units(old)
    _check_room(old, records, limits, sum(not records.exists(unit["id"]) for unit in units), records.count())
    texts = [unit_to_text(unit) for unit in units]
    vectors = check_vectors(embedder.embed_many(texts), records.dim, "l2")
    directed = set(_with_direction(units, vectors, problems)) if records.metric == "cosine" else set(range(len(units)))
    note = {"source": old.source.name, "units": len(units), "problems": problems[:100]}
    with records.write() as tx:
        fresh = [i for i, unit in enumerate(units) if i in directed and tx.find(unit["id"]) is None]
        _check_room(old, records, limits, len(fresh), tx.count)
        tx.put_many((units[i], texts[i], vectors[i].tobytes(), units[i]["id"]) for i in fresh)
        tx.set_meta(DONE_KEY, json.dumps(note).encode())
    for problem in problems:
        events.record("legacy-problem", problem, level=logging.WARNING)
    events.record(
        "legacy-imported", f"{len(fresh)} units from {old.source.name}", seconds=time.perf_counter() - started
    )
    return ""


def _check_room(old: LegacyStore, records: Records, limits: Limits, fresh: int, count: int) -> None:
    """Raise CapacityError when so many old units do not fit beside ``count`` others."""
    needed = (count + fresh) * row_bytes(records.dim)
    kept = f"{old.source.name} has {fresh} old units to import; nothing was imported and the file is kept as it is"
    if count + fresh > limits.units:
        raise CapacityError(
            f"{kept}: the store holds {count} of at most {limits.units} units; "
            "raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS, or move the file away"
        )
    if fresh and needed > limits.memory_bytes:
        raise CapacityError(
            f"{kept}: index and vectors would take {needed / 2**20:.1f} MB of at most "
            f"{limits.memory_bytes / 2**20:.1f}; raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB, or move the file away"
        )


def _with_direction(units: list[MemoryUnit], vectors: FloatArray, problems: list[str]) -> list[int]:
    """Positions of the vectors that are not zero; cosine cannot compare the others, which are reported."""
    zero = ~vectors.any(axis=1)
    problems += [f"left out: the vector of {units[i]['id']!r} is zero under cosine" for i in np.flatnonzero(zero)]
    return list(np.flatnonzero(~zero).tolist())


def _sound_units(old: LegacyStore) -> tuple[list[MemoryUnit], list[str]]:
    units: list[MemoryUnit] = []
    problems = list(old.problems)
    for unit in old.units:
        try:
            units.append(checked_unit(unit, f"old unit {unit.get('id')!r}"))
        except InvalidUnitError as error:
            problems.append(f"left out: {error}")
    return units, problems
