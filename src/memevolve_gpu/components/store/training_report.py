"""What the index was trained on, or why it was not, and the setting that changes it."""

from __future__ import annotations

from ...live.causes import Cause
from ...live.view import View
from ...monitoring.health import Training
from ...training.collector import samples_wanted, source_for
from .engine import Engine
from .samples import Samples

__all__ = ["training_report"]

_PREFIX = "MEMEVOLVE_STORAGE_"


def training_report(engine: Engine, view: View, cause: Cause | None) -> Training:
    """The ``training`` section of the health report. cause: why a build is due, if one is."""
    rows, settings = view.facts.trained_rows, engine.live.settings
    sampled = rows > 0 and view.body.kind != "hnsw"  # a graph is built of the rows alone
    collections = engine.events.recent("samples")
    reason, setting = ("", "") if rows else _why_not(engine, view, cause)
    return Training(
        trained=rows > 0,
        source=None if not rows else source_for(rows) if sampled else "existing",
        units=rows,
        samples=samples_wanted(rows) if sampled else 0,
        samples_kept=Samples(engine.records, engine.embedder, engine.events, settings.seed).kept,
        next_source=source_for(view.count),
        next_samples=samples_wanted(view.count),
        min_training_units=settings.min_training_units,
        last_samples=collections[-1].figures if collections else None,
        reason=reason,
        setting=setting,
    )


def _why_not(engine: Engine, view: View, cause: Cause | None) -> tuple[str, str]:
    """Why exact search answers, and the setting that changes it; "" where waiting is enough."""
    settings, count = engine.live.settings, view.count
    if settings.index_type == "flat":
        return "index_type is flat, which needs no training", _PREFIX + "INDEX_TYPE"
    if count < settings.min_training_units:
        few = f"{count} units are fewer than the {settings.min_training_units} from which an index is trained"
        return f"{few}; an exact scan answers, and is right for so few", _PREFIX + "MIN_TRAINING_UNITS"
    if not count:
        return "there are no units yet", ""
    if view.facts.refused_rows:
        said = [event.cause for event in engine.events.recent("refused")[-1:]]
        return f"the last index was not good enough: {''.join(said) or 'see the log'}", _PREFIX + "TARGET_RECALL"
    if cause is not None:
        how = "the background builds it" if settings.background else "call run_maintenance()"
        return f"an index is due ({cause.text}); {how}", "" if settings.background else _PREFIX + "BACKGROUND"
    return engine.maintenance.plan(view).reason, _PREFIX + "INDEX_TYPE"
