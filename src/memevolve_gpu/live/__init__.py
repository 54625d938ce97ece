"""The index of an open store: it follows the records, answers searches, and is rebuilt in the background.

The records (SQLite) are the source of record. They write each change to a log; everything here is derived from them.

Search. ``LiveIndex.search`` takes the published ``View``: an immutable index, a ``DeltaBuffer`` of rows that came after
it, and tombstones. Readers take a view without a lock and keep it as long as they like.

Catch-up. Before it answers, a search calls ``LiveIndex.catch_up``: a ``ViewBuilder`` replays the log from the view's
watermark, the last entry that the view contains, and a new view is published. Replay is the only way in which a change
reaches a view, whichever process made it.

Maintenance. After writes and searches ``Maintenance.notify`` passes events to the ``MaintenanceScheduler``, which
decides whether a round is due; a ``Worker`` thread runs it. A round verifies the index against the records, rebuilds it
where a rule says so, probes the recall of real queries, and purges the log. ``rebuild`` builds the new index beside the
one in use and swaps it in; what changed meanwhile stays in the delta buffer. The ``Saver`` writes snapshots, from which
the next opening continues. The ``DeviceManager`` says whether a GPU may hold the index.

Where to read:

- view.py, delta_buffer.py, view_builder.py: what a search sees, and how the log is applied to it.
- live_index.py: the published view, catch-up, search. filter_cache.py: filters as masks.
- field_columns.py: the fields that filters use. field_values.py: the values of one. column_file.py: the file of them.
  foresight.py: which ones are read before a filter names them.
- scheduler.py: the rules, and what to do next. maintenance.py: one round. rebuild.py: one rebuild.
- worker.py: the background thread.
- snapshots.py, snapshot_writer.py: the file that an opening reads, and when it is written.
- device_manager.py: the GPU. index_stats.py, query_sample.py: what is known of an index, and of real queries.
"""

from .device_manager import DeviceManager
from .live_index import LiveIndex, LiveSettings
from .maintenance import Maintenance, Report
from .view import Found, View
from .worker import Worker

__all__ = ["DeviceManager", "Found", "LiveIndex", "LiveSettings", "Maintenance", "Report", "View", "Worker"]
