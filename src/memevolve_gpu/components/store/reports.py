"""The reports of a store: health, statistics, inventory and maintenance, and the history of management operations."""

from __future__ import annotations

import json
import math
import numbers
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import cast

from ...live.namespaces import DEFAULT
from ...live.scheduler import RebuildReason
from ...live.view import View
from ...monitoring.events import EventLog
from ...planner.nlist import ListsRule, lists_status
from ...records.schema import MODEL_KEY
from ...records.transaction import Transaction
from ...training.training_set import samples_wanted, source_for
from ...types import Json, JsonObject
from ...utils.arguments import word
from ...utils.config import StorageConfig
from ...utils.report_types import (
    DeviceReport,
    EventReport,
    Inventory,
    OperationEntry,
    PlanReport,
    StorageHealth,
    StoreStatistics,
    TrainingReport,
)
from .namespaces import NamespaceInfo
from .namespaces import Path as Space
from .service_samples import Samples
from .session import AFTER_COMMIT, StoreSession
from .units import MAX_UNIT_BYTES

OPERATIONS = ("prune", "consolidate", "deduplicate", "forget")
HISTORY_KEY = "management_history"
KEPT = 100

MOST_DEEP = 32
"""Levels of details that are kept; what lies deeper, or contains itself, is kept as its repr."""

MOST_REPR = 1000
"""Characters of a repr that are kept."""

RETRAIN_SHARE = 0.25
"""Management that removed this share of what the index was trained on has changed what it should be trained on."""


def register(session: StoreSession, operation: str, details: object, space: Space) -> OperationEntry:
    """Keep an operation in the history of its namespace and decide what the index does next."""
    word("operation_type", operation, OPERATIONS)
    plain, after = plain_details(details), session.records.count(ns=session.key_of(space))
    removed, before = _removed(plain), plain.get("count_before")
    if not isinstance(before, int) or isinstance(before, bool):
        before = after + removed
    entry = operation_entry(session, operation, plain, removed, before, after)
    with session.records.write(namespace=space) as tx:
        kept = append_history(tx, entry)
    entry["decision"] = decide(session, kept)
    session.events.record(
        "management",
        f"{operation}: {entry['decision']}",
        count_before=entry["count_before"],
        count_after=entry["count_after"],
        removed=entry["removed"],
    )
    return entry


def append_history(tx: Transaction, entry: OperationEntry) -> list[OperationEntry]:
    """Add the entry to the history in this transaction, and return the history."""
    name = history_key(tx.namespace)
    kept: list[OperationEntry] = [*(_entries(tx.get_meta(name)) or []), entry][-KEPT:]
    tx.set_meta(name, json.dumps(kept).encode())
    return kept


def history_key(ns: int) -> str:
    """The key of ``meta`` for the history of management operations of a namespace."""
    return HISTORY_KEY if ns == DEFAULT else f"{HISTORY_KEY}/{ns}"


def plain_details(details: object) -> JsonObject:
    """Convert the details of an operation to JSON values; a value that JSON cannot hold becomes its ``repr``.

    Details that are no mapping come under ``details``; those of more than MAX_UNIT_BYTES are cut.
    """
    plain = _plain(details if isinstance(details, Mapping) else {"details": details}, MOST_DEEP)
    size = len(json.dumps(plain))
    if size <= MAX_UNIT_BYTES:
        return dict(plain)
    return {"removed": _removed(plain), "details": f"{_repr(details)}, {size} bytes as JSON"}


def _history(session: StoreSession, ns: int) -> list[OperationEntry]:
    """The newest operations in a namespace, newest last."""
    name = history_key(ns)
    found = _entries(session.records.get_meta(name))
    if found is None:
        session.records.note_damage(f"the value {name!r}, the history of operations, is damaged")
    return found or []


def _entries(raw: bytes | None) -> list[OperationEntry] | None:
    """The operations in a kept history; None when it is damaged."""
    try:
        found = json.loads(raw or b"[]")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(entry, dict) for entry in found) else None


def operation_entry(
    session: StoreSession, operation: str, details: JsonObject, removed: int, before: int, after: int
) -> OperationEntry:
    """What the history keeps of an operation that took place now."""
    return {
        "operation": operation,
        "at": time.time(),
        "count_before": before,
        "count_after": after,
        "removed": removed,
        "generation": session.live.generation,
        "details": details,
    }


def _removed(details: Mapping[str, object]) -> int:
    """The number of deleted units, by any of the keys that callers use."""
    for name in ("removed", "deleted", "count"):
        value = details.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    ids = details.get("ids")
    return len(ids) if isinstance(ids, list) else 0


def decide(session: StoreSession, kept: list[OperationEntry]) -> str:
    """Decide what the index does after the operations of this history: retrain, compact, append or nothing.

    The operations are committed: an index that cannot follow now records an event, and the next search tries again.
    """
    try:
        return _decide(session, kept)
    except AFTER_COMMIT as error:
        session.events.record("apply-failed", f"the operation is noted, the index follows later: {error}")
        return "nothing"


def _decide(session: StoreSession, kept: list[OperationEntry]) -> str:
    view = session.live.catch_up()
    trained = view.stats.trained_rows
    removed = sum(entry["removed"] for entry in kept if entry["generation"] == session.live.generation)
    if trained and removed >= RETRAIN_SHARE * trained:
        session.maintenance.notify(
            RebuildReason("train", f"management removed {removed} of {trained} units since the training")
        )
        decision = "retrain"
    else:
        cause = session.maintenance.cause(view)
        decision = "nothing" if cause is None else {"train": "retrain"}.get(cause.kind, cause.kind)
    if decision != "nothing":
        session.wake()
    return decision


def _plain(value: object, deep: int) -> Json:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral) and abs(int(value)) < 2**63:
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and math.isfinite(value):
        return float(value)
    if deep and isinstance(value, Mapping):
        return {key if isinstance(key, str) else _repr(key): _plain(one, deep - 1) for key, one in value.items()}
    if deep and isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one, deep - 1) for one in value]
    return _repr(value)


def _repr(value: object) -> str:
    """The beginning of its repr; the default repr where its own fails."""
    try:
        return repr(value)[:MOST_REPR]
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError):
        return object.__repr__(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the health report of a store is made from; what a store has not keeps its default."""

    config: StorageConfig
    count: int
    """Units of the namespace that the report is for."""
    usage: float
    """The larger share of the limits of the namespace and of the file that is used."""
    rows: int
    """Units of the file."""
    max_units: int
    max_memory_bytes: int
    training: TrainingReport
    memory_bytes: int = 0
    mapped_bytes: int = 0
    disk_bytes: int = 0
    nlist: int = 0
    lists: ListsRule = field(default_factory=ListsRule)
    quality: float | None = None
    """None while no trained index is in use."""
    build_cause: str = ""
    background: bool = False
    read_only: bool = False
    legacy_problem: str = ""
    performance: StorageHealth | None = None
    """``latency``, ``probed_recall`` and ``nlist_change``; None below PERFORMANCE_THRESHOLD units."""
    refusals: list[str] = field(default_factory=list)
    device: DeviceReport = field(default_factory=DeviceReport)
    index_lag: int = 0
    """Changes that are stored and not applied to the index yet."""
    lag_cause: str = ""
    thread_failure: str = ""
    """Why the thread of the background could not start."""
    damage: str | None = None
    """The first damage that any process met in the store."""


def health(figures: Figures) -> StorageHealth:
    """The report of ``get_storage_health``; :class:`StorageHealth` documents its keys."""
    usage = figures.usage
    report: StorageHealth = {
        "current_count": figures.count,
        "max_units": figures.max_units,
        "usage_percentage": usage,
        "memory_usage_mb": figures.memory_bytes / 2**20,
        "max_memory_mb": figures.max_memory_bytes / 2**20,
        "mapped_mb": figures.mapped_bytes / 2**20,
        "disk_mb": figures.disk_bytes / 2**20,
        "near_limit": usage >= figures.config.warning_threshold or _is_near_memory(figures),
        "at_limit": usage >= 1 or figures.memory_bytes >= figures.max_memory_bytes,
        "performance_status": lists_status(figures.rows, figures.nlist),
        "current_nlist": figures.nlist or None,
        "vectors_per_centroid": figures.rows / figures.nlist if figures.nlist else None,
        "training_quality_score": 1.0 if figures.quality is None else figures.quality,
        "training": figures.training,
        "needs_retraining": bool(figures.build_cause),
        "index_lag": figures.index_lag,
        "recommendations": _recommendations(figures, usage),
        "device": figures.device,
        "damage": figures.damage,
    }
    if figures.performance is not None:
        report.update(figures.performance)
    return report


def _recommendations(figures: Figures, usage: float) -> list[str]:
    found = []
    if figures.damage is not None:
        fix = "Run memevolve-store check --fix; if problems remain, restore a backup."
        found.append(f"Damage was met ({figures.damage}). {fix}")
    found += _about_room(figures, usage)
    if figures.build_cause:
        how = "it is done in the background" if figures.background else "call run_maintenance()"
        found.append(f"The index is due for a rebuild ({figures.build_cause}); {how}.")
    found += _about_lists(figures)
    found += [f"The last build was refused ({cause}); search stays exact." for cause in figures.refusals]
    found += _about_device(figures.device)
    if figures.lag_cause:
        found.append(
            f"The index lacks {figures.index_lag} changes ({figures.lag_cause}). They are stored; every search tries "
            "again to apply them, and opening the store again reads them."
        )
    if figures.thread_failure:
        found.append(
            f"No thread can be started for the background ({figures.thread_failure}): raise the limit of processes "
            "(ulimit -u) or of memory; it is tried again at the next write or search."
        )
    if figures.legacy_problem:
        found.append(f"An old store could not be imported: {figures.legacy_problem}.")
    if figures.read_only:
        found.append("The store is read-only: make the file and its folder writable to store units.")
    return found


def _about_lists(figures: Figures) -> list[str]:
    """The setting that holds the lists too few or too many."""
    settings = figures.lists.held_by(figures.rows, figures.nlist)
    if not settings:
        return []
    each, few = figures.rows / figures.nlist, lists_status(figures.rows, figures.nlist) == "DEGRADED"
    names = " and ".join(f"MEMEVOLVE_STORAGE_{name}" for name in settings)
    keeps = f"{names} keep{'s' if len(settings) == 1 else ''} the index from {'more' if few else 'fewer'}"
    return [f"{each:.0f} vectors in each list are too {'many' if few else 'few'}: {keeps} lists; change it."]


def _about_device(device: DeviceReport) -> list[str]:
    """A GPU that was requested, or planned for, and is not used."""
    if device.get("unmet"):
        return [f"No GPU is used ({device['reason']}); the CPU answers. MEMEVOLVE_STORAGE_DEVICE=auto accepts that."]
    if device.get("problem"):
        return [f"The GPU is not used ({device['problem']}); the CPU answers."]
    return []


def _about_room(figures: Figures, usage: float) -> list[str]:
    found = []
    if usage >= 1:
        found.append("The store is full: delete or consolidate units, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS.")
    elif usage >= figures.config.prune_threshold:
        found.append(f"The store is {usage:.0%} full: prune now.")
    elif usage >= figures.config.warning_threshold:
        found.append(f"The store is {usage:.0%} full: plan to prune or consolidate.")
    if _is_near_memory(figures):
        found.append("Index memory is near its limit: prune, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB.")
    return found


def _is_near_memory(figures: Figures) -> bool:
    return figures.memory_bytes >= figures.config.warning_threshold * figures.max_memory_bytes


_PREFIX = "MEMEVOLVE_STORAGE_"


def training_report(session: StoreSession, view: View, cause: RebuildReason | None) -> TrainingReport:
    """The ``training`` section of the health report. cause: why a build is due, if one is."""
    rows, settings = view.stats.trained_rows, session.live.settings
    sampled = rows > 0 and view.index.kind != "hnsw"  # a graph is built of the rows alone
    collections = session.events.recent("samples")
    reason, setting = ("", "") if rows else _why_not(session, view, cause)
    return TrainingReport(
        trained=rows > 0,
        source=None if not rows else source_for(rows) if sampled else "existing",
        units=rows,
        samples=samples_wanted(rows) if sampled else 0,
        samples_kept=Samples(session.records, session.embedder.embedder, session.events, settings.seed).kept,
        next_source=source_for(view.count),
        next_samples=samples_wanted(view.count),
        min_training_units=settings.min_training_units,
        last_samples=collections[-1].figures if collections else None,
        reason=reason,
        setting=setting,
    )


def _why_not(session: StoreSession, view: View, cause: RebuildReason | None) -> tuple[str, str]:
    """Why exact search answers, and the setting that changes it; "" where waiting is enough."""
    settings, count = session.live.settings, view.count
    if settings.index_type == "flat":
        return "index_type is flat, which needs no training", _PREFIX + "INDEX_TYPE"
    if count < settings.min_training_units:
        few = f"{count} units are fewer than the {settings.min_training_units} from which an index is trained"
        return f"{few}; an exact scan answers, and is right for so few", _PREFIX + "MIN_TRAINING_UNITS"
    if not count:
        return "there are no units yet", ""
    if view.stats.refused_rows:
        said = [event.cause for event in session.events.recent("refused")[-1:]]
        return f"the last index was not good enough: {''.join(said) or 'see the log'}", _PREFIX + "TARGET_RECALL"
    if cause is not None:
        how = "the background builds it" if settings.background else "call run_maintenance()"
        return f"an index is due ({cause.text}); {how}", "" if settings.background else _PREFIX + "BACKGROUND"
    return session.maintenance.plan(view).reason, _PREFIX + "INDEX_TYPE"


def health_report(session: StoreSession, space: NamespaceInfo) -> StorageHealth:
    """The report of ``VectorStore.get_storage_health`` for a namespace."""
    session.live.look_at_device()
    view, head = session.follow(), session.records.head()
    quality = session.maintenance.quality(view)
    cause = session.maintenance.cause(view)
    most, own = session.config.max_memory_units, space.max_units
    performance = None
    if view.count > session.config.performance_threshold:
        latency, change = session.live.latency.percentiles(), session.live.nlist_change
        since = None if change is None else change.report(view, latency)
        sections = {"latency": latency, "probed_recall": view.stats.probed, "nlist_change": since}
        performance = cast("StorageHealth", sections)
    figures = Figures(
        config=session.config,
        count=space.count,
        usage=max(head.count / most, 0.0 if own is None else space.count / own),
        rows=head.count,
        max_units=most if own is None else own,
        memory_bytes=session.live.nbytes,
        max_memory_bytes=session.max_memory_bytes,
        nlist=view.index.nlist,
        lists=session.live.settings.lists,
        quality=None if quality is None else quality.score,
        build_cause=cause.text if cause else "",
        background=session.config.background,
        read_only=session.records.read_only,
        legacy_problem=session.legacy_problem,
        damage=session.records.damage,
        performance=performance,
        training=training_report(session, view, cause),
        refusals=[event.cause for event in session.events.recent("refused")[-1:] if view.stats.refused_rows],
        device=session.live.device_manager.report(view),
        index_lag=max(0, head.last_seq - view.watermark),
        lag_cause=session.lagging,
        thread_failure=session.worker.start_failure,
        mapped_bytes=view.index.mapped_bytes,
        disk_bytes=sum(_file_bytes(session).values()),
    )
    return health(figures)


def statistics_report(session: StoreSession, space: NamespaceInfo) -> StoreStatistics:
    """The report of ``VectorStore.statistics`` for a namespace; events, which may name units, only for the default."""
    session.live.look_at_device()
    view, head = session.follow(), session.records.head()
    held, planned = view.index.plan, session.maintenance.plan(view)
    return {
        "store_id": session.records.store_id,
        "count": space.count,
        "dim": session.records.dim,
        "embedding_model": session.records.get_meta_text(MODEL_KEY) or None,
        "metric": session.records.metric,
        "index": {
            "kind": view.index.kind,
            "nlist": view.index.nlist,
            "rows": view.index.n,
            "engine": held.engine,
            "device": view.index.device,
            "precision": held.precision,
            "reason": held.reason,
        },
        "plan": cast("PlanReport", asdict(planned)),
        "device": session.live.device_manager.report(view),
        "tail_rows": view.delta_n,
        "tombstones": view.index_dead + view.delta_dead,
        "memory_bytes": session.live.nbytes,
        "mapped_bytes": view.index.mapped_bytes,
        "max_memory_bytes": session.max_memory_bytes,
        "log": {"last_seq": head.last_seq, "horizon": head.horizon, "watermark": view.watermark},
        "management": _history(session, session.key_of(space.path))[-20:],
        "maintenance": {
            "running": session.maintenance.running,
            "rounds": session.maintenance.rounds,
            "cpu_seconds": session.maintenance.cpu_seconds,
        },
        "probed_recall": view.stats.probed,
        "queries_sampled": session.live.query_sample.kept,
        "latency": session.live.latency.percentiles(),
        "generation": session.live.generation,
        "files": _file_bytes(session),
        "event_totals": session.events.totals(),
        "events": [] if space.path else event_reports(session.events),
    }


def inventory_report(session: StoreSession, ns: int) -> Inventory:
    """The report of ``VectorStore.inventory`` for a namespace; the bytes are those of the file."""
    found = session.records.inventory(ns=ns)
    unknown = found.count - sum(found.types.values())
    return {
        "count": found.count,
        "types": {**found.types, "unknown": unknown} if unknown > 0 else found.types,
        "oldest": found.oldest,
        "newest": found.newest,
        "bytes": sum(session.records.file_bytes().values()),
    }


def event_reports(events: EventLog) -> list[EventReport]:
    """The newest 20 events, newest last."""
    return [event.report() for event in events.recent()[-20:]]


def _file_bytes(session: StoreSession) -> dict[str, int]:
    files = session.records.file_bytes()
    for name, path in (("snapshot", session.live.snapshot_path), ("columns", session.records.columns_path)):
        with suppress(FileNotFoundError):
            files[name] = path.stat().st_size
    return files
