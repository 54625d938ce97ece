"""Input and output files: JSON lines, atomic writes, bulk storing, old ``.data`` files."""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..backends import AnyStore
from ..components.store.legacy_import import read_legacy
from ..components.store.units import checked_unit, text_to_embed
from ..errors import InvalidUnitError, MemEvolveError
from ..types import FloatArray, MemoryUnit
from ..utils.drafts import PRIVATE, draft_of, remove_abandoned_drafts
from .app import InputError, Interrupted
from .output import Output, held_interrupt

__all__ = [
    "MAX_LINE_BYTES",
    "Exported",
    "add_batches",
    "add_whole",
    "bulk_into",
    "export_line",
    "json_value",
    "looks_legacy",
    "nothing_stored",
    "read_exported",
    "read_old",
    "read_text",
    "read_units",
    "write_lines",
]


class Bulk:
    """What one command has stored so far: ``ids`` in order, and how many of them were there before."""

    def __init__(self, store: AnyStore, output: Output, source: str) -> None:
        self.store = store
        self.output = output
        self.source = _source_name(source)
        self.ids: list[str] = []
        self.replaced = 0
        self.last_line = 0
        self._unclear = False

    def put(self, units: Sequence[MemoryUnit], vectors: FloatArray | None = None, last_line: int = 0) -> None:
        """Store the units in one transaction. Ctrl-C acts before it or after it; a second Ctrl-C at once.

        Raises KeyboardInterrupt, or what ``VectorStore.store_batch`` raises.
        """
        known = sum(1 for unit in units if unit.get("id") and self.store.exists(unit["id"]))
        with self.output.progress("embedding" if vectors is None else "storing") as report, held_interrupt() as held:

            def told(stage: str, share: float) -> None:
                held.check()
                report(stage, share)

            try:
                held.check()
                self.ids += self.store.store_batch(units, vectors, told)
            except KeyboardInterrupt:
                self._unclear = held.twice
                raise
            self.replaced += known
            self.last_line = last_line
            held.check()

    def finish(self, verb: str, **more: Any) -> None:
        """Bring the index up to date and report."""
        if self.store.get_storage_health()["needs_retraining"]:
            with self.output.progress("building the index") as report:
                self.store.run_maintenance(report)
        count = self.store.count()
        document = {verb: len(self.ids), "replaced": self.replaced, "count": count, "ids": self.ids, **more}
        replaced = f", {self.replaced} of them in place of older ones" if self.replaced else ""
        text = f"{verb} {len(self.ids)} units from {self.source}{replaced}; the store holds {count}"
        self.output.show(document, text)

    def said(self) -> str:
        """How much of the source is in the store."""
        if not self.ids:
            text = f"nothing of {self.source} was stored"
        else:
            lines = f" (lines 1 to {self.last_line})" if self.last_line else ""
            text = f"{len(self.ids)} units of {self.source}{lines} are in the store"
        return text + ("; the batch that was being stored is wholly in or wholly out" if self._unclear else "")


@contextmanager
def bulk_into(store: AnyStore, output: Output, source: str) -> Iterator[Bulk]:
    """Errors and Ctrl-C leave with a message that says what is in the store."""
    bulk = Bulk(store, output, source)
    try:
        yield bulk
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {bulk.said()}") from None
    except MemEvolveError as error:
        error.args = (f"{error}; {bulk.said()}",)
        raise


@contextmanager
def nothing_stored(source: str) -> Iterator[None]:
    """Errors and Ctrl-C while an input is read before anything is stored say so."""
    said = f"nothing of {_source_name(source)} was stored"
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {said}") from None
    except MemEvolveError as error:
        error.args = (f"{error}; {said}",)
        raise


def add_whole(bulk: Bulk, units: Sequence[MemoryUnit], vectors: Sequence[FloatArray] | None = None) -> None:
    """Store all units, or none; vectors[i] (dim,) belongs to units[i]."""
    if units:
        bulk.put(units, None if vectors is None else np.stack(list(vectors)))


def add_batches(bulk: Bulk, numbered: Iterable[tuple[int, MemoryUnit]], size: int) -> None:
    """Store (line number, unit) in transactions of ``size``; those before a mistake stay."""
    left = iter(numbered)
    while batch := list(islice(left, size)):
        bulk.put([unit for _, unit in batch], last_line=batch[-1][0])


def _source_name(source: str) -> str:
    return "stdin" if source == "-" else source


def export_line(unit: MemoryUnit, vector: FloatArray | None = None, model: str | None = None) -> str:
    """One line of an export: the unit itself, or with a vector (dim,) an object of unit, vector and model.

    The vector is the base64 of its float32 values, little-endian: exact, and a third of the length of decimals.
    """
    if vector is None:
        return json.dumps(unit, ensure_ascii=False)
    packed = base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")
    return json.dumps({"unit": unit, "vector": packed, "model": model}, ensure_ascii=False)


def write_lines(path: str, lines: Iterable[str], told: Callable[[int], None], mode: int = PRIVATE) -> int:
    """Write the lines as UTF-8 to ``path``, ``-`` for stdout; their number. ``told`` hears it as it grows.

    A file appears complete and synced, or not at all, with this mode; one that is there is replaced only then. Raises
    InputError when ``path`` is something other than a file, OSError when the operating system refuses.
    """
    if path == "-":
        return _write_to(sys.stdout.buffer.write, lines, told)
    target = Path(path).resolve()
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise InputError(f"{path}: is no regular file; give the name of a file, or - for stdout")
    remove_abandoned_drafts([target])
    try:
        with draft_of(target, mode) as draft, open(draft.handle, "wb", closefd=False) as stream:
            count = _write_to(stream.write, lines, told)
            stream.flush()
            os.fsync(stream.fileno())
            draft.path.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    _sync_folder(target.parent)
    return count


def _write_to(write: Callable[[bytes], object], lines: Iterable[str], told: Callable[[int], None]) -> int:
    count = 0
    for line in lines:
        write(line.encode() + b"\n")
        count += 1
        told(count)
    return count


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


_SUFFIX = ".data"
_PICKLE_STARTS = (b"\x80", b"(d", b"}")
"""Of a dict: protocols 2 to 5, 0, and 1."""


def looks_legacy(path: str) -> bool:
    """Is it an old store's file, by its name?

    Raises InputError for a pickle of another name.
    """
    if path.endswith(_SUFFIX):
        return True
    if path != "-" and _starts_like_pickle(Path(path)):
        raise InputError(f"{path}: looks like an old store's pickle; give it a name that ends in {_SUFFIX}")
    return False


def read_old(path: str) -> tuple[list[Exported], list[str]]:
    """The sound units of the file, and a sentence for each that was left out or changed.

    Raises InputError when there is no such file, LegacyImportError when it is garbage or hostile.
    """
    old = read_legacy(path.removesuffix(_SUFFIX))
    if old is None:
        raise InputError(f"{path}: cannot be read: No such file or directory")
    lines, problems = [], list(old.problems)
    for number, unit in enumerate(old.units, 1):
        try:
            where = f"old unit {unit.get('id')!r}"
            checked = checked_unit(unit, where)
            text_to_embed(checked, where)
            lines.append(Exported(number, checked, None, None))
        except InvalidUnitError as error:
            problems.append(f"left out: {error}")
    return lines, problems


def _starts_like_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(2).startswith(_PICKLE_STARTS)
    except OSError:
        return False  # whoever reads it next says what is wrong
