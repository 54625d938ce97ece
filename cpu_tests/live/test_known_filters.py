"""A filter that was asked before is answered from what is known of it, until anything changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filter_oracle import means

from memevolve_gpu import VectorStore

DIM, SEED = 8, 20_261_129
FILTERS: list[dict[str, Any]] = [
    {"part": {"lt": 3}},
    {"part": {"gte": 40}},
    {"part": 7, "word": "w1"},
    {"word": {"in": ["w0", "w2"]}},
    {"or": [{"part": {"gt": 97}}, {"not": {"word": "w1"}}]},
    {"list": {"contains": 2}},
    {"list": {"gt": 1}},
]


class Model:
    """The units and vectors that a store should have, and when they expire."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(SEED)
        self.rows: dict[str, tuple[dict[str, Any], np.ndarray[Any, Any], float]] = {}
        self.now = 1_000.0
        self.changed = np.zeros((1, DIM), np.float32)
        """The vectors that were stored last, wherever they are now."""

    def unit(self, name: str) -> dict[str, Any]:
        number = int(self.rng.integers(100))
        made: dict[str, Any] = {"id": name, "content": "c", "part": number, "word": f"w{number % 3}"}
        return made | ({"list": [number % 4, "x"]} if number % 5 == 0 else {})

    def matching(self, filters: dict[str, Any]) -> list[str]:
        return [name for name, (unit, _, until) in self.rows.items() if until > self.now and means(filters, unit)]

    def nearest(self, query: np.ndarray[Any, Any], names: list[str], k: int) -> list[str]:
        if not names:
            return []
        distances = ((np.stack([self.rows[name][1] for name in names]) - query) ** 2).sum(axis=1)
        return [names[at] for at in np.argsort(distances)[:k]]


def opened(path: Path, model: Model, namespace: str) -> tuple[VectorStore, VectorStore]:
    settings = {"background": False, "index_type": "ivf"}
    store = VectorStore(path, None, DIM, storage_config=settings, clock=lambda: model.now)
    return store, store.namespace(namespace) if namespace else store


def put(store: VectorStore, model: Model, names: list[str], ttl: float | None = None) -> None:
    units = [model.unit(name) for name in names]
    vectors = model.rng.standard_normal((len(names), DIM)).astype(np.float32)
    store.store_batch(units, vectors, ttl=ttl)
    until = np.inf if ttl is None else model.now + ttl
    model.changed = vectors
    model.rows.update({unit["id"]: (unit, vector, until) for unit, vector in zip(units, vectors, strict=True)})


def check(store: VectorStore, model: Model) -> None:
    for filters in FILTERS:
        matching = model.matching(filters)
        for query in model.changed[-3:]:  # near what has changed
            found = store.search_vectors(query[None], 6, filters, 1.0)[1][0]
            assert [name for name in found if name] == model.nearest(query, matching, 6), filters


@pytest.mark.parametrize("namespace", ["", "team"])
def test_a_known_filter_follows_every_change(tmp_path: Path, namespace: str) -> None:
    model = Model()
    store, own = opened(tmp_path / "m", model, namespace)
    if namespace:  # rows that are nobody's here
        put(store, Model(), [f"other{number}" for number in range(1_500)])
    put(own, model, [f"u{number}" for number in range(1_500)])
    store.run_maintenance()
    check(own, model)
    for step in range(30):
        what = step % 5
        if what == 0:
            put(own, model, [f"n{step}-{number}" for number in range(5)])
        elif what == 1:
            put(own, model, [f"t{step}-{number}" for number in range(5)], ttl=float(step % 3 + 1))
        elif what == 2:
            model.now += 1.0
        elif what == 3:
            for name in model.rng.choice(sorted(model.rows), 3, replace=False).tolist():
                model.changed = model.rows[name][1][None]
                if own.delete(name):
                    del model.rows[name]
                check(own, model)
        elif step % 10 == 4:
            put(own, model, [str(name) for name in model.rng.choice(sorted(model.rows), 4, replace=False)])
        else:
            store.run_maintenance()
        check(own, model)
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_and_its_parent_each_follow_their_own_changes(tmp_path: Path) -> None:
    model = Model()
    store, _ = opened(tmp_path / "m", model, "")
    put(store, model, [f"u{number}" for number in range(2_000)])
    store.run_maintenance()
    check(store, model)
    child = os.fork()
    if not child:
        code = 1
        try:
            check(store, model)
            put(store, model, [f"c{number}" for number in range(20)])
            check(store, model)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    put(
        store, model, [f"c{number}" for number in range(20)]
    )  # the same draws as in the child, which now replace its rows
    check(store, model)
    store.close()


def test_what_is_known_of_filters_counts_as_memory(tmp_path: Path) -> None:
    model = Model()
    store, _ = opened(tmp_path / "m", model, "")
    put(store, model, [f"u{number}" for number in range(1_500)])
    store.run_maintenance()
    put(store, model, [f"n{number}" for number in range(2_000)])
    before = store.get_storage_health()["memory_usage_mb"]
    check(store, model)
    grown = (store.get_storage_health()["memory_usage_mb"] - before) * 2**20
    assert grown > sum(8 * len(model.matching(filters)) for filters in FILTERS)
    store.close()
