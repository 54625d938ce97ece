"""Input files: JSON lines in, every mistake named by file and line."""

from __future__ import annotations

import base64
import binascii
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..components.store.units import checked_unit
from ..errors import InvalidUnitError
from ..types import FloatArray, MemoryUnit
from .codes import InputError

__all__ = ["MAX_LINE_BYTES", "Exported", "json_value", "read_exported", "read_text", "read_units"]

MAX_LINE_BYTES = 64 * 2**20
"""No unit that the store takes is longer, however its JSON is written; bounds the memory that a wrong file costs."""

_VECTOR_KEYS = frozenset({"unit", "vector", "model"})


class Exported(NamedTuple):
    """One line of an export: the vector and the model that made it are None where the export has none."""

    number: int
    unit: MemoryUnit
    vector: FloatArray | None
    model: str | None


def read_units(path: str) -> Iterator[tuple[int, MemoryUnit]]:
    """(line number, unit) of every line of a JSONL file, ``-`` for stdin; empty lines are passed over.

    Each unit can be kept and has content to embed; no id comes twice. Raises InputError naming the line otherwise.
    """
    seen: dict[str, int] = {}
    for number, value in _values(path):
        where = f"{_name(path)} line {number}"
        unit = _unit(value, where)
        if not str(unit.get("content") or "").strip():
            hint = "; this looks like an export with vectors: use import" if "vector" in unit else ""
            raise InputError(f"{where}: the unit has no content, so nothing could find it; add a content{hint}")
        _check_new_id(unit, number, where, seen)
        yield number, unit


def read_exported(path: str) -> list[Exported]:
    """Every line of what ``export`` wrote, with vectors or without.

    Raises InputError naming the line: as ``read_units`` does, but units without content are taken as they were; or
    when only some lines have vectors, or vectors of different lengths or models.
    """
    lines: list[Exported] = []
    seen: dict[str, int] = {}
    for number, value in _values(path):
        where = f"{_name(path)} line {number}"
        line = _exported(number, value, where)
        _check_new_id(line.unit, number, where, seen)
        if lines:
            _check_like(lines[0], line, where)
        lines.append(line)
    return lines


def read_text(path: str) -> str:
    """A whole UTF-8 file, ``-`` for stdin; raises InputError."""
    with _opened(path) as stream:
        data = stream.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        raise InputError(f"{_name(path)}: longer than {MAX_LINE_BYTES} bytes; give one unit")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{_name(path)}: not UTF-8 ({error.reason} at byte {error.start})") from None


def json_value(text: str, where: str) -> Any:
    """The value of a JSON text; raises InputError, naming ``where``, for anything that is not strictly JSON."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: not JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; flatten it") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _values(path: str) -> Iterator[tuple[int, Any]]:
    with _opened(path) as stream:
        for number, line in enumerate(_raw_lines(stream), 1):
            where = f"{_name(path)} line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{where}: longer than {MAX_LINE_BYTES} bytes; one line holds one unit")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
            if text.strip():
                yield number, json_value(text, where)


def _raw_lines(stream: BinaryIO) -> Iterator[bytes]:
    while line := stream.readline(MAX_LINE_BYTES + 1):
        yield line


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The file, or stdin; whatever the operating system objects to while it is read becomes an InputError."""
    try:
        if path == "-":
            yield sys.stdin.buffer
        else:
            with Path(path).open("rb") as stream:
                yield stream
    except OSError as error:
        raise InputError(f"{_name(path)}: cannot be read: {error.strerror or error}") from None


def _name(path: str) -> str:
    return "stdin" if path == "-" else path


def _unit(value: Any, where: str) -> MemoryUnit:
    try:
        return checked_unit(value, f"{where}: unit")
    except InvalidUnitError as error:
        raise InputError(str(error)) from None


def _check_new_id(unit: MemoryUnit, number: int, where: str, seen: dict[str, int]) -> None:
    unit_id = unit.get("id")
    if unit_id is None:
        return
    if unit_id in seen:
        raise InputError(f"{where}: the id {unit_id!r} is on line {seen[unit_id]} already; keep one of them")
    seen[unit_id] = number


def _exported(number: int, value: Any, where: str) -> Exported:
    if not isinstance(value, dict) or "vector" not in value or not value.keys() <= _VECTOR_KEYS:
        return Exported(number, _unit(value, where), None, None)
    model = value.get("model")
    if model is not None and not isinstance(model, str):
        raise InputError(f"{where}: model must be a text or null, got {type(model).__name__}")
    return Exported(number, _unit(value.get("unit"), where), _vector(value["vector"], where), model)


def _vector(value: Any, where: str) -> FloatArray:
    """A list of numbers, or the base64 of little-endian float32."""
    try:
        if isinstance(value, str):
            vector = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4").astype(np.float32)
        else:
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as that
                vector = np.asarray(value, dtype=np.float32)
    except (binascii.Error, TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: vector must be a list of numbers or base64 of float32 values") from None
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise InputError(f"{where}: vector must be one list of finite numbers, got shape {vector.shape}")
    return vector


def _check_like(first: Exported, line: Exported, where: str) -> None:
    if (first.vector is None) != (line.vector is None):
        has, has_not = (first.number, line.number) if line.vector is None else (line.number, first.number)
        raise InputError(f"{where}: line {has} has a vector and line {has_not} has none; export all with --vectors")
    if first.vector is None or line.vector is None:
        return
    if first.vector.shape != line.vector.shape:
        raise InputError(
            f"{where}: its vector has {line.vector.size} numbers, that of line {first.number} {first.vector.size}"
        )
    if first.model != line.model:
        raise InputError(
            f"{where}: its vector was made by {line.model!r}, that of line {first.number} by {first.model!r}"
        )
