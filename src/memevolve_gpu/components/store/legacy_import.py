"""A store of the forerunner at the same prefix is taken over once; its files are left as they are."""

from __future__ import annotations

import json
import logging
import time
from typing import NamedTuple

import numpy as np

from ...errors import CapacityError, EmbeddingError, InvalidUnitError, InvalidVectorError, LegacyImportError
from ...live.tail import row_bytes
from ...monitoring.events import EventLog
from ...records.legacy import LegacyStore, read_legacy
from ...records.records import Records
from ...types import FloatArray, MemoryUnit
from ...utils.embeddings import Embedder
from ...utils.vectors import check_vectors
from .units import checked_unit, unit_to_text

__all__ = ["Limits", "import_legacy"]

DONE_KEY = "legacy_import"


class Limits(NamedTuple):
    """Most units, and most bytes of index and vectors."""

    units: int
    memory_bytes: int


def import_legacy(prefix: str, records: Records, embedder: Embedder | None, events: EventLog, limits: Limits) -> str:
    """Import ``<prefix>.data`` unless that has been done; what an operator must know of it, or "".

    Units are embedded anew, because the old file's positions cannot be trusted; one transaction holds all of them and
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
    """Positions of the vectors that cosine can compare; the others are reported and left out."""
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
