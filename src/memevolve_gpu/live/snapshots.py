"""Open a store: from the snapshot when it is valid, else from the records. Opening never trains."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import StorageError
from ..index.base import Index
from ..index.snapshot_file import SnapshotError, SnapshotInfo, read_snapshot
from ..index.vector_table import DamagedVectorsError, growable
from ..monitoring.events import EventLog
from ..records.records import Records
from ..records.schema import STATS_KEY
from ..types import IntArray, JsonObject, Rows
from ..utils.vectors import from_bytes
from .index_stats import IndexStats
from .namespaces import RowGroups, grouped
from .view import View
from .view_builder import empty_index, flat_index, view_of

PAGE = 512
SAMPLED = 32
TOLERANCE = 1e-5
"""Relative; a row normalised alone may differ in its last bits from the same row normalised in a batch."""


def load_snapshot(path: Path, records: Records, events: EventLog) -> tuple[View, SnapshotInfo] | None:
    """The snapshot's index as a view at the snapshot's watermark; None, with an event, when it cannot be used."""
    started = time.perf_counter()
    if not path.exists():
        return None
    try:
        index, info = read_snapshot(path, store_id=records.store_id, dim=records.dim, metric=records.metric)
    except SnapshotError as error:
        events.record("snapshot-refused", f"{error}; rebuilding from the records", level=logging.WARNING)
        return None
    head = records.head()
    if info.watermark > head.last_seq and not records.read_only:
        remove_snapshot(path)
    if not head.horizon <= info.watermark <= head.last_seq:
        events.record(
            "snapshot-refused",
            f"snapshot at entry {info.watermark} does not join the log ({head.horizon} to {head.last_seq}); "
            "rebuilding from the records",
        )
        return None
    events.record("snapshot-loaded", f"{index.n} rows of kind {index.kind}", seconds=time.perf_counter() - started)
    groups = grouped(index.slots, records.namespace_slots())
    stats = IndexStats.from_dict(_stats_of(info, records), index)
    return view_of(index, info.watermark, stats, info.dead, groups), info


def keep_stats(records: Records, info: SnapshotInfo, stats: IndexStats, events: EventLog) -> None:
    """Keep new statistics of the index in this snapshot, without writing that again; a failure is an event.

    Generations begin again where a snapshot was removed, so the time says which one it is.
    """
    if records.read_only:
        return
    try:
        with records.write() as tx:
            tx.set_meta(STATS_KEY, json.dumps({"created_at": info.created_at, "stats": stats.to_dict()}).encode())
    except StorageError as error:
        events.record("statistics-unsaved", f"{error}; the next opening calibrates again", level=logging.WARNING)


def _stats_of(info: SnapshotInfo, records: Records) -> JsonObject:
    """The statistics in the snapshot, or newer ones that are kept for it."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        held = json.loads(records.get_meta(STATS_KEY) or b"{}")
        if held["created_at"] == info.created_at:
            return dict(held["stats"])
    return info.extra


def remove_snapshot(path: Path) -> None:
    """Remove a snapshot that is damaged, or ahead of the log.

    Ahead: the records went back in time: an older copy, or a power cut under durability normal. After enough writes the
    snapshot would seem to join the log again, and be wrong.
    """
    with suppress(OSError):
        path.unlink()


def read_everything(records: Records) -> View:
    """An exact index of all live rows, at the end of the log when the reading started."""
    head = records.head()
    folder = None if records.read_only else records.path.parent
    if not head.count:
        return view_of(empty_index(records.dim, records.metric, folder), head.last_seq)
    vectors = growable((head.count, records.dim), np.float32, folder)
    slots, namespaces = np.empty(head.count, dtype=np.int64), np.empty(head.count, dtype=np.int32)
    id_bytes, id_ends = bytearray(), np.empty(head.count, dtype=np.int64)
    n = after = 0
    while page := records.scan(after, head.last_slot, PAGE):
        part = slice(n, n + len(page))
        slots[part], namespaces[part] = [row.slot for row in page], [row.ns for row in page]
        vectors[part] = from_bytes([row.vector for row in page], records.metric)
        ids = [row.id.encode() for row in page]
        id_ends[part] = len(id_bytes) + np.cumsum([len(one) for one in ids])
        id_bytes += b"".join(ids)
        n, after = part.stop, page[-1].slot
    # n is less than head.count where rows were deleted meanwhile; their DROPs follow in the log
    rows = Rows(slots[:n], np.frombuffer(id_bytes, dtype=np.uint8), id_ends[:n], vectors[:n])
    groups = RowGroups(namespaces[:n]) if namespaces[:n].any() else None
    return view_of(flat_index(rows, records.metric), head.last_seq, groups=groups)


def agrees(view: View, records: Records, seed: int) -> bool:
    """Whether an up-to-date view has as many units as the records, and the right ones in a sample.

    A view that is behind the records by now cannot be compared, and passes.
    """
    try:
        sampled = spot_check(view, records, seed)
    except DamagedVectorsError:
        return False
    head = records.head()
    return head.last_seq != view.watermark or (sampled and head.count == view.count)


def spot_check(view: View, records: Records, seed: int) -> bool:
    """Whether sampled rows of the index, and its newest ones, have the ids and vectors of the records."""
    positions = _sample(view, seed)
    index = view.index
    slots = index.slots[positions].tolist()
    units, vectors = records.units_at(slots), records.vectors_at(slots)
    return all(
        slot in units and units[slot].get("id") == unit_id and _same(index, position, vectors.get(slot))
        for position, slot, unit_id in zip(positions.tolist(), slots, index.ids_at(positions), strict=True)
    )


def _sample(view: View, seed: int) -> IntArray:
    alive = np.flatnonzero(view.index_died > view.watermark).astype(np.int64)
    if len(alive) <= 2 * SAMPLED:
        return alive
    rng = np.random.default_rng(seed)
    picked = rng.choice(alive[:-SAMPLED], SAMPLED, replace=False)
    return np.sort(np.concatenate([picked, alive[-SAMPLED:]]))


def _same(index: Index, position: int, raw: bytes | None) -> bool:
    if raw is None:
        return False
    expected = from_bytes([raw], index.metric)[0]
    indexed = index.vectors_at(np.array([position], dtype=np.int64))[0]
    return bool(np.linalg.norm(indexed - expected) <= TOLERANCE * max(1e-12, float(np.linalg.norm(expected))))
