"""Judges the figures of a store: what is its state, and what should its operator do?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..planner.nlist import ListsRule, lists_status

__all__ = ["Figures", "Training", "health"]


@dataclass(frozen=True, slots=True)
class Training:
    """What the index in use was trained on, or why nothing was trained yet.

    source: existing (the store's own vectors), hybrid (those and service samples), service (samples alone); None while
    nothing is trained. units and samples: how many of each; samples_kept: embedded and kept for a later training.
    next_source and next_samples: what a training now would take. last_samples: the figures of the last collection in
    this process. reason: why nothing is trained, else empty; setting: the variable that changes it, else empty.
    """

    trained: bool
    source: str | None = None
    units: int = 0
    samples: int = 0
    samples_kept: int = 0
    next_source: str | None = None
    next_samples: int = 0
    min_training_units: int = 0
    last_samples: dict[str, Any] | None = None
    reason: str = ""
    setting: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the running store measured; ``quality`` is None while no trained body is in use."""

    count: int
    max_units: int
    warning_threshold: float
    prune_threshold: float
    memory_bytes: int
    max_memory_bytes: int
    nlist: int
    lists: ListsRule
    quality: float | None
    build_cause: str
    background: bool
    read_only: bool
    legacy_problem: str
    performance: dict[str, Any]
    training: Training
    refusals: list[str] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    """Where searches run, what is held there and what went wrong; plain values."""
    index_lag: int = 0
    """Changes that are stored and not in the index yet."""
    lag_cause: str = ""
    thread_failure: str = ""
    """Why the thread of the background could not start."""
    damage: str | None = None
    """The first damage that any process met in the store."""
    mapped_bytes: int = 0
    disk_bytes: int = 0


def health(figures: Figures) -> dict[str, Any]:
    """The report of ``get_storage_health``: plain JSON values.

    usage_percentage is 0..1; memory in MiB: memory_usage_mb is resident and cannot be dropped, and counts against the
    limit; mapped_mb are vectors in a mapped file, which the system reads as needed; disk_mb are all files of the store.
    vectors_per_centroid is None where no lists are used.
    Above PERFORMANCE_THRESHOLD units: latency of the newest searches, embedding apart, in ms; probed_recall, recall@10
    of real queries in use; nlist_change, what the last change of nlist did to both. None for what is not known yet.
    training_quality_score is the worse of self-hit rate and recall@10 that searches reach now (1.0 for exact search).
    """
    usage = figures.count / figures.max_units
    return {
        "current_count": figures.count,
        "max_units": figures.max_units,
        "usage_percentage": usage,
        "memory_usage_mb": figures.memory_bytes / 2**20,
        "max_memory_mb": figures.max_memory_bytes / 2**20,
        "mapped_mb": figures.mapped_bytes / 2**20,
        "disk_mb": figures.disk_bytes / 2**20,
        "near_limit": usage >= figures.warning_threshold or _is_near_memory(figures),
        "at_limit": figures.count >= figures.max_units or figures.memory_bytes >= figures.max_memory_bytes,
        "performance_status": lists_status(figures.count, figures.nlist),
        "current_nlist": figures.nlist or None,
        "vectors_per_centroid": figures.count / figures.nlist if figures.nlist else None,
        "training_quality_score": 1.0 if figures.quality is None else figures.quality,
        "training": asdict(figures.training),
        "needs_retraining": bool(figures.build_cause),
        "index_lag": figures.index_lag,
        "recommendations": _recommendations(figures, usage),
        "device": figures.device,
        "damage": figures.damage,
        **figures.performance,
    }


def _recommendations(figures: Figures, usage: float) -> list[str]:
    found = [*_about_damage(figures.damage), *_about_room(figures, usage)]
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
    settings = figures.lists.held_by(figures.count, figures.nlist)
    if not settings:
        return []
    each, few = figures.count / figures.nlist, lists_status(figures.count, figures.nlist) == "DEGRADED"
    names = " and ".join(f"MEMEVOLVE_STORAGE_{name}" for name in settings)
    keeps = f"{names} keep{'s' if len(settings) == 1 else ''} the index from {'more' if few else 'fewer'}"
    return [f"{each:.0f} vectors in each list are too {'many' if few else 'few'}: {keeps} lists; change it."]


def _about_damage(damage: str | None) -> list[str]:
    if damage is None:
        return []
    return [f"Damage was met ({damage}). Run memevolve-store check --fix; if problems remain, restore a backup."]


def _about_device(device: dict[str, Any]) -> list[str]:
    """A GPU that was asked for, or that should be at work, and is not."""
    if device.get("disappointed"):
        return [f"No GPU is used ({device['reason']}); the CPU answers. MEMEVOLVE_STORAGE_DEVICE=auto accepts that."]
    if device.get("problem"):
        return [f"The GPU is not used ({device['problem']}); the CPU answers."]
    return []


def _about_room(figures: Figures, usage: float) -> list[str]:
    found = []
    if usage >= 1:
        found.append("The store is full: delete or consolidate units, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS.")
    elif usage >= figures.prune_threshold:
        found.append(f"The store is {usage:.0%} full: prune now.")
    elif usage >= figures.warning_threshold:
        found.append(f"The store is {usage:.0%} full: plan to prune or consolidate.")
    if _is_near_memory(figures):
        found.append("Index memory is near its limit: prune, or raise MEMEVOLVE_STORAGE_MAX_MEMORY_MB.")
    return found


def _is_near_memory(figures: Figures) -> bool:
    return figures.memory_bytes >= figures.warning_threshold * figures.max_memory_bytes
