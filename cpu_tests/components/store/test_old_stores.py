"""A store of the forerunner at the same prefix: taken over once, never trusted, never touched."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import FakeEmbedder

from memevolve_gpu import CapacityError, StorageConfig, VectorStore

DIM = 12


def opened(prefix: Path, embedder: Any = None, **settings: Any) -> VectorStore:
    config = StorageConfig(background=False, **settings)
    return VectorStore(prefix, embedder or FakeEmbedder(DIM), storage_config=config)


def old_store(prefix: Path, content: Any) -> dict[Path, bytes]:
    data, index = Path(f"{prefix}.data"), Path(f"{prefix}.index")
    data.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    index.write_bytes(b"positions that nobody should trust")
    return {data: data.read_bytes(), index: index.read_bytes()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_units_are_imported_once_and_found_by_meaning(tmp_path: Path, wrapped: bool) -> None:
    units = {f"unit_{i}": {"id": f"unit_{i}", "content": f"fact {i}", "type": "skill"} for i in range(30)}
    files = old_store(tmp_path / "s", {"data": units} if wrapped else units)
    embedder = FakeEmbedder(DIM)
    with opened(tmp_path / "s", embedder) as store:
        assert store.count() == 30
        assert store.search("fact 7 skill", 1)[0][1] == "unit_7"
        assert store.store({"content": "new"}) == "unit_30"
        store.delete("unit_3")
        assert store.check() == []
    embedded = len(embedder.texts)
    with opened(tmp_path / "s", embedder) as store:
        assert store.count() == 30
        assert not store.exists("unit_3"), "what was deleted after the import came back"
    assert len(embedder.texts) == embedded
    assert all(path.read_bytes() == content for path, content in files.items())


@pytest.mark.parametrize(
    ("limits", "setting"),
    [({"max_memory_units": 5}, "MAX_MEMORY_UNITS"), ({"max_memory_mb": 0.003}, "MAX_MEMORY_MB")],
    ids=["units", "memory"],
)
def test_more_than_fits_is_not_imported_at_all(tmp_path: Path, limits: dict[str, Any], setting: str) -> None:
    files = old_store(tmp_path / "s", {f"unit_{i}": {"id": f"unit_{i}", "content": f"fact {i}"} for i in range(30)})
    embedder = FakeEmbedder(DIM)
    with pytest.raises(CapacityError, match=f"30 old units.*MEMEVOLVE_STORAGE_{setting}") as raised:
        opened(tmp_path / "s", embedder, **limits)
    assert isinstance(raised.value, RuntimeError)
    assert len(embedder.texts) <= 1, "units were paid for in vain"
    assert all(path.read_bytes() == content for path, content in files.items())
    with opened(tmp_path / "s", embedder) as store:
        assert store.count() == 30, "with room for them they are all imported"
    with opened(tmp_path / "s", embedder, **limits) as store:
        assert store.count() == 30, "what was imported once does not count again"


def test_units_that_are_there_already_need_no_room(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        store.store_batch([{"id": f"unit_{i}", "content": f"new {i}"} for i in range(4)])
    old_store(tmp_path / "s", {f"unit_{i}": {"id": f"unit_{i}", "content": f"fact {i}"} for i in range(5)})
    with opened(tmp_path / "s", max_memory_units=5) as store:
        assert store.count() == 5
        assert store.data["unit_0"]["content"] == "new 0"


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('pwned', 'w')",)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x05", {"u": Hostile()}, {"u": np.ones(3)}])
def test_garbage_and_hostile_files_are_reported_and_untouched(
    tmp_path: Path, content: Any, caplog: pytest.LogCaptureFixture
) -> None:
    files = old_store(tmp_path / "s", content)
    with caplog.at_level(logging.WARNING, logger="memevolve_gpu"), opened(tmp_path / "s") as store:
        assert store.count() == 0
        assert store.store({"content": "works all the same"}) == "unit_0"
        assert [finding.code for finding in store.check()] == ["legacy-import"]
        assert any("old store" in sentence for sentence in store.get_storage_health()["recommendations"])
    assert "not imported" in caplog.text
    assert not Path("pwned").exists()
    assert all(path.read_bytes() == content for path, content in files.items())


def test_units_that_cannot_be_kept_are_left_out_and_named(tmp_path: Path) -> None:
    class Directionless(FakeEmbedder):
        def __call__(self, text: str) -> Any:
            return np.zeros(DIM) if text == "nothing" else super().__call__(text)

    old_store(tmp_path / "s", {"a": {"content": "kept"}, "b": {"content": float("nan")}, "c": {"content": "nothing"}})
    with opened(tmp_path / "s", Directionless(DIM), metric="cosine") as store:
        assert list(store.data) == ["a"]
        problems = [event["cause"] for event in store.statistics()["events"] if event["kind"] == "legacy-problem"]
        assert len(problems) == 2


def test_a_failing_service_imports_nothing_and_the_next_opening_tries_again(tmp_path: Path) -> None:
    old_store(tmp_path / "s", {"a": {"content": "kept"}})
    embedder = FakeEmbedder(DIM)
    embedder.failing = OSError("service away")
    config = StorageConfig(background=False)
    with VectorStore(tmp_path / "s", embedder, DIM, storage_config=config) as store:
        assert store.count() == 0
        assert store.check()
    with opened(tmp_path / "s") as store:
        assert store.count() == 1
