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

__all__ = ["LOG_KEPT", "Saver", "joins_log"]

LOG_KEPT = 10_000
"""Log entries that a process a little behind may still need."""

LOG_SHARE = 0.25
"""Log entries, of some 12 bytes each, that are kept at most: so many times the live units, if that is more."""

CHANGED_SHARE = 0.12
"""Log entries since the snapshot, as a share of the live units, from which an extended index is saved: so much is
applied again by the next opening if this process is killed. The same share of the vectors may be in memory instead of
being mapped from the snapshot."""

MOVED_BYTES = 16 << 20
"""Fewer bytes of vectors stay in memory without a reason to save."""


class Saver:
    """The snapshot file of one live index; used by whoever holds the maintenance lock."""

    def __init__(self, live: LiveIndex) -> None:
        self._live = live
        self.failed: Exception | None = None
        """Why the last snapshot could not be written."""
        self._unsaved_epoch = -1

    @property
    def unsaved(self) -> bool:
        """Is the index in use one that this process made and did not save yet?"""
        return self._unsaved_epoch == self._live.epoch

    def made(self) -> None:
        """Maintenance has just put another index in use."""
        self._unsaved_epoch = self._live.epoch

    def forget_failure(self) -> None:
        """What could not be written may be tried again."""
        self.failed = None

    def info(self) -> SnapshotInfo | None:
        """What the snapshot on disk says of itself, if it is this store's."""
        try:
            info = read_info(self._live.snapshot_path)
        except SnapshotError:
            return None
        return info if info.store_id == self._live.records.store_id else None

    def next_generation(self) -> int:
        info = self.info()
        return max(info.generation if info else 0, self._live.generation) + 1

    def is_due(self, view: View) -> bool:
        """Would an opening from the snapshot on disk have much to apply?"""
        info = self.info()
        return info is None or view.watermark - info.watermark >= CHANGED_SHARE * view.count

    def holds_vectors(self, view: View) -> bool:
        """Are many vectors in memory that a snapshot would allow to be mapped?"""
        table = view.index.table
        return view.index.kind != "hnsw" and table.resident_bytes > max(MOVED_BYTES, CHANGED_SHARE * table.nbytes)

    def is_saved(self, view: View) -> bool:
        """Does the snapshot on disk, from which this process came or which it wrote, hold nearly all of ``view``?

        An index on a device adds nothing to it: what is saved of one are its vectors.
        """
        info = self.info()
        known = info is not None and info.generation == self._live.generation
        return known and view.index.plan.engine != "cpu" and not self.is_due(view)

    def save(self, view: View) -> None:
        """Write the snapshot of ``view``; a failure is an event, and is kept in ``failed``."""
        live, self.failed = self._live, None
        if live.records.read_only:
            return
        index = view.index if view.index.plan.engine == "cpu" else cpu_copy(view.index)
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
            extra=(view.stats if index is view.index else IndexStats()).to_dict(),
            dead=np.flatnonzero(view.index_died <= watermark).astype(np.int64),
        )
        try:
            write_snapshot(live.snapshot_path, index, info, live.records.file_mode)
            self._unsaved_epoch = -1
        except (OSError, StorageError, SnapshotError) as error:
            self.failed = error
            live.events.record("snapshot-failed", f"{error}; opening will be slower", level=logging.WARNING)

    def log_is_long(self) -> bool:
        head = self._live.records.head()
        return head.last_seq - head.horizon > _most_entries(head.count)

    def log_is_held(self) -> bool:
        """Does the snapshot on disk need so much of a long log that forgetting the rest would not help?"""
        info, head = self.info(), self._live.records.head()
        return info is not None and info.watermark < head.last_seq - _most_entries(head.count) // 2

    def purge(self) -> int:
        """Forget log entries that neither the snapshot nor a process a little behind still needs."""
        info = self.info()
        upto = self._live.records.head().last_seq - LOG_KEPT
        return self._live.records.purge(upto if info is None else min(upto, info.watermark))


def joins_log(view: View, horizon: int) -> bool:
    """Could an opening go on from a snapshot of ``view``?"""
    return _as_of(view) >= horizon


def _as_of(view: View) -> int:
    """The log entry up to which index and deaths say everything."""
    return view.index_seq if view.delta_n else view.watermark


def _most_entries(count: int) -> int:
    return LOG_KEPT + max(LOG_KEPT, int(LOG_SHARE * count))
