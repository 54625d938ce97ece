"""Random operations on a store and on a plain dict, and how the one is held against the other."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

DIM = 16
KINDS = ("skill", "lesson", "tool", "abstraction")
Model = dict[str, dict[str, Any]]
Operation = dict[str, Any]


@lru_cache(maxsize=10_000)
def embed(text: str) -> np.ndarray:
    """A seeded vector for a text; texts with the same first word lie together."""
    word = text.split(" ", 1)[0]
    near = np.random.default_rng(sum(word.encode())).standard_normal(DIM)
    own = np.random.default_rng(list(text.encode()) or [0]).standard_normal(DIM)
    return (near + 0.5 * own).astype(np.float32)


MIXED = {
    **dict.fromkeys(("edit", "batch"), 6.0),
    **dict.fromkeys(("maintain", "reopen"), 4.0),
    "store": 40,
    "update": 14,
    "delete": 16,
    "delete_batch": 3,
    "snapshot": 2,
    "checkpoint": 2,
    "clear": 0.15,
}


def operations(seed: object, ids: Sequence[str], weights: Mapping[str, float] | None = None) -> Iterator[Operation]:
    """An endless, seeded stream of operations on these ids; no two texts are equal."""
    rng = random.Random(str(seed))
    kinds = dict(weights or MIXED)
    while True:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        chosen = [rng.choice(ids) for _ in range(rng.randrange(1, 60) if "batch" in kind else 1)]
        texts = [f"w{rng.randrange(12)} fact {rng.randrange(10**9)} of {one}" for one in chosen]
        yield {"kind": kind, "ids": chosen, "contents": texts, "type": rng.choice(KINDS)}


def unit_of(operation: Operation, i: int) -> dict[str, Any]:
    return {"id": operation["ids"][i], "content": operation["contents"][i], "type": operation["type"], "tags": ["t"]}


def model_after(model: Model, operation: Operation) -> Model:
    """The plain dict after the operation; values are what must be found again: content and type."""
    after, kind = dict(model), operation["kind"]
    for i, unit_id in enumerate(operation["ids"]):
        known = unit_id in after
        if kind in ("store", "batch") or (kind == "update" and known):
            after[unit_id] = unit_of(operation, i)
        elif kind == "edit" and known:
            after[unit_id] = {**after[unit_id], "note": operation["contents"][i]}
        elif kind in ("delete", "delete_batch"):
            after.pop(unit_id, None)
    return {} if kind == "clear" else after


def perform(store: Any, operation: Operation) -> None:
    ids = operation["ids"]
    doing: dict[str, Callable[[], object]] = {
        "store": lambda: store.store(unit_of(operation, 0)),
        "batch": lambda: store.store_batch([unit_of(operation, i) for i in range(len(ids))]),
        "update": lambda: store.update(ids[0], unit_of(operation, 0)),
        "edit": lambda: edit(store, ids[0], operation["contents"][0]),
        "delete": lambda: store.delete(ids[0]),
        "delete_batch": lambda: store.delete_batch(ids),
        "maintain": store.run_maintenance,
        "snapshot": store.snapshot,
        "checkpoint": store._open.records.checkpoint,
        "clear": store.clear,
        "reopen": lambda: None,
    }
    doing[operation["kind"]]()


def edit(store: Any, unit_id: str, note: str) -> None:
    unit = store.retrieve(unit_id)
    if unit is not None:
        store.update(unit_id, {**unit, "note": note})


def open_store(prefix: str, index_type: str) -> Any:
    from memevolve_gpu import StorageConfig, VectorStore

    config = StorageConfig(index_type=index_type, min_training_units=64, target_recall=0.95, background=True)
    return VectorStore(prefix, embed, DIM, storage_config=config)


def damage(
    prefix: str, rng: random.Random, ways: Sequence[str] = ("nothing", "nothing", "delete", "truncate", "flip")
) -> str:
    """Hurt the snapshot in a random way; returns what was done."""
    path = Path(f"{prefix}.snapshot")
    how = rng.choice(ways)
    if how == "nothing" or not path.exists() or not path.stat().st_size:
        return "nothing"
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, rng.randrange(path.stat().st_size))
    else:
        content = bytearray(path.read_bytes())
        start = rng.choice([at for at, byte in enumerate(content) if byte])  # most of a small file is gaps of zeros
        for at in range(start, min(len(content), start + (1 if how == "flip" else 16))):
            content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(content))
    return how


def contents(store: Any) -> Model:
    return {
        unit["id"]: {key: value for key, value in unit.items() if key != "metadata"} for unit in store.retrieve_all()
    }


def differences(model: Model, held: Model) -> set[str]:
    """Ids of the units that only one of them has, or that differ."""
    return {unit_id for unit_id in model.keys() | held.keys() if model.get(unit_id) != held.get(unit_id)}


def verify(store: Any, candidates: list[Model]) -> Model:
    """The store equals one of the models, in records and in search; returns that model."""
    held = contents(store)
    model = min(candidates, key=lambda one: len(differences(one, held)))
    lost = [unit_id for unit_id in model if held.get(unit_id) != model[unit_id]]
    assert model == held, f"lost {lost}, resurrected {[one for one in held if one not in model]}"
    assert store.count() == len(model) == store.index.ntotal
    assert not store.check(), store.check()
    own = {unit["id"]: vector for unit, vector in store.export_rows()}
    if not model:
        assert store.search("w1 anything", 5) == []
        return model
    texts = {unit_id: store._unit_to_text(unit) for unit_id, unit in model.items()}
    vectors = {unit_id: embed(text) for unit_id, text in texts.items()}
    wrong = [unit_id for unit_id in model if not np.array_equal(own[unit_id], vectors[unit_id])]
    assert not wrong, f"wrong mapping: the vectors of {wrong} are those of other texts"
    distances, found = store.search_vectors(np.stack(list(vectors.values())), 1)
    assert (distances[:, 0] <= 1e-4).all(), "a live unit does not find itself or an equal vector"
    assert [texts[row[0]] for row in found] == list(texts.values()), "wrong mapping: a vector finds another unit"
    everything = store.search_vectors(embed("w3")[None, :], len(model) + 5, recall=1.0)[1][0]
    assert {unit_id for unit_id in everything if unit_id} == set(model), "a search sees other ids than the records"
    assert {unit_id for row in found for unit_id in row} <= set(model), "a deleted id returned"
    return model
