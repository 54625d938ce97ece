"""Rows and helpers for the tests of the records package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
import numpy as np

from memevolve_gpu.records import Records, Transaction

__all__ = ["DIM", "Fault", "FaultyVFS", "Rows", "facts", "foreign_connection", "put", "unit", "vector"]

DIM = 4
Rows = dict[str, str]
"""Id and text of units to store."""


def vector(first: float = 1.0) -> bytes:
    """A vector of ``DIM`` little-endian float32 that begins with ``first``."""
    return np.array([first, 0, 0, 0], dtype="<f4").tobytes()


def unit(unit_id: str, **fields: Any) -> dict[str, Any]:
    """A small unit."""
    return {"id": unit_id, "type": "lesson", "content": f"content of {unit_id}", **fields}


def put(target: Records | Transaction, unit_id: str, text: str | None = None, **fields: Any) -> int:
    """Store one unit, in a transaction of its own when a store is given; returns its slot."""
    if isinstance(target, Records):
        with target.write() as tx:
            return put(tx, unit_id, text, **fields)
    made = unit(unit_id, **fields)
    return target.put(made if text is None else {**made, "content": text}, vector(), unit_id)


def facts(records: Records) -> dict[str, dict[str, Any]]:
    """Every unit by id, read unit by unit."""
    return {one["id"]: one for one in records.units(page_size=7)}


def foreign_connection(path: Path) -> apsw.Connection:
    """The database in the hands of another program."""
    return apsw.Connection(str(path))


Flags = list[int]


class Fault:
    """Which calls fail with what: ``failing["write"] = OSError(...)``; names ending in ``only`` are touched."""

    def __init__(self) -> None:
        self.failing: dict[str, BaseException] = {}
        self.only = ""
        self.calls: dict[str, int] = {}

    def meet(self, call: str, name: str) -> None:
        self.calls[call] = self.calls.get(call, 0) + 1
        if call in self.failing and name.endswith(self.only):
            raise self.failing[call]


class FaultyFile(apsw.VFSFile):
    """A file whose calls meet the fault."""

    def __init__(self, fault: Fault, name: str | apsw.URIFilename | None, flags: Flags) -> None:
        self._fault = fault
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - named by SQLite
        self._fault.meet("write", self._name)
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._fault.meet("sync", self._name)
        super().xSync(flags)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self._fault.meet("read", self._name)
        return super().xRead(amount, offset)


class FaultyVFS(apsw.VFS):
    """The files of a store, as the fault wants them."""

    def __init__(self, name: str, fault: Fault) -> None:
        self._fault = fault
        super().__init__(name, "")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: Flags) -> FaultyFile:  # noqa: N802
        return FaultyFile(self._fault, name, flags)
