"""The columns of a store in a file: a process that opens the store again has them mapped at once.

The file is derived, and bound to its records by a token: each writing puts a new one into the file and, in one
transaction, into the records. So a file of other, older or erased records is never read. Sections lie one after
another, each with a CRC-32 that is compared before its first use; a JSON document behind them says where they are::

    MAGIC | slots | column | column | ... | document | place, length and CRC-32 of the document
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..errors import CorruptStoreError
from ..records.records import Records
from ..records.schema import FIELDS_KEY
from ..types import IntArray, Json, JsonObject
from ..utils.forking import lazy
from .field_values import Array, FieldValues

FieldPath = tuple[str, ...]
"""The names that lead to a field."""

_MAGIC = b"MEVCOLS1"
_END = struct.Struct("<QII")
_ALIGNED = 8
_DTYPES = {"bool", "uint8", "int32", "int64", "float64"}


class SavedColumn(NamedTuple):
    """The values of the first rows, and those of single rows that changed since, or are newer."""

    read: FieldValues
    fresh: dict[int, Json]


class _Section(NamedTuple):
    """An array of the file, as the document describes it."""

    dtype: str
    length: int
    at: int


def write_columns(
    file: BinaryIO, token: str, seq: int, slots: IntArray, columns: Mapping[FieldPath, SavedColumn]
) -> None:
    """Write the columns of the rows with these slots, int64 (n,) ascending, as of a log entry."""
    file.write(_MAGIC)
    document: JsonObject = {"token": token, "seq": seq, "slots": _written(file, {"slots": slots}), "columns": []}
    for path, (read, fresh) in columns.items():
        about = {"path": path, "n": read.n, "big": read.big, "composed": read.is_composed, "fresh": list(fresh.items())}
        document["columns"].append({**about, **_written(file, dict(read.arrays))})
    raw = json.dumps(document, separators=(",", ":")).encode()
    at = file.tell()
    file.write(raw + _END.pack(at, len(raw), zlib.crc32(raw)))
    file.flush()


def _written(file: BinaryIO, arrays: Mapping[str, Array]) -> JsonObject:
    """Write arrays side by side; where they lie, and the checksum of them all."""
    start, crc, sections = file.tell(), 0, {}
    for name, array in arrays.items():
        sections[name] = _Section(array.dtype.name, len(array), file.tell())
        raw = array.tobytes()
        raw += bytes(-len(raw) % _ALIGNED)
        crc = zlib.crc32(raw, crc)
        file.write(raw)
    return {"arrays": sections, "from": start, "to": file.tell(), "crc": crc}


class ColumnFile:
    """A file of columns that is mapped. Not safe for threads: the caller locks."""

    def __init__(self, region: mmap.mmap, document: JsonObject) -> None:
        self._region, self._bytes = region, np.frombuffer(region, dtype=np.uint8)
        self._columns = {tuple(str(part) for part in one["path"]): one for one in document["columns"]}
        self.seq = int(document["seq"])
        self.slots: IntArray = self._arrays(document["slots"])["slots"]

    @property
    def paths(self) -> Iterable[FieldPath]:
        """The fields that it has, except those that turned out to be damaged."""
        return self._columns.keys()

    def take(self, path: FieldPath) -> SavedColumn | None:
        """A column; None where there is none, or it is damaged."""
        about = self._columns.get(path)
        if about is None:
            return None
        try:
            fresh = {int(row): value for row, value in about["fresh"]}
            big = [(int(row), value) for row, value in about["big"]]
            read = FieldValues(int(about["n"]), self._arrays(about), big, bool(about["composed"]), mapped=True)
        except (ValueError, TypeError, KeyError):
            del self._columns[path]
            return None
        return SavedColumn(read, fresh)

    def _arrays(self, about: JsonObject) -> dict[str, Array]:
        """Arrays in place, after their checksum held; raises ValueError where it does not."""
        start, end = int(about["from"]), int(about["to"])
        if not 0 <= start <= end <= len(self._bytes) or zlib.crc32(self._bytes[start:end].data) != about["crc"]:
            raise ValueError("a section fails its checksum")
        found = {}
        for name, given in about["arrays"].items():
            dtype, length, at = _Section(*given)
            if dtype not in _DTYPES:
                raise ValueError(f"section of dtype {dtype!r}")
            found[name] = np.frombuffer(self._region, dtype=np.dtype(dtype), count=length, offset=at)
        return found


def open_columns(path: Path, token: str) -> ColumnFile | None:
    """The file with this token; None where there is none, or it is torn or damaged."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(_MAGIC) + _END.size or file.read(len(_MAGIC)) != _MAGIC:
                return None
            region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        at, length, crc = _END.unpack(region[-_END.size :])
        raw = region[at : at + length]
        if at + length + _END.size != size or zlib.crc32(raw) != crc:
            return None
        document = json.loads(raw)
        return ColumnFile(region, document) if document["token"] == token else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


class KeptFields:
    """What the records keep of fields: which ones filters named, the latest last, and the token of the file of columns.

    It is only a hint: what is damaged counts as absent.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self.forget()

    def forget(self) -> None:
        """Forget which fields filters named; what the records keep of that is read again."""
        self.named: dict[FieldPath, None] = {}
        """The fields that filters named since they were last kept."""
        self.__dict__.pop("_kept", None)

    @lazy
    def _kept(self) -> tuple[dict[FieldPath, bool], str]:
        """Read at the first use: a forked child makes new columns for stores that are closed, too."""
        try:
            return _read_kept(self._records.get_meta(FIELDS_KEY))
        except CorruptStoreError:
            return {}, ""

    @property
    def saved(self) -> dict[FieldPath, bool]:
        """The fields that filters named here or in a process before, as last kept; True: they hold moments."""
        return self._kept[0]

    def name(self, path: FieldPath) -> None:
        """Note that a filter names a field."""
        self.named.pop(path, None)
        self.named[path] = None

    def latest(self, most: int, moments: set[FieldPath]) -> dict[FieldPath, bool]:
        """The fields to keep, at most so many; ``moments``: those that hold moments now."""
        paths = [*(path for path in self.saved if path not in self.named), *self.named][-most:]
        return {path: path in moments or self.saved.get(path, False) for path in paths}

    def open_file(self) -> ColumnFile | None:
        """The file of columns of these records, if there is one."""
        token = self._kept[1]
        return open_columns(self._records.columns_path, token) if token else None

    def keep(
        self,
        timeout: float,
        named: dict[FieldPath, None],
        latest: dict[FieldPath, bool],
        file: tuple[str, int, Path] | None = None,
    ) -> bool:
        """Keep the names and, if given, a file: its token, its log entry, its draft. False where units were erased or
        the log was purged since ``named`` was read.
        """
        with self._records.write(timeout) as tx:
            raw = tx.get_meta(FIELDS_KEY)
            if named is not self.named or (self.saved and raw is None):  # erased meanwhile
                self.forget()
                return False
            if file is not None and tx.head.horizon > file[1]:
                return False
            token = _read_kept(raw)[1] if file is None else file[0]
            tx.set_meta(FIELDS_KEY, json.dumps({"fields": list(latest.items()), "columns": token}).encode())
            if file is not None:
                file[2].replace(self._records.columns_path)
        self._kept = latest, token
        return True


def _read_kept(raw: bytes | None) -> tuple[dict[FieldPath, bool], str]:
    """The names of fields and the token in a value of the records; nothing where it is damaged."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        held = json.loads(raw or b"{}")
        return {tuple(str(part) for part in path): bool(moments) for path, moments in held["fields"]}, held["columns"]
    return {}, ""
