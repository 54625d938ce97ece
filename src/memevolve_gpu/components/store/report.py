"""Collects the figures of an open store and hands them to monitoring for judgement."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ...live.attention import quality_now
from ...live.view import View
from ...monitoring.health import Figures, health
from ...planner.nlist import ListsRule
from ...records.schema import MODEL_KEY
from .engine import Engine
from .operations import history
from .training_report import training_report

__all__ = ["health_report", "statistics_report"]


def health_report(engine: Engine) -> dict[str, Any]:
    engine.live.look_at_device()
    view, head = engine.follow(), engine.records.head()
    quality = quality_now(engine.live, view)
    cause = engine.maintenance.cause(view)
    figures = Figures(
        count=head.count,
        max_units=engine.config.max_memory_units,
        warning_threshold=engine.config.warning_threshold,
        prune_threshold=engine.config.prune_threshold,
        memory_bytes=engine.live.nbytes,
        max_memory_bytes=engine.max_memory_bytes,
        nlist=view.body.nlist,
        lists=_lists_rule(engine),
        quality=None if quality is None else quality.score,
        build_cause=cause.text if cause else "",
        background=engine.config.background,
        read_only=engine.records.read_only,
        legacy_problem=engine.legacy_problem,
        damage=engine.records.damage,
        performance=_performance(engine, view) if view.count > engine.config.performance_threshold else {},
        training=training_report(engine, view, cause),
        refusals=[event.cause for event in engine.events.recent("refused")[-1:]],
        device=_device(engine, view),
        index_lag=max(0, head.last_seq - view.watermark),
        lag_cause=engine.lagging,
        thread_failure=engine.worker.start_failure,
        mapped_bytes=view.body.mapped_bytes,
        disk_bytes=sum(_file_bytes(engine).values()),
    )
    return health(figures)


def statistics_report(engine: Engine) -> dict[str, Any]:
    engine.live.look_at_device()
    view, head = engine.follow(), engine.records.head()
    held, planned = view.body.plan, engine.maintenance.plan(view)
    return {
        "store_id": engine.records.store_id,
        "count": head.count,
        "dim": engine.records.dim,
        "embedding_model": (engine.records.get_meta(MODEL_KEY) or b"").decode() or None,
        "metric": engine.records.metric,
        "index": {
            "kind": view.body.kind,
            "nlist": view.body.nlist,
            "rows": view.body.n,
            "engine": held.engine,
            "device": view.body.device,
            "precision": held.precision,
            "reason": held.reason,
        },
        "plan": asdict(planned),
        "device": _device(engine, view),
        "tail_rows": view.tail_n,
        "tombstones": view.body_dead + view.tail_dead,
        "memory_bytes": engine.live.nbytes,
        "mapped_bytes": view.body.mapped_bytes,
        "max_memory_bytes": engine.max_memory_bytes,
        "log": {"last_seq": head.last_seq, "horizon": head.horizon, "watermark": view.watermark},
        "management": history(engine)[-20:],
        "maintenance": {
            "running": engine.maintenance.running,
            "rounds": engine.maintenance.rounds,
            "cpu_seconds": engine.maintenance.cpu_seconds,
        },
        "probed_recall": view.facts.probed,
        "queries_sampled": engine.live.asked.kept,
        "latency": engine.live.latency.percentiles(),
        "generation": engine.live.generation,
        "files": _file_bytes(engine),
        "event_totals": engine.events.totals(),
        "events": [event.as_dict() for event in engine.events.recent()[-20:]],
    }


def _lists_rule(engine: Engine) -> ListsRule:
    held = engine.live.settings
    return ListsRule(held.vectors_per_centroid, held.nlist_min, held.nlist_max, held.adaptive_nlist)


def _performance(engine: Engine, view: View) -> dict[str, Any]:
    """Latency, probed recall, and what the last change of nlist did to both."""
    live = engine.live
    latency = live.latency.percentiles()
    change = None if live.relisted is None else live.relisted.report(view, latency)
    return {"latency": latency, "probed_recall": view.facts.probed, "nlist_change": change}


def _device(engine: Engine, view: View) -> dict[str, Any]:
    """The device as it was found a moment ago, with what stands against the plan that was made since."""
    return engine.live.desk.report(view.body)


def _file_bytes(engine: Engine) -> dict[str, int]:
    files = engine.records.file_bytes()
    with suppress(FileNotFoundError):
        files["snapshot"] = engine.live.snapshot_path.stat().st_size
    return files
