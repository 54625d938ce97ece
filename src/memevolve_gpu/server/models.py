"""What the routes of the server take and return."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..components.store.history import Operation, UnitVersion
from ..components.store.namespaces import NamespaceInfo
from ..errors import InvalidVectorError
from ..types import FloatArray, Json, JsonObject
from ..utils.vectors import read_vector

MOST_UNITS = 10_000
MOST_RESULTS = 10_000
MOST_QUERIES = 1_000

Id = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Ids = list[Id]
Unit = Annotated[JsonObject, Field(description="A JSON object with content, type, tags, metadata, and an id.")]
Filters = Annotated[
    JsonObject | None,
    Field(description='Such as {"type": "skill"} or {"metadata.score": {"gte": 0.5}}.'),
]
Namespace = Annotated[
    list[str] | str,
    Field(description='A path, such as "org/alice" or ["org", "alice"], below that of the key; empty for its own.'),
]
Vector = Annotated[
    list[float] | str,
    Field(description="Numbers, or the base64 of their little-endian float32."),
]
Mode = Literal["semantic", "keyword", "hybrid"]
Expires = Annotated[float | None, Field(description="Unix time in seconds from which the units are gone.")]
Compare = Annotated[
    Literal["text", "cosine"],
    Field(description="text keeps statements apart that do not say the same; cosine goes by the cosine alone."),
]
Ttl = Annotated[float | None, Field(gt=0, description="Seconds after which the units expire.")]
TopK = Annotated[int, Field(ge=1, le=MOST_RESULTS, description="Most results.")]
Recall = Annotated[float | None, Field(gt=0, le=1, description="Share of the true neighbours; null for the store's.")]


class Body(BaseModel):
    """A body; keys that it does not know are refused."""

    model_config = ConfigDict(extra="forbid")


class Scoped(Body):
    """A body for one namespace."""

    namespace: Namespace = ()  # type: ignore[assignment]


class StoreUnits(Scoped):
    """Units to store, all of them or none."""

    units: list[Unit]
    embeddings: Annotated[list[Vector] | None, Field(description="One vector for each unit; null embeds them.")] = None
    ttl: Annotated[Ttl | list[Ttl], Field(description="Seconds after which the units expire; or a list, one each.")] = (
        None
    )
    expires_at: Annotated[
        float | list[float | None] | None,
        Field(description="Unix time from which the units are gone; or a list, one each, in which null is never."),
    ] = None
    replaces: Annotated[Id | None, Field(description="The id of a unit that the one given supersedes.")] = None
    batch: Annotated[bool, Field(description="True names the place of a unit in errors also where it is alone.")] = (
        False
    )


class ReplaceUnits(Scoped):
    """Units to delete and units to store, in one transaction."""

    delete_ids: Ids
    units: list[Unit]
    embeddings: list[Vector] | None = None
    unchanged_since: Annotated[int | None, Field(ge=0)] = None


class GetUnits(Scoped):
    """Ids to read."""

    ids: Ids
    record: Annotated[bool, Field(description="Whether to count an access to each.")] = False
    units: Annotated[bool, Field(description="False leaves the units out.")] = True
    vectors: Annotated[bool, Field(description="Whether to return the vectors too.")] = False
    expiries: Annotated[bool, Field(description="Whether to return when units expire too.")] = False


class ListUnits(Scoped):
    """A page of units."""

    filters: Filters = None
    order_by: Annotated[str | None, Field(description="A path, - before it for the largest first.")] = None
    limit: Annotated[int, Field(ge=1, le=MOST_UNITS)] = 100
    after: Annotated[str | None, Field(description="The cursor of the page before.")] = None


class UpdateWhere(Scoped):
    """Which units to change, and how: a JSON merge patch."""

    filters: JsonObject
    changes: Unit


class DeleteUnits(Scoped):
    """What to delete: ids, or filters with a condition."""

    ids: Ids | None = None
    filters: Filters = None
    unchanged_since: Annotated[int | None, Field(ge=0)] = None


class Erase(Scoped):
    """Which units to delete for good."""

    filters: JsonObject
    timeout: Annotated[float, Field(ge=0, le=600, description="Seconds to wait for readers in other processes.")] = 30.0


class CountUnits(Scoped):
    """What to count."""

    filters: Filters = None


class Facets(Scoped):
    """A field to count by."""

    field: Annotated[str, Field(min_length=1, description="A path, such as type or metadata.user.")]
    filters: Filters = None
    limit: Annotated[int | None, Field(ge=0)] = None


class Recency(Body):
    """How fast units fade."""

    half_life: Annotated[float | str, Field(description='Seconds, or a text such as "30d".')]
    path: str = "metadata.created_at"
    now: float | None = None


class Search(Scoped):
    """A search by a text or by a vector."""

    query: str | None = None
    vector: Vector | None = None
    mode: Mode = "semantic"
    top_k: TopK = 5
    filters: Filters = None
    recall: Recall = None
    offset: Annotated[int, Field(ge=0, le=100_000)] = 0
    min_score: float | None = None
    recency: Annotated[Recency | None, Field(description="Newer units first; semantic and keyword only.")] = None
    importance: Annotated[str | None, Field(description="The path of a number from 0 to 1.")] = None
    weights: Annotated[dict[str, float] | None, Field(description="Of recency and importance.")] = None
    relative: Annotated[bool, Field(description="Scores from 0 to 1, as shares of a full match; keyword only.")] = False
    below: Annotated[bool, Field(description="Whether to search the namespaces below too; semantic only.")] = False
    units: Annotated[bool, Field(description="False returns ids and distances only.")] = True
    record: Annotated[bool, Field(description="Whether the results count as accesses.")] = True


class SearchBatch(Scoped):
    """Several searches of the same kind."""

    queries: Annotated[list[str] | None, Field(max_length=MOST_QUERIES)] = None
    vectors: Annotated[list[Vector] | None, Field(max_length=MOST_QUERIES)] = None
    top_k: TopK = 5
    filters: Filters = None
    recall: Recall = None
    units: bool = True


class Manage(Scoped):
    """A management operation; ``dry_run`` says what it would do."""

    dry_run: bool = False


class Prune(Manage):
    """Which units to delete: ``type``, ``filters``, ``max_age`` in days, ``max_count``."""

    criteria: JsonObject


class Deduplicate(Manage):
    """From which cosine the texts of two units are compared, and which of several duplicates stays."""

    similarity_threshold: Annotated[float, Field(gt=0, le=1)] = 0.75
    keep: Literal["newest", "oldest", "longest", "accessed"] = "newest"
    filters: Filters = None
    compare: Compare = "text"


class Consolidate(Manage):
    """Which units to merge."""

    units: Annotated[Ids | None, Field(alias="ids")] = None
    by: Literal["similarity", "type"] = "similarity"
    similarity_threshold: Annotated[float, Field(gt=0, le=1)] = 0.85
    filters: Filters = None
    compare: Compare = "text"


class Forget(Manage):
    """How many units to forget, and which first."""

    strategy: Literal["lru", "lfu", "random"] = "lru"
    count: Annotated[int | None, Field(ge=1)] = None


class Report(Scoped):
    """A management operation that a client did itself."""

    operation: str
    details: JsonObject = {}


class Similarities(Scoped):
    """A text, and units to compare with it."""

    query: str
    ids: Ids


class Sample(Scoped):
    """How many vectors to read."""

    count: Annotated[int, Field(ge=0, le=MOST_UNITS)]


class Maintain(Body):
    """Whether to train again, due or not, and whether to make up for missing units with samples."""

    retrain: bool = False
    samples: bool = False


class Undo(Scoped):
    """The operation to take back."""

    operation: Annotated[int, Field(ge=1)]


class Backup(Body):
    """The name of a backup."""

    name: Annotated[
        str | None, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$", description="null for the time of now.")
    ] = None


class Limits(Scoped):
    """Limits of a namespace; null for none, and one that is left out stays as it is."""

    max_units: Annotated[int | None, Field(ge=1)] = None
    default_ttl: Ttl = None


class Expiry(Scoped):
    """When units expire; neither value: never."""

    ids: Ids
    ttl: Ttl = None
    expires_at: Expires = None


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    """Names the parameter at fault and the remedy."""
    error: str
    """The class of the error in this package."""
    parameters: list[dict[str, str]] = []
    ids: list[str] = []
    """The units of a conflict."""


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Stored(BaseModel):
    """Ids of stored units, in order."""

    ids: list[str]


class Page(BaseModel):
    """Units, and where to go on."""

    units: list[Unit]
    cursor: str | None = None
    """Give it as ``after``; null when there are no more."""
    cursors: list[str] = []
    """Of each unit, to go on behind it."""


class Found(BaseModel):
    """Units by id."""

    units: dict[str, Unit]
    vectors: dict[str, str] | None = None
    expiries: dict[str, float] | None = None


class Vectors(BaseModel):
    """Vectors by id, as base64 of little-endian float32."""

    vectors: dict[str, str]


class Cosines(BaseModel):
    """Cosines by id."""

    similarities: dict[str, float]


class Moment(BaseModel):
    """When a unit expires, as Unix time; null for never."""

    expires_at: float | None


class AccessCounts(BaseModel):
    """Accesses by id."""

    counts: dict[str, int]


class Number(BaseModel):
    """A number of units."""

    count: int


class Deleted(BaseModel):
    """Whether a unit was there."""

    deleted: bool


class FacetCount(BaseModel):
    """A value of a field, and its units."""

    value: Json
    count: int


class FacetCounts(BaseModel):
    """Values, most units first."""

    facets: list[FacetCount]


class Hit(BaseModel):
    """A unit that was found."""

    id: str
    score: float
    """The larger, the more similar; its scale depends on the mode."""
    distance: float | None = None
    """By the store's metric; null for a search by words."""
    namespace: list[str] = []
    """Below that of the search."""
    unit: Unit | None = None
    why: JsonObject | None = None
    """What the mode knows of the result, such as the ranks of both searches."""


class Hits(BaseModel):
    """Results, best first."""

    hits: list[Hit]


class HitsBatch(BaseModel):
    """The results of each search, in order."""

    results: list[list[Hit]]


class Versions(BaseModel):
    """Versions, oldest first."""

    versions: list[UnitVersion]


class Operations(BaseModel):
    """Operations, newest first."""

    operations: list[Operation]


class Change(BaseModel):
    """A change of the feed."""

    seq: int
    operation: str
    id: str
    namespace: list[str]
    unit: Unit | None


class Changes(BaseModel):
    """Changes in order; ``next`` is what to give as ``after``."""

    changes: list[Change]
    next: int


class Namespaces(BaseModel):
    """Namespaces in the order of their paths, relative to that of the key."""

    namespaces: list[NamespaceInfo]


class Managed(BaseModel):
    """What a management operation did, or would do."""

    dry_run: bool
    count: int
    ids: list[str] = []
    """Of deleted units."""
    units: list[Unit] = []
    """Merged units."""
    notes: JsonObject = {}


class BackupFile(BaseModel):
    """A backup."""

    name: str
    bytes: int
    at: float


class Backups(BaseModel):
    """Backups, newest first."""

    backups: list[BackupFile]


class Events(BaseModel):
    """The newest events of the store, newest last."""

    events: list[JsonObject]


def as_matrix(values: list[list[float] | str], name: str = "vectors") -> FloatArray:
    """Vectors of a body: float32 (n, dim). Raises InvalidVectorError where their lengths differ."""
    rows = [read_vector(value, f"{name}[{i}]") for i, value in enumerate(values)]
    if len({len(row) for row in rows}) > 1:
        raise InvalidVectorError(f"{name} must be of one length, got {sorted({len(row) for row in rows})}")
    return np.array(rows, dtype=np.float32)
