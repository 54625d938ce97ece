"""The typed dictionaries that stores return: health, statistics, maintenance, operations and inventory.

Every value is plain JSON. Times are Unix times in seconds unless a key says otherwise; keys that end in ``_mb`` are
MiB, in ``_bytes`` bytes, in ``_ms`` milliseconds.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from ..types import JsonObject


class IndexInfo(NamedTuple):
    """What an index holds at this moment."""

    ntotal: int
    """Vectors of the namespace that searches find."""
    nlist: int
    """Inverted lists, on a server those of a full segment; 0 where none are used."""
    kind: str
    """exact, two_stage, ivf or hnsw; or the server's name of its index, such as IVF_FLAT."""
    is_building: bool
    """Whether maintenance is running in this process, or rows wait for the server to index them."""
    is_trained: bool = True
    """Always: an index is used once it is trained, and rows that it lacks are searched exactly."""


class Inventory(TypedDict):
    """What units a backend holds."""

    count: int
    bytes: int
    """Size on the disk, vectors and log included, where the backend knows it; else that of the units' JSON."""
    types: dict[str, int]
    """Units per ``type``; those without one are counted under ``unknown``."""
    oldest: str | None
    """``metadata.created_at`` of the first unit; None when there is none."""
    newest: str | None
    """``metadata.created_at`` of the last unit; None when there is none."""


class _Operation(TypedDict):
    operation: str
    at: float
    details: JsonObject


class OperationEntry(_Operation, total=False):
    """A management operation in the history: ``operation``, ``at`` and ``details`` are always there."""

    count_before: int
    count_after: int
    removed: int
    generation: int
    """Number of the index that was in use."""
    decision: str
    """What the index does next: retrain, compact, append or nothing. Not kept in the history."""


class QualityReport(TypedDict):
    """Measured quality of an index."""

    self_hit: float
    """Share of stored vectors that find themselves, 0..1."""
    recall: float
    """Mean recall@10 against exact search, 0..1."""
    queries: int


class _Maintenance(TypedDict):
    actions: list[str]
    reason: str


class MaintenanceReport(_Maintenance, total=False):
    """What a round of maintenance did: ``actions`` in order, and the ``reason`` for it."""

    seconds: float
    quality: QualityReport | None
    """Quality of the index in use; None where it was not measured."""


class LatencyReport(TypedDict):
    """Latency of the newest searches, embedding apart, in milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    searches: int


class NlistChangeReport(TypedDict):
    """The last change of the number of inverted lists, with recall@10 and latency before it and since."""

    at: float
    nlist: list[int]
    """[before, after]"""
    before: dict[str, float | None]
    since: dict[str, float | None]


class TrainingReport(TypedDict):
    """What the index in use was trained on, or why nothing was trained yet."""

    trained: bool
    source: str | None
    """existing (the store's vectors), hybrid (those and service samples), service; None while nothing is trained."""
    units: int
    samples: int
    samples_kept: int
    """Service samples that are embedded and kept for a later training."""
    next_source: str | None
    next_samples: int
    min_training_units: int
    last_samples: JsonObject | None
    """Counts of the last collection of samples in this process."""
    reason: str
    """Why nothing is trained; else empty."""
    setting: str
    """The environment variable that changes that; else empty."""


class DeviceReport(TypedDict, total=False):
    """Where searches run and what is held there. Empty for a backend that searches elsewhere."""

    requested: str
    engine_setting: str
    crossover: int | None
    """The fewest queries in one call that the GPU answers sooner than the CPU; None where both were not timed."""
    timings: dict[str, dict[str, float]] | None
    """Milliseconds of both sides by the number of queries, measured after the build."""
    device: str
    engine: str
    reason: str
    name: str | None
    """Name of the GPU."""
    predicted_bytes: int
    """Device memory of the plan, scratch memory included."""
    scratch_bytes: int
    measured_bytes: int
    """Device memory of the index, without scratch memory."""
    budget: dict[str, JsonObject | None]
    """Free device memory before and after the last upload, and now; None for what is not known."""
    unmet: bool
    """Whether a requested GPU is unavailable."""
    incidents: dict[str, int]
    last_incident: str | None
    problem: str | None


class _Health(TypedDict):
    current_count: int


class StorageHealth(_Health, total=False):
    """Health of a storage backend. Only ``current_count`` is there for a backend that reports no more."""

    max_units: int
    usage_percentage: float
    """``current_count`` as a share of ``max_units``, 0..1."""
    memory_usage_mb: float
    """Resident memory of index and vectors; counts against the limit."""
    max_memory_mb: float
    mapped_mb: float
    """Vectors, slots and ids in a memory-mapped file, which the system reads as needed."""
    disk_mb: float
    near_limit: bool
    at_limit: bool
    performance_status: str
    """OPTIMAL; DEGRADED above 100 vectors per inverted list where the default rule plans a third more lists;
    INEFFICIENT below 10; GOOD where no lists are used."""
    current_nlist: int | None
    vectors_per_centroid: float | None
    training_quality_score: float
    """The worse of self-hit rate and recall@10, 0..1; 1.0 for exact search."""
    training: TrainingReport
    needs_retraining: bool
    index_lag: int
    """Changes that are stored but not applied to the index yet."""
    recommendations: list[str]
    device: DeviceReport
    damage: str | None
    """The first damage that any process met in the store."""
    latency: LatencyReport | None
    """Above MEMEVOLVE_STORAGE_PERFORMANCE_THRESHOLD units; None before the first search."""
    probed_recall: float | None
    """recall@10 of real queries, measured in use; as ``latency``."""
    nlist_change: NlistChangeReport | None
    """As ``latency``."""


class EventReport(TypedDict):
    """One event of the store."""

    kind: str
    cause: str
    seconds: float
    level: str
    at: float
    figures: JsonObject


class PlanReport(TypedDict):
    """The index that the planner chooses for the store as it is now."""

    kind: str
    nlist: int
    codes: int
    precision: str
    bytes: int
    reason: str
    notes: tuple[str, ...]
    engine: str
    device: str
    device_bytes: int
    refusal: str


class IndexReport(TypedDict):
    """The index in use."""

    kind: str
    nlist: int
    rows: int
    engine: str
    device: str
    precision: str
    reason: str


class LogReport(TypedDict):
    """Change numbers of the log: the newest, the newest purged one, and the newest that the index has applied."""

    last_seq: int
    horizon: int
    watermark: int


class MaintenanceState(TypedDict):
    """Maintenance in this process."""

    running: bool
    rounds: int
    cpu_seconds: float


class _Statistics(TypedDict):
    count: int
    dim: int
    embedding_model: str | None
    metric: str
    management: list[OperationEntry]
    """The newest 20 operations, newest last."""
    latency: LatencyReport | None
    event_totals: dict[str, int]
    events: list[EventReport]
    """The newest 20 events, newest last."""


class StoreStatistics(_Statistics):
    """Counts, index, plan, files and events of a ``VectorStore``."""

    store_id: str
    index: IndexReport
    plan: PlanReport
    device: DeviceReport
    tail_rows: int
    """Rows in the delta buffer, searched exactly until the next rebuild."""
    tombstones: int
    """Deleted rows that the index still holds."""
    memory_bytes: int
    mapped_bytes: int
    max_memory_bytes: int
    log: LogReport
    maintenance: MaintenanceState
    probed_recall: float | None
    queries_sampled: int
    generation: int
    files: dict[str, int]
    """Size in bytes of ``database``, ``wal`` and, once there is one, ``snapshot``."""


class MilvusIndexReport(TypedDict):
    """The server's index."""

    kind: str
    nlist: int
    reason: str


class ServerReport(TypedDict):
    """What the Milvus server says of itself and of the collection."""

    version: str
    gpu: bool
    consistency: str
    segments: int
    rows_indexed: int
    rows_not_indexed: int


class MilvusStatistics(_Statistics):
    """Counts, index, server and events of a ``MilvusStore``."""

    store: str
    """Address of the collection, without a token."""
    index: MilvusIndexReport
    server: ServerReport
