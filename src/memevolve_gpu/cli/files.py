"""Input and output files: JSON lines, atomic writes, bulk storing, old ``.data`` files."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, NoReturn

from ..errors import ConfigurationError, InvalidUnitError, MemEvolveError
from ..utils.drafts import PRIVATE, draft_of, remove_abandoned_drafts, sync_folder
from .app import InputError, Interrupted
from .output import Output, held_interrupt

if TYPE_CHECKING:  # imported where they are used, numpy too: --help needs none of them
    from ..backends import AnyStore
    from ..types import FloatArray, Json, JsonObject, MemoryUnit
    from ..utils.embeddings import EmbeddingFunction


class Bulk:
    """What one command has stored so far: ``ids`` in order, and how many of them replaced units."""

    def __init__(self, store: AnyStore, output: Output, source: str) -> None:
        self.store = store
        self.output = output
        self.source = _name(source)
        self.ids: list[str] = []
        self.replaced = 0
        self.last_line = 0
        self._unclear = False

    def put_lines(self, lines: Sequence[Exported], vectors: Sequence[FloatArray] | None = None) -> None:
        """Store the lines of an export, those of each namespace in one transaction; vectors[i] (dim,) to lines[i].

        Units that have expired meanwhile are left out.
        """
        root, spaces = self.store, dict.fromkeys(line.namespace for line in lines)
        now = time.time()
        for space in spaces:
            chosen = [at for at, line in enumerate(lines) if line.namespace == space]
            chosen = [at for at in chosen if (lines[at].expires_at or math.inf) > now]
            times = [lines[at].expires_at for at in chosen]
            self.store = root.namespace(*space) if space else root  # type: ignore[assignment]
            rows = [vectors[at] for at in chosen] if vectors else None
            self.put([lines[at].unit for at in chosen], rows, times=times)
        self.store = root

    def put(
        self,
        units: Sequence[MemoryUnit],
        vectors: Sequence[FloatArray] | None = None,
        last_line: int = 0,
        times: Sequence[float | None] = (),
    ) -> None:
        """Store the units in one transaction; vectors[i] (dim,) and times[i], of expiry, belong to units[i].

        Ctrl-C takes effect before or after it, with vectors after it, as the store may be new; a second Ctrl-C at once.
        Raises KeyboardInterrupt, and the errors of ``VectorStore.store_batch``.
        """
        if not units:
            return
        import numpy as np

        known = sum(1 for unit in units if unit.get("id") and self.store.exists(unit["id"]))
        rows = np.stack(list(vectors)) if vectors else None
        with self.output.progress("storing" if vectors else "embedding") as report, held_interrupt() as held:

            def report_or_stop(stage: str, share: float) -> None:
                if rows is None:
                    held.check()
                report(stage, share)

            try:
                more: JsonObject = {"expires_at": list(times)} if any(times) else {}
                if more and "set_expiry" not in self.store.capabilities:
                    kind = type(self.store).__name__
                    raise ConfigurationError(f"{self.source} holds units that expire, and a {kind} has no expiry")
                self.ids += self.store.store_batch(units, rows, report_or_stop, **more)
            except KeyboardInterrupt:
                self._unclear = held.twice
                raise
            self.replaced += known
            self.last_line = last_line
            held.check()

    def put_batches(self, numbered: Iterable[tuple[int, MemoryUnit]], size: int) -> None:
        """Store (line number, unit) in transactions of ``size``; those before an error stay."""
        left = iter(numbered)
        while batch := list(islice(left, size)):
            self.put([unit for _, unit in batch], last_line=batch[-1][0])

    def finish(self, verb: str, **more: object) -> None:
        """Update the index and print the result."""
        if self.store.get_storage_health()["needs_retraining"]:
            with self.output.progress("building the index") as report:
                self.store.run_maintenance(report)
        count = self.store.count()
        document = {verb: len(self.ids), "replaced": self.replaced, "count": count, "ids": self.ids, **more}
        replaced = f", {self.replaced} of them replacing older ones" if self.replaced else ""
        text = f"{verb} {len(self.ids)} units from {self.source}{replaced}; the store holds {count}"
        self.output.show(document, text)

    def stored(self) -> str:
        """Say how much of the source is in the store."""
        if not self.ids:
            text = f"nothing of {self.source} was stored"
        else:
            lines = f" (lines 1 to {self.last_line})" if self.last_line else ""
            text = f"{len(self.ids)} units of {self.source}{lines} are in the store"
        return text + ("; of the batch that was being stored, all or nothing is in the store" if self._unclear else "")


def embedded(function: EmbeddingFunction, units: Sequence[MemoryUnit], output: Output) -> list[FloatArray]:
    """Return the vectors of units for a store that is not there yet: it is created when nothing can fail any more."""
    from ..components.store.units import texts_of
    from ..utils.embeddings import Embedder

    texts = texts_of(units, to_embed=True)
    with output.progress("embedding") as report, held_interrupt() as held:

        def report_or_stop(done: int, total: int) -> None:
            held.check()
            report("embedding", done / total)

        return list(Embedder(function).embed_many(texts, report_or_stop))


@contextmanager
def bulk_into(store: AnyStore, output: Output, source: str) -> Iterator[Bulk]:
    """Add to the message of errors and Ctrl-C what is in the store."""
    bulk = Bulk(store, output, source)
    with _explained(bulk.stored):
        yield bulk


def nothing_stored(source: str) -> AbstractContextManager[None]:
    """Add to the message of errors and Ctrl-C that nothing was stored."""
    return _explained(lambda: f"nothing of {_name(source)} was stored")


@contextmanager
def _explained(stored: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {stored()}") from None
    except MemEvolveError as error:
        error.args = (f"{error}; {stored()}",)
        raise


def export_line(
    unit: MemoryUnit,
    vector: FloatArray | None = None,
    model: str | None = None,
    expires_at: float | None = None,
    namespace: Sequence[str] = (),
) -> str:
    """Return one line of an export: the unit, or an object of it and of what else is to be kept.

    vector: (dim,). namespace: below that of the export.
    """
    kept: JsonObject = {}
    if vector is not None:
        from ..utils.vectors import packed

        kept.update(vector=packed(vector), model=model)
    if expires_at is not None:
        kept["expires_at"] = expires_at
    if namespace:
        kept["namespace"] = list(namespace)
    return json.dumps({"unit": unit, **kept} if kept else unit, ensure_ascii=False)


def refuse_missing_folder(path: str) -> None:
    """Raise InputError when the folder of a file to write is not there."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist; create it first")


def write_lines(path: str, lines: Iterable[str], told: Callable[[int], None], mode: int = PRIVATE) -> int:
    """Write the lines as UTF-8 to ``path``, ``-`` for stdout, and return their number; ``told`` gets it after each.

    A file appears complete and synced, or not at all, with this mode; an existing file is replaced only then. Raises
    InputError when ``path`` is not a regular file, OSError when the operating system refuses.
    """
    if path == "-":
        return _write_to(sys.stdout.buffer.write, lines, told)
    target = Path(path).resolve()
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise InputError(f"{path}: is not a regular file; give the name of a file, or - for stdout")
    remove_abandoned_drafts([target])
    try:
        with draft_of(target, mode) as draft, open(draft.handle, "wb", closefd=False) as stream:
            count = _write_to(stream.write, lines, told)
            stream.flush()
            os.fsync(stream.fileno())
            draft.path.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    sync_folder(target.parent)
    return count


def _write_to(write: Callable[[bytes], object], lines: Iterable[str], told: Callable[[int], None]) -> int:
    count = 0
    for line in lines:
        write(line.encode() + b"\n")
        count += 1
        told(count)
    return count


MAX_LINE_BYTES = 64 * 2**20
"""Longer than the JSON of any unit that the store accepts; limits the memory that a wrong file needs."""

_KEYS = frozenset({"unit", "vector", "model", "expires_at", "namespace"})


class Exported(NamedTuple):
    """One line of an export; ``vector`` and ``model``, which computed it, are None where the export has none.

    expires_at: Unix time; None for a unit that does not expire. namespace: below that of the store.
    """

    number: int
    unit: MemoryUnit
    vector: FloatArray | None = None
    model: str | None = None
    expires_at: float | None = None
    namespace: tuple[str, ...] = ()


def read_units(path: str) -> Iterator[tuple[int, MemoryUnit]]:
    """Yield (line number, unit) of every line of a JSONL file, ``-`` for stdin; empty lines are skipped.

    Raises InputError, naming the line, for a unit that cannot be stored or has no content, and for a repeated id.
    """
    seen: dict[str, int] = {}
    for number, value in _values(path):
        where = f"{_name(path)} line {number}"
        unit = _unit(value, where)
        if not str(unit.get("content") or "").strip():
            hint = "; this looks like what export wrote: use import" if {"unit", "vector"} & unit.keys() else ""
            raise InputError(f"{where}: the unit has no content, so no search could find it; add a content{hint}")
        _check_new_id(unit, number, where, seen)
        yield number, unit


def read_exported(path: str) -> list[Exported]:
    """Read every line that ``export`` wrote, with vectors or without.

    Raises InputError, naming the line, as ``read_units``, but accepts units without content; also when only some lines
    have vectors, or vectors of different lengths or models.
    """
    lines: list[Exported] = []
    seen: dict[tuple[str, ...], dict[str, int]] = {}
    for number, value in _values(path):
        where = f"{_name(path)} line {number}"
        line = _exported(number, value, where)
        _check_new_id(line.unit, number, where, seen.setdefault(line.namespace, {}))
        if lines:
            _check_like(lines[0], line, where)
        lines.append(line)
    return lines


def read_text(path: str) -> str:
    """Read a whole UTF-8 file, ``-`` for stdin; raises InputError."""
    with _opened(path) as stream:
        return _decoded(stream.read(MAX_LINE_BYTES + 1), "utf-8-sig", _name(path))


def json_object(text: str, where: str) -> JsonObject:
    """Parse a JSON object; raises InputError, naming ``where``."""
    value = _json_value(text, where)
    if not isinstance(value, dict):
        raise InputError(f'{where}: must be a JSON object such as {{"type": "skill"}}, got {text[:80]!r}')
    return value


def _json_value(text: str, where: str) -> Json:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: not JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; flatten it") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _values(path: str) -> Iterator[tuple[int, Json]]:
    with _opened(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
            where = f"{_name(path)} line {number}"
            text = _decoded(line, "utf-8-sig" if number == 1 else "utf-8", where)
            if text.strip():
                yield number, _json_value(text, where)


def _decoded(data: bytes, encoding: str, where: str) -> str:
    if len(data) > MAX_LINE_BYTES:
        raise InputError(f"{where}: longer than {MAX_LINE_BYTES} bytes; write one unit on each line")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open the file, or stdin; an error of the operating system while it is read becomes an InputError."""
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


def _unit(value: object, where: str) -> MemoryUnit:
    from ..components.store.units import checked_unit

    try:
        return checked_unit(value, f"{where}: unit")
    except InvalidUnitError as error:
        raise InputError(str(error)) from None


def _check_new_id(unit: MemoryUnit, number: int, where: str, seen: dict[str, int]) -> None:
    unit_id = unit.get("id")
    if unit_id is None:
        return
    if unit_id in seen:
        raise InputError(f"{where}: line {seen[unit_id]} has the id {unit_id!r} already; keep one of them")
    seen[unit_id] = number


def _exported(number: int, value: Json, where: str) -> Exported:
    import numpy as np

    from ..utils.config import namespace_path
    from ..utils.vectors import read_vector

    wrapped = isinstance(value, dict) and value.keys() <= _KEYS
    if not wrapped or not ("vector" in value or (len(value) > 1 and isinstance(value.get("unit"), dict))):
        return Exported(number, _unit(value, where))
    model, expires_at = value.get("model"), value.get("expires_at")
    if model is not None and not isinstance(model, str):
        raise InputError(f"{where}: model must be a text or null, got {type(model).__name__}")
    if expires_at is not None and (isinstance(expires_at, bool) or not isinstance(expires_at, (int, float))):
        raise InputError(f"{where}: expires_at must be a Unix time or null, got {type(expires_at).__name__}")
    try:
        namespace = namespace_path(value.get("namespace") or ())
    except ConfigurationError as error:
        raise InputError(f"{where}: {error}") from None
    vector = None
    if "vector" in value:
        vector = read_vector(value["vector"], f"{where}: vector", InputError)
        if not vector.size or not np.isfinite(vector).all():
            raise InputError(f"{where}: vector must be a list of finite numbers")
    return Exported(number, _unit(value.get("unit"), where), vector, model, expires_at, namespace)


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
            f"{where}: its vector is of the model {line.model!r}, that of line {first.number} of {first.model!r}"
        )


_SUFFIX = ".data"
_PICKLE_STARTS = (b"\x80", b"(d", b"}")
"""First bytes of a pickled dict: protocols 2 to 5, 0, and 1."""


def is_legacy(path: str) -> bool:
    """Whether it is an old store's file, by its name. Raises InputError for a pickle of another name."""
    if path.endswith(_SUFFIX):
        return True
    with suppress(OSError):  # the next reader reports it
        with Path(path).open("rb") as stream:
            looks_pickled = path != "-" and stream.read(2).startswith(_PICKLE_STARTS)
        if looks_pickled:
            raise InputError(f"{path}: looks like an old store's pickle; give it a name that ends in {_SUFFIX}")
    return False


def read_old(path: str) -> tuple[list[Exported], list[str]]:
    """Read the valid units of an old store's file, and a sentence for each that was left out or changed.

    Raises InputError when there is no such file, LegacyImportError when it is invalid or unsafe.
    """
    from ..components.store.legacy_import import read_legacy
    from ..components.store.units import checked_unit, text_to_embed

    old = read_legacy(path.removesuffix(_SUFFIX))
    if old is None:
        raise InputError(f"{path}: cannot be read: No such file or directory")
    lines, problems = [], list(old.problems)
    for number, unit in enumerate(old.units, 1):
        try:
            where = f"old unit {unit.get('id')!r}"
            checked = checked_unit(unit, where)
            text_to_embed(checked, where)
            lines.append(Exported(number, checked))
        except InvalidUnitError as error:
            problems.append(f"left out: {error}")
    return lines, problems
