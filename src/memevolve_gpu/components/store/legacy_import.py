"""Import a store of MemEvolve: a safe reader for its pickle, and the one-time import at the same prefix.

:class:`PlainReader` is the standard library's unpickler in its Python form, ``pickle._Unpickler``, cut down to the
instructions that build dicts, lists, tuples, sets, strings, bytes, numbers, booleans and None (protocols 0 to 5).
Tuples and sets become lists; keys become text. The C form cannot be used: it allocates its memo by the largest number
in the file, hashes nested tuples without bound, and takes extension codes from a cache without asking ``find_class``.

Bounded are the file, its instructions, the depth and size of a unit, and how far values that the file shares may
unfold. The old ``<prefix>.index`` is never opened: its positions may belong to other units.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import pickletools
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
from ...types import FloatArray, JsonObject, MemoryUnit
from ...utils.embeddings import Embedder
from ...utils.vectors import check_vectors
from .units import checked_unit, unit_to_text

MAX_INSTRUCTIONS = 20_000_000
"""Bounds time, and memory to 2 GB: each takes at most some 90 bytes beyond its text. A unit has about 50 of them."""

_MAX_NUMBER_BITS = 8192
_MAX_NUMBER_DIGITS = 2048

_DAMAGED = (AttributeError, EOFError, IndexError, KeyError, ValueError, struct.error, pickle.UnpicklingError)
"""What the unpickler raises for bytes that are no pickle."""


_Unpickler: Any = pickle._Unpickler  # noqa: SLF001 - the C form cannot be restricted, see above


class RefusedError(Exception):
    """The file holds something that is not read."""


class PlainReader(_Unpickler):  # type: ignore[misc]
    """Reads one pickle of plain values; use it once.

    ``clashes`` counts the values that were left out because their keys, numbers, are keys as text as well.
    """

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        super().__init__(self._data)
        self.dispatch = _Instructions(_HANDLERS)
        self.clashes = 0

    @property
    def at(self) -> int:
        """The byte that is read next."""
        return self._data.tell()

    def run(self) -> object:
        """Return the value that the pickle holds; parts that it shares stay shared.

        Raises RefusedError when it asks for more than plain values or is too large, and one of ``_DAMAGED`` when it is
        damaged or no pickle at all.
        """
        return self.load()

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every import."""
        raise RefusedError(f"refers to the Python object {module[:60]}.{name[:60]}, and only plain values are read")

    def _decode_string(self, value: bytes) -> str:
        """Python 2 kept texts as bytes and did not say which encoding they had."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")

    def skip_frame(self) -> None:
        self.read(8)

    def load_int(self) -> None:
        line = self.readline()[:-1]
        booleans = {b"00": False, b"01": True}  # protocol 0 writes booleans like this
        self.append(booleans[line] if line in booleans else _whole_number(line))

    def load_long(self) -> None:
        self.append(_whole_number(self.readline()[:-1].removesuffix(b"L")))

    def load_long4(self) -> None:
        super().load_long4()
        if self.stack[-1].bit_length() > _MAX_NUMBER_BITS:
            raise RefusedError(f"has a whole number of more than {_MAX_NUMBER_BITS} bits")

    def load_put(self) -> None:
        self.memo[_whole_number(self.readline()[:-1])] = self.stack[-1]

    def load_get(self) -> None:
        self.append(self.memo[_whole_number(self.readline()[:-1])])

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        """Keys become text, as in JSON; unlike numbers, texts cannot be chosen so that their hashes collide."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"a {type(target).__name__} is filled with {len(items)} keys and values")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):
                target[key] = value
            elif key is not None and not isinstance(key, (int, float)):
                raise RefusedError(f"has a key of type {type(key).__name__}, and only text and numbers can be keys")
            elif str(key) in target:
                self.clashes += 1
            else:
                target[str(key)] = value


class _Instructions(dict[int, Callable[[PlainReader], None]]):
    """The instructions that are carried out. Counts them, and refuses the others."""

    left = 0

    def __init__(self, handlers: dict[int, Callable[[PlainReader], None]]) -> None:
        super().__init__(handlers)
        self.left = MAX_INSTRUCTIONS

    def __getitem__(self, code: int) -> Callable[[PlainReader], None]:
        self.left -= 1
        if self.left < 0:
            raise RefusedError(f"has more than {MAX_INSTRUCTIONS} instructions")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[[PlainReader], None]:
        if code in _NAMES:
            raise RefusedError(f"wants to run Python code ({_NAMES[code]}), and only plain values are read")
        raise ValueError(f"unknown instruction 0x{code:02x}")


def _whole_number(digits: bytes) -> int:
    if len(digits) > _MAX_NUMBER_DIGITS:
        raise RefusedError(f"has a whole number of {len(digits)} digits, the most is {_MAX_NUMBER_DIGITS}")
    return int(digits)


def _list_of(count: int) -> Callable[[PlainReader], None]:
    def load(reader: PlainReader) -> None:
        items = reader.stack[-count:]
        if len(items) != count:
            raise IndexError("too few values on the stack")
        reader.stack[-count:] = [items]

    return load


_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_AS_IN_THE_LIBRARY = """
    PROTO STOP MARK POP POP_MARK DUP GLOBAL STACK_GLOBAL NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
"""
"""Names of instructions; the two that refer to Python objects end in :meth:`PlainReader.find_class`."""

_HANDLERS: dict[int, Callable[[PlainReader], None]] = {
    **{code: _Unpickler.dispatch[code] for code, name in _NAMES.items() if name in _AS_IN_THE_LIBRARY.split()},
    pickle.FRAME[0]: PlainReader.skip_frame,
    pickle.INT[0]: PlainReader.load_int,
    pickle.LONG[0]: PlainReader.load_long,
    pickle.LONG4[0]: PlainReader.load_long4,
    pickle.PUT[0]: PlainReader.load_put,
    pickle.GET[0]: PlainReader.load_get,
    pickle.DICT[0]: PlainReader.load_dict,
    pickle.SETITEM[0]: PlainReader.load_setitem,
    pickle.SETITEMS[0]: PlainReader.load_setitems,
    pickle.EMPTY_TUPLE[0]: PlainReader.load_empty_list,
    pickle.EMPTY_SET[0]: PlainReader.load_empty_list,
    pickle.TUPLE[0]: PlainReader.load_list,
    pickle.FROZENSET[0]: PlainReader.load_list,
    pickle.ADDITEMS[0]: PlainReader.load_appends,
    pickle.TUPLE1[0]: _list_of(1),
    pickle.TUPLE2[0]: _list_of(2),
    pickle.TUPLE3[0]: _list_of(3),
}


class _DocstoreReader(PlainReader):
    """As the plain reader; LangChain's documents and the table that holds them become dicts of their fields."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.dispatch = _Instructions({**_HANDLERS, pickle.NEWOBJ[0]: _made, pickle.BUILD[0]: _filled})

    def find_class(self, module: str, name: str) -> Any:
        """Name LangChain's two classes, without an import; refuse every other."""
        if module.startswith(("langchain.", "langchain_core.", "langchain_community.")) and name in _DOCSTORE:
            return name
        return super().find_class(module, name)


_DOCSTORE = ("Document", "InMemoryDocstore")


def _made(reader: PlainReader) -> None:
    arguments, kind = reader.stack.pop(), reader.stack.pop()
    if kind not in _DOCSTORE or arguments != []:
        raise ValueError("an object of an unknown kind")
    reader.append({})


def _filled(reader: PlainReader) -> None:
    state = reader.stack.pop()
    target = reader.stack[-1]
    if not isinstance(state, dict) or not isinstance(target, dict):
        raise ValueError("an object without fields")
    target.update(state)


def read_docstore(source: Path) -> tuple[dict[str, tuple[str, JsonObject]], list[str]]:
    """Read the pickle beside a FAISS index of LangChain: (text, metadata) by id, and the id of each position.

    Nothing in it is run. Raises LegacyImportError, as :func:`read_legacy`, also when there is no such file.
    """
    data = _read(source)
    if data is None:
        raise LegacyImportError(f"{source}: there is no such file; give the folder of LangChain's save_local")
    reader = _DocstoreReader(data)
    try:
        loaded: Any = reader.run()  # what it is not raises below
        table, positions = loaded
        copier = _Copier(len(data))
        documents = {key: _document(copier.unit(value)) for key, value in table["_dict"].items()}
        ids = [positions[str(number)] for number in range(len(positions))]
        if not set(ids) <= documents.keys():
            raise ValueError("a position names no document")
        return documents, ids
    except (RefusedError, _UnfitUnitError) as refusal:
        raise LegacyImportError(f"{source}: {refusal}; nothing was imported") from None
    except (*_DAMAGED, TypeError) as error:
        raise LegacyImportError(
            f"{source}: damaged, or no docstore of LangChain ({type(error).__name__}: {error})"
        ) from error


def _document(held: MemoryUnit) -> tuple[str, JsonObject]:
    fields = held.get("__dict__", held)
    text, metadata = fields["page_content"], fields.get("metadata") or {}
    if not isinstance(text, str) or not isinstance(metadata, dict):
        raise ValueError("a document without a text")
    return text, metadata


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
    except _DAMAGED as error:
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


def _unwrapped(loaded: object) -> JsonObject:
    if not isinstance(loaded, dict):
        raise RefusedError(f"holds a {type(loaded).__name__} where a dict of units is expected")
    inner = loaded.get("data")
    if isinstance(inner, dict) and not any(isinstance(inner.get(key), str) for key in ("id", "type", "content")):
        return inner
    return loaded  # one whose ``data`` looks like a unit is a store with a unit of that id


def _units(loaded: JsonObject, copier: _Copier, problems: _Problems) -> list[MemoryUnit]:
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

    def _copy(self, value: object, depth: int) -> Any:
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
