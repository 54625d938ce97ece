"""What operators are told of a store on Milvus."""

from __future__ import annotations

import time
from typing import Any

from ....errors import InvalidQueryError
from ....monitoring.health import Figures, Training, health
from ....planner.nlist import ListsRule
from ..operations import OPERATIONS, plain_details
from .core import Core

__all__ = ["health_report", "registered", "statistics_report"]

_DEFAULT_MB = 2048.0


def health_report(core: Core) -> dict[str, Any]:
    """As ``VectorStore.get_storage_health``: memory is the server's and counts as 0 here, lists are per segment."""
    config, count = core.config, core.table.count()
    waiting = core.unsettled()
    most = _DEFAULT_MB if config.max_memory_mb == "auto" else float(config.max_memory_mb)
    figures = Figures(
        count=count,
        max_units=config.max_memory_units,
        warning_threshold=config.warning_threshold,
        prune_threshold=config.prune_threshold,
        memory_bytes=0,
        max_memory_bytes=int(most * 2**20),
        nlist=0,
        lists=ListsRule(),
        quality=None,
        build_cause=f"{waiting} rows wait for the server's {core.plan.index}" if waiting else "",
        background=False,
        read_only=False,
        legacy_problem="",
        training=Training(
            trained=core.plan.index != "FLAT",
            source=None if core.plan.index == "FLAT" else "existing",
            reason="the server trains an index for each segment, on its own vectors",
            setting="MEMEVOLVE_STORAGE_INDEX_TYPE",
        ),
        performance={"latency": core.latency.percentiles()} if count > config.performance_threshold else {},
    )
    return health(figures)


def statistics_report(core: Core) -> dict[str, Any]:
    segments = core.table.segments() or []
    return {
        "store": core.place.address,
        "count": core.table.count(),
        "dim": core.facts.dim,
        "embedding_model": core.facts.model,
        "metric": core.facts.metric,
        "index": {"kind": core.plan.index, "nlist": core.plan.nlist, "reason": core.plan.reason},
        "server": {
            "version": core.version.text,
            "gpu": core.version.gpu,
            "consistency": core.table.clock.level,
            "segments": len(segments),
            "rows_indexed": sum(one.rows for one in segments if one.indexed),
            "rows_not_indexed": sum(one.rows for one in segments if not one.indexed),
        },
        "management": list(core.operations)[-20:],
        "latency": core.latency.percentiles(),
        "event_totals": core.events.totals(),
        "events": [event.as_dict() for event in core.events.recent()[-20:]],
    }


def registered(core: Core, operation: str, details: Any) -> dict[str, Any]:
    """Note an operation in this process. The server compacts and indexes by itself, so there is nothing to decide."""
    if operation not in OPERATIONS:
        raise InvalidQueryError(f"operation_type must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    entry = {"operation": operation, "at": time.time(), "details": plain_details(details)}
    core.operations.append(entry)
    core.events.record("management", f"{operation}: nothing")
    return {**entry, "count_after": core.table.count(), "decision": "nothing"}
