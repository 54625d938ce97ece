"""Write the snapshot of a live index when enough has changed, and purge the log that it covers."""

from __future__ import annotations

import logging
import time

import numpy as np

from ..errors import StorageError
from ..index.snapshot_file import SnapshotError, SnapshotInfo, read_info, write_snapshot
from .index_stats import IndexStats
from .live_index import LiveIndex
from .view import View
from .view_builder import cpu_copy

LOG_KEPT = 10_000
"""Log entries that a process slightly behind may still need."""

LOG_SHARE = 0.25
"""Most log entries to keep, as a share of the live units where that is more; an entry has about 12 bytes."""

CHANGED_SHARE = 0.12
"""Log entries since the snapshot, as a share of the live units, from which an extended index is saved. If this process
is killed, the next opening replays up to this many. The same share of the vectors may be in memory instead of being
mapped from the snapshot."""

MOVED_BYTES = 16 << 20
"""Up to this many bytes of vectors stay in memory without a save."""

BUDGET_SHARE = 0.25
"""Vectors in memory that take more of the memory limit than this are saved, however few they are: a store at its limit
must accept writes again after a round."""


class Saver:
    """Writes the snapshot file of one live index. The caller holds the maintenance lock."""

    def __init__(self, live: LiveIndex) -> None:
        self._live = live
        self.failed: Exception | None = None
        """Why the last snapshot could not be written."""
        self._unsaved_epoch = -1

    @property
    def unsaved(self) -> bool:
        """Whether this process made the index in use and has not saved it yet."""
        return self._unsaved_epoch == self._live.epoch

    def mark_unsaved(self) -> None:
        """The index in use must be saved."""
        self._unsaved_epoch = self._live.epoch

    def forget_failure(self) -> None:
        """Allow another try after a failed write."""
        self.failed = None

    def info(self) -> SnapshotInfo | None:
        """The header of the snapshot on disk, if it belongs to this store."""
        try:
            info = read_info(self._live.snapshot_path)
        except SnapshotError:
            return None
        return info if info.store_id == self._live.records.store_id else None

    def is_due(self, view: View) -> bool:
        """Whether opening from the snapshot on disk would replay many log entries."""
        info = self.info()
        return info is None or view.watermark - info.watermark >= CHANGED_SHARE * view.count

    def holds_vectors(self, view: View) -> bool:
        """Whether many vectors are in memory, or were read from the records, that could be mapped from a snapshot."""
        table, budget = view.index.table, self._live.settings.budget_bytes
        most = min(max(MOVED_BYTES, CHANGED_SHARE * table.nbytes), BUDGET_SHARE * budget)
        held = table.resident_bytes if self._live.generation else table.nbytes
        return view.index.kind != "hnsw" and held > most

    def note_swap(self, view: View) -> bool:
        """Maintenance has just put the index of ``view`` in use: mark it unsaved, unless the snapshot serves.

        An index on a device adds nothing to a snapshot, since only its vectors are saved. Returns whether the snapshot
        on disk, read or written by this process, already holds nearly all of them.
        """
        info = self.info()
        known = info is not None and info.generation == self._live.generation
        saved = known and view.index.plan.engine != "cpu" and not self.is_due(view)
        if not saved:
            self.mark_unsaved()
        return saved

    def save(self) -> None:
        """Write the snapshot of the view in use; an index made here gets the next generation.

        A failure is recorded as an event and in ``failed``.
        """
        live, self.failed = self._live, None
        if live.records.read_only:
            return
        live.check_vectors()
        with live.mutex:
            if self.unsaved:
                info = self.info()
                live.generation = max(info.generation if info else 0, live.generation) + 1
            view = live.view
        if not joins_log(view, live.records.head().horizon):  # nothing could be opened from it
            return
        saved = view.by_host
        index = saved.index if saved.index.plan.engine == "cpu" else cpu_copy(view.index)
        watermark = _as_of(view)
        info = SnapshotInfo(
            store_id=live.records.store_id,
            generation=live.generation,
            watermark=watermark,
            count=index.n,
            plan=index.plan,
            metric=index.metric,
            dim=index.dim,
            created_at=time.time(),
            seed=live.settings.seed,
            extra=(saved.stats if index is saved.index else IndexStats()).to_dict(),
            dead=np.flatnonzero(view.index_died <= watermark).astype(np.int64),
        )
        try:
            write_snapshot(live.snapshot_path, index, info, live.records.file_mode)
            if saved is not view:
                view.index.table.moved_to(index.table.vectors)
            self._unsaved_epoch = -1
        except (OSError, StorageError, SnapshotError) as error:
            self.failed = error
            live.events.record("snapshot-failed", f"{error}; opening will be slower", level=logging.WARNING)

    def log_is_long(self) -> bool:
        """Whether the log should be purged."""
        head = self._live.records.head()
        return head.last_seq - head.horizon > _most_entries(head.count)

    def log_is_held(self) -> bool:
        """Whether the snapshot on disk needs most of a long log, so that purging the rest would not help."""
        info, head = self.info(), self._live.records.head()
        return info is not None and info.watermark < head.last_seq - _most_entries(head.count) // 2

    def purge(self) -> int:
        """Delete log entries that neither the snapshot nor a process slightly behind needs; return their number."""
        info = self.info()
        upto = self._live.records.head().last_seq - LOG_KEPT
        return self._live.records.purge(upto if info is None else min(upto, info.watermark))


def joins_log(view: View, horizon: int) -> bool:
    """Whether a store could be opened from a snapshot of ``view``."""
    return _as_of(view) >= horizon


def _as_of(view: View) -> int:
    """The log entry up to which index and deaths are complete."""
    return view.index_seq if view.delta_n else view.watermark


def _most_entries(count: int) -> int:
    return LOG_KEPT + max(LOG_KEPT, int(LOG_SHARE * count))
