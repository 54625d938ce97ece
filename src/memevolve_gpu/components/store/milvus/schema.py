"""The collection that is a store: made, recognised, indexed and loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ....errors import (
    ConfigurationError,
    DimensionMismatchError,
    ModelMismatchError,
    NewerSchemaError,
    NotAStoreError,
    StorageError,
)
from ....types import Metric
from ....utils.config import StorageConfig
from .door import LONG, Door, Version
from .plan import METRICS, ServerPlan, plan_for

__all__ = ["Facts", "describe", "make", "open_collection", "serve"]

FORMAT = 1
_MARK = "memevolve-gpu "
_COLUMNS = {"id", "vector", "body", "kind", "born", "wrote", "facts", "vague"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a collection says of itself; ``model`` None: it was made without a name for it."""

    dim: int
    metric: Metric
    model: str | None


def describe(door: Door) -> Facts | None:
    """What the collection is; None when there is none. Raises NotAStoreError, NewerSchemaError."""
    name = door.config.collection
    if not door.call("has_collection", name):
        return None
    found = door.call("describe_collection", name)
    text = str(found.get("description") or "")
    fields = {field["name"]: field for field in found["fields"]}
    if not text.startswith(_MARK) or not _COLUMNS.issubset(fields):
        raise NotAStoreError(f"the collection {name!r} is not one of ours; name another: MEMEVOLVE_MILVUS_COLLECTION")
    facts = json.loads(text[len(_MARK) :])
    if facts["format"] > FORMAT:
        raise NewerSchemaError(
            f"the collection {name!r} has format {facts['format']}, this version reads {FORMAT}; upgrade"
        )
    return Facts(int(fields["vector"]["params"]["dim"]), facts["metric"], facts.get("model"))


def open_collection(door: Door, dim: int | None, model: str | None, config: StorageConfig) -> Facts:
    """The collection, made when there is none, and held against what the caller brings.

    Raises ConfigurationError, DimensionMismatchError or ModelMismatchError when they do not fit.
    """
    facts = describe(door)
    if facts is None:
        if dim is None:
            raise ConfigurationError(
                "embedding_dim is not known: give it, or an embedding_function, to make a new store"
            )
        make(door, Facts(dim, config.metric, model))
        facts = describe(door)
    if facts is None:
        raise StorageError(f"the collection {door.config.collection!r} was dropped while it was opened; open it anew")
    if dim is not None and dim != facts.dim:
        raise DimensionMismatchError(facts.dim, dim, "use the embedding model that filled the store")
    if "metric" in config.model_fields_set and config.metric != facts.metric:
        raise ConfigurationError(f"MEMEVOLVE_STORAGE_METRIC={config.metric}: the store was made with {facts.metric}")
    if model and facts.model and model != facts.model:
        raise ModelMismatchError(
            f"the store was filled by the embedding model {facts.model!r}, embedding_function is {model!r}; "
            "use the same model, or export and embed into a new store"
        )
    return facts


def make(door: Door, facts: Facts) -> None:
    """Create the collection. Two that do so at once make the same one."""
    about = {"format": FORMAT, "metric": facts.metric, "model": facts.model}
    config = door.config

    def create(client: Any, seconds: float) -> None:
        client.create_collection(
            config.collection,
            schema=_schema(client, facts.dim, _MARK + json.dumps(about)),
            num_shards=config.shards,
            consistency_level="Session",
            timeout=seconds,
        )

    door.attempt(create)


def serve(door: Door, facts: Facts, version: Version, config: StorageConfig) -> ServerPlan:
    """Index and load the collection, unless that is done; the plan of the index that is there."""
    name = door.config.collection
    held = door.call("list_indexes", name)
    if "vector" not in held:
        plan = plan_for(version, facts.dim, facts.metric, config)
        _create_index(door, plan, facts.metric)
    else:
        plan = held_plan(door)
    _load(door)
    return plan


def held_plan(door: Door) -> ServerPlan:
    """The index as the server describes it."""
    found = door.call("describe_index", door.config.collection, "vector") or {}
    index = str(found.get("index_type", ""))
    return ServerPlan(index, int(found.get("nlist") or 0), index in ("FLAT", "GPU_BRUTE_FORCE"), "as it was made")


def _create_index(door: Door, plan: ServerPlan, metric: Metric) -> None:
    def create(client: Any, seconds: float) -> None:
        wanted = client.prepare_index_params()
        wanted.add_index(
            field_name="vector",
            index_name="vector",
            index_type=plan.index,
            metric_type=METRICS[metric],
            params=plan.params,
        )
        client.create_index(door.config.collection, wanted, timeout=seconds)

    door.attempt(create, LONG)


def _load(door: Door) -> None:
    name, replicas = door.config.collection, door.config.replicas
    if "Loaded" in str(door.call("get_load_state", name).get("state")):
        return
    try:
        door.call("load_collection", name, seconds=LONG, replica_number=replicas)
    except StorageError as error:
        if replicas == 1:
            raise
        raise ConfigurationError(
            f"MEMEVOLVE_MILVUS_REPLICAS={replicas}: the server cannot hold so many ({error}); each needs a query node"
        ) from error


def _schema(client: Any, dim: int, description: str) -> Any:
    made = client.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
    for name, kind, options in (
        ("id", "VARCHAR", {"is_primary": True, "max_length": 4096}),
        ("vector", "FLOAT_VECTOR", {"dim": dim}),
        ("body", "VARCHAR", {"max_length": 65_535}),
        ("kind", "VARCHAR", {"max_length": 1024}),
        ("born", "INT64", {}),
        ("wrote", "INT64", {}),
        ("facts", "JSON", {}),
        ("vague", "BOOL", {}),
    ):
        made.add_field(name, _types()[kind], **options)
    return made


def _types() -> dict[str, Any]:
    """Numbers of ``schema.proto``'s DataType: what the client's own enumeration holds."""
    numbers = {"BOOL": 1, "INT64": 5, "VARCHAR": 21, "JSON": 23, "FLOAT_VECTOR": 101}
    try:
        from pymilvus import DataType
    except ImportError:
        return dict(numbers)
    return {name: DataType(number) for name, number in numbers.items()}
