"""Figures of a store for Prometheus, and spans for OpenTelemetry; also for programs that embed a store."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from opentelemetry import trace
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..components.store.base import StorageBackend
from ..errors import ConfigurationError, MemEvolveError
from ..types import Json, JsonObject

CALLS: dict[str, str] = {
    **dict.fromkeys(("search", "search_keywords", "search_units", "search_vectors"), "search_memory"),
    **dict.fromkeys(("store", "store_batch", "replace_batch"), "upsert_memory"),
    **dict.fromkeys(("update", "patch", "update_where"), "update_memory"),
    **dict.fromkeys(("delete", "delete_batch", "delete_where"), "delete_memory"),
    **dict.fromkeys(("clear", "delete_namespace"), "delete_memory_store"),
    **dict.fromkeys(("retrieve", "retrieve_batch"), "retrieval"),
    "undo": "update_memory",
}
"""The methods of a store that are counted and traced, and what the conventions for GenAI memory call each."""

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)


def register(store: StorageBackend, registry: CollectorRegistry = REGISTRY) -> None:
    """Give a registry the figures of a store, and count and time its calls from here on, also those of its namespaces.

    Args:
        store: The store. What it measures itself is read when the registry is scraped.
        registry: A registry of prometheus-client that has no store yet.

    Raises:
        ConfigurationError: The registry has a store already; a name in it means one thing.

    Examples:
        >>> from prometheus_client import CollectorRegistry, generate_latest
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> from memevolve_gpu.server.metrics import register
        >>> registry = CollectorRegistry()
        >>> with VectorStore("memory", HashingEmbedder()) as store:
        ...     register(store, registry)
        ...     _ = store.store({"content": "Write tests first"})
        ...     b"memevolve_units 1.0" in generate_latest(registry)
        True
    """
    try:
        seconds = Histogram(
            "memevolve_call_duration_seconds",
            "Time of calls of the store.",
            ["method"],
            registry=registry,
            buckets=_BUCKETS,
        )
    except ValueError as error:
        raise ConfigurationError(
            f"registry: it has a store already; use a CollectorRegistry of its own ({error})"
        ) from error
    failed = Counter("memevolve_call_errors", "Calls that failed.", ["method", "error"], registry=registry)
    registry.register(_StoreCollector(store))
    observed = {method: seconds.labels(method) for method in CALLS}

    def around(method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        observe = observed[method].observe

        @functools.wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                result = call(*arguments, **named)
            except MemEvolveError as error:
                failed.labels(method, type(error).__name__).inc()
                raise
            observe(time.perf_counter() - started)
            return result

        return timed

    _wrap_calls(store, around)


def trace_calls(store: StorageBackend, tracer: trace.Tracer | None = None) -> None:
    """Make an OpenTelemetry span of each call of a store from here on, also of those of its namespaces.

    A span names the operation, the namespace, the number of results asked for and the class of an error, as the
    conventions for GenAI memory and for databases have it; it holds no text of units or queries.

    Args:
        store: The store.
        tracer: Makes the spans; None takes one from the global provider.

    Examples:
        >>> from memevolve_gpu import HashingEmbedder, VectorStore
        >>> from memevolve_gpu.server.metrics import trace_calls
        >>> with VectorStore("memory", HashingEmbedder()) as store:
        ...     trace_calls(store)
        ...     store.search("tests")
        []
    """
    chosen = trace.get_tracer("memevolve_gpu") if tracer is None else tracer

    def around(method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        name, system = f"{CALLS[method]} memevolve", "memevolve"
        fixed: JsonObject = {"gen_ai.operation.name": CALLS[method], "gen_ai.provider.name": system}
        fixed |= {"db.system.name": system, "db.operation.name": method}

        @functools.wraps(call)
        def spanned(self: Any, *arguments: Any, **named: Any) -> Any:
            path, attributes = getattr(self, "namespace_path", ()), fixed
            if path:
                where = "/".join(path)
                attributes = {**fixed, "db.namespace": where, "gen_ai.memory.store.id": where}
            span = chosen.start_span(name, attributes=attributes)  # not made current: that costs as much again
            try:
                return call(self, *arguments, **named)
            except MemEvolveError as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(trace.StatusCode.ERROR)
                raise
            finally:
                span.end()

        return spanned

    _wrap_calls(store, around)


def _wrap_calls(store: StorageBackend, around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Give the store a class whose methods are wrapped; the views of its namespaces, which are copies, have it too."""
    kind = type(store)
    own = {name for name in CALLS if getattr(kind, name, None) is not getattr(StorageBackend, name, None)}
    wrapped = {name: around(name, getattr(kind, name)) for name in own}
    store.__class__ = type(kind.__name__, (kind,), {**wrapped, "__module__": kind.__module__, "__doc__": kind.__doc__})


class _StoreCollector(Collector):
    """Reads the figures of a store when a registry is scraped; none once the store is closed."""

    def __init__(self, store: StorageBackend) -> None:
        self._store = store

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape, and no name is checked."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        try:
            health: Mapping[str, Json] = self._store.get_storage_health()
            read = getattr(self._store, "statistics", None)
            stats: Mapping[str, Json] = read() if read is not None else {}
        except MemEvolveError:
            yield GaugeMetricFamily("memevolve_up", "Whether the store answers.", 0)
            return
        yield GaugeMetricFamily("memevolve_up", "Whether the store answers.", 1)
        for name, text, value in _plain(health, stats):
            if value is not None:
                yield GaugeMetricFamily(f"memevolve_{name}", text, float(value))
        yield from _counters(stats)
        yield from _labelled(health, stats)


def _plain(health: Mapping[str, Json], stats: Mapping[str, Json]) -> Iterator[tuple[str, str, Json]]:
    log, device, index = stats.get("log", {}), stats.get("device", {}), stats.get("index", {})
    yield "units", "Units in the store.", health["current_count"]
    yield "units_limit", "Most units.", health.get("max_units")
    yield "usage_ratio", "Share of the limit of units that is used.", health.get("usage_percentage")
    yield "memory_bytes", "Resident memory of index and vectors.", stats.get("memory_bytes")
    yield "memory_limit_bytes", "Most resident memory of index and vectors.", stats.get("max_memory_bytes")
    yield "mapped_bytes", "Vectors, slots and ids in a memory-mapped file.", stats.get("mapped_bytes")
    yield "index_rows", "Rows that the index holds.", index.get("rows")
    yield "index_lists", "Inverted lists of the index.", index.get("nlist")
    yield "index_lag_changes", "Changes that are stored and not applied to the index yet.", health.get("index_lag")
    yield "delta_rows", "Rows that are searched exactly until the next build.", stats.get("tail_rows")
    yield "tombstones", "Deleted rows that the index still holds.", stats.get("tombstones")
    yield "change_number", "Number of the newest change.", log.get("last_seq")
    yield "training_quality_ratio", "The worse of self-hit rate and recall@10.", health.get("training_quality_score")
    yield "recall_probe_ratio", "recall@10 of real queries, measured in use.", stats.get("probed_recall")
    yield "needs_retraining", "Whether the index should be trained again.", health.get("needs_retraining")
    yield "damaged", "Whether a process met damage in the store.", "damage" in health and health["damage"] is not None
    yield "device_memory_bytes", "Device memory of the index.", device.get("measured_bytes")
    yield "device_unmet", "Whether a GPU was asked for and is not available.", device.get("unmet")
    yield (
        "maintenance_running",
        "Whether maintenance runs in this process.",
        stats.get("maintenance", {}).get("running"),
    )


def _counters(stats: Mapping[str, Json]) -> Iterator[Metric]:
    held = stats.get("maintenance", {})
    if held:
        yield CounterMetricFamily("memevolve_maintenance_rounds", "Rounds of maintenance.", held["rounds"])
        yield CounterMetricFamily("memevolve_maintenance_cpu_seconds", "CPU time of maintenance.", held["cpu_seconds"])
    events = CounterMetricFamily("memevolve_events", "Events of the store.", labels=["kind"])
    for kind, count in sorted(stats.get("event_totals", {}).items()):
        events.add_metric([kind], count)
    yield events
    incidents = CounterMetricFamily("memevolve_device_incidents", "Incidents of the device.", labels=["cause"])
    for cause, count in sorted(stats.get("device", {}).get("incidents", {}).items()):
        incidents.add_metric([cause], count)
    yield incidents


def _labelled(health: Mapping[str, Json], stats: Mapping[str, Json]) -> Iterator[Metric]:
    files = GaugeMetricFamily("memevolve_file_bytes", "Size of the files.", labels=["file"])
    for name, size in sorted(stats.get("files", {}).items()):
        files.add_metric([name], size)
    yield files
    info = GaugeMetricFamily("memevolve_index_info", "The index in use.", labels=["kind", "engine", "device", "status"])
    index = stats.get("index", {})
    status = str(health.get("performance_status", ""))
    info.add_metric([str(index.get(key, "")) for key in ("kind", "engine", "device")] + [status], 1)
    yield info
    latency = GaugeMetricFamily(
        "memevolve_search_latency_seconds", "Newest searches, embedding apart.", labels=["quantile"]
    )
    for quantile in ("50", "95", "99") if stats.get("latency") else ():
        latency.add_metric([f"0.{quantile}"], stats["latency"][f"p{quantile}_ms"] / 1e3)
    yield latency
