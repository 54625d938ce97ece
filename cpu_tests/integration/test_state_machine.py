"""A hypothesis state machine drives one store and a plain dict side by side, through reopen, crash and damage."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from endurance import DIM, Model, contents, damage, embed, verify
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memevolve_gpu import StorageConfig, VectorStore
from memevolve_gpu.live import scheduler

pytestmark = pytest.mark.slow

IDS = st.sampled_from([f"id{i}" for i in range(40)])
WORDS = st.integers(0, 300).map(lambda n: f"w{n % 7} fact {n}")


class StoreAgreesWithDict(RuleBasedStateMachine):
    @initialize(index_type=st.sampled_from(["flat", "ivf", "hnsw", "auto"]), metric=st.sampled_from(["l2", "cosine"]))
    def open(self, index_type: str, metric: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.short = patch.multiple(scheduler, DELTA_ROWS=6, DELTA_MOST=6, QUIET_ROWS=3)
        self.short.start()
        self.lives = 0
        self.config = StorageConfig(
            index_type=index_type, metric=metric, min_training_units=24, background=False, max_memory_units=10_000
        )
        self.model: Model = {}
        self.store = self.opened(self.folder / "store0")

    def opened(self, prefix: Path) -> VectorStore:
        self.prefix = prefix
        return VectorStore(prefix, embed, DIM, storage_config=self.config)

    @rule(unit_id=IDS, content=WORDS, kind=st.sampled_from(["skill", "tool"]))
    def put(self, unit_id: str, content: str, kind: str) -> None:
        unit = {"id": unit_id, "content": content, "type": kind, "tags": [content.split(maxsplit=1)[0]]}
        assert self.store.store(unit) == unit_id
        self.model[unit_id] = unit

    @rule(contents=st.lists(WORDS, min_size=1, max_size=40))
    def put_many_without_ids(self, contents: list[str]) -> None:
        ids = self.store.store_batch([{"content": content} for content in contents])
        assert len(set(ids) | set(self.model)) == len(ids) + len(self.model), "an id was given out twice"
        self.model |= {unit_id: {"id": unit_id, "content": c} for unit_id, c in zip(ids, contents, strict=True)}

    @rule(unit_id=IDS, content=WORDS)
    def update(self, unit_id: str, content: str) -> None:
        unit = {"id": unit_id, "content": content}
        assert self.store.update(unit_id, unit) == (unit_id in self.model)
        if unit_id in self.model:
            self.model[unit_id] = unit

    @rule(unit_id=IDS, note=st.text(max_size=5))
    def note(self, unit_id: str, note: str) -> None:
        unit = self.store.retrieve(unit_id)
        assert (unit is None) == (unit_id not in self.model)
        if unit is not None:
            assert self.store.update(unit_id, {**unit, "note": note})
            self.model[unit_id] = {**self.model[unit_id], "note": note}

    @rule(ids=st.lists(IDS, max_size=6))
    def delete(self, ids: list[str]) -> None:
        assert self.store.delete_batch(ids) == len(set(ids) & set(self.model))
        for unit_id in ids:
            self.model.pop(unit_id, None)

    @rule(data=st.data())
    def delete_any(self, data: st.DataObject) -> None:
        if self.model:
            unit_id = data.draw(st.sampled_from(sorted(self.model)))
            assert self.store.delete(unit_id)
            del self.model[unit_id]

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.model = {}

    @rule()
    def maintain(self) -> None:
        self.store.run_maintenance()

    @rule()
    def save_snapshot(self) -> None:
        self.store.snapshot()

    @rule(seed=st.integers(0, 1000))
    def reopen_after_damage(self, seed: int) -> None:
        self.store.close()
        damage(str(self.prefix), random.Random(seed))
        self.store = self.opened(self.prefix)

    @rule(seed=st.integers(0, 1000))
    def crash(self, seed: int) -> None:
        """What a kill leaves behind is the files as they are now: go on from a copy of them."""
        self.lives += 1
        copy = self.folder / f"store{self.lives}"
        for path in self.folder.glob(f"{self.prefix.name}.*"):
            shutil.copyfile(path, self.folder / path.name.replace(self.prefix.name, copy.name, 1))
        self.store.close()
        damage(str(copy), random.Random(seed))
        self.store = self.opened(copy)

    @rule(kind=st.sampled_from(["skill", "tool"]))
    def filtered_search_is_exact(self, kind: str) -> None:
        wanted = {unit_id for unit_id, unit in self.model.items() if unit.get("type") == kind}
        found = self.store.search("w3 fact 3", len(self.model) + 3, filters={"type": kind}, recall=1.0)
        assert {unit_id for _, unit_id in found} == wanted

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "store"):
            assert self.store.count() == len(self.model) == self.store.index.ntotal
            found = self.store.search_vectors(np.ones((1, DIM)), len(self.model) + 3, recall=1.0)[1][0]
            assert {unit_id for unit_id in found if unit_id} == set(self.model)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            verify(self.store, [self.model])
            assert contents(self.store) == self.model
            self.store.close()
            shutil.rmtree(self.folder)
            self.short.stop()


TestStoreAgreesWithDict = StoreAgreesWithDict.TestCase
TestStoreAgreesWithDict.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
