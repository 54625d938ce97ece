"""A snapshot says which of its rows were dead, or is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle import clustered, index_of

from memevolve_gpu.index.snapshot_file import SnapshotError, SnapshotInfo, read_info, read_snapshot, write_snapshot


@pytest.fixture
def info_and_index(rng: np.random.Generator) -> tuple[SnapshotInfo, object]:
    index = index_of("two_stage", clustered(rng, 200, 8, "l2"), "l2")
    return SnapshotInfo("s", 1, 5, index.n, index.plan, "l2", 8, 0.0, 7), index


@pytest.mark.parametrize("dead", [[], [0], [3, 17, 199], list(range(200))])
def test_the_dead_are_read_back(info_and_index: tuple[SnapshotInfo, object], dead: list[int], tmp_path: Path) -> None:
    info, index = info_and_index
    written = replace(info, dead=np.array(dead, dtype=np.int64))
    write_snapshot(tmp_path / "s", index, written)  # type: ignore[arg-type]
    again, read = read_snapshot(tmp_path / "s", store_id="s", dim=8, metric="l2")
    assert read.dead.tolist() == dead
    assert read.dead.dtype == np.int64
    assert read == info == read_info(tmp_path / "s")
    assert again.n == 200
    assert "dead" not in again.parts()


@pytest.mark.parametrize("dead", [[-1], [200], [5, 5], [7, 3]])
def test_rows_that_cannot_be_dead_are_refused(
    info_and_index: tuple[SnapshotInfo, object], dead: list[int], tmp_path: Path
) -> None:
    info, index = info_and_index
    write_snapshot(tmp_path / "s", index, replace(info, dead=np.array(dead, dtype=np.int64)))  # type: ignore[arg-type]
    with pytest.raises(SnapshotError, match="dead rows") as caught:
        read_snapshot(tmp_path / "s", store_id="s", dim=8, metric="l2")
    assert caught.value.reason == "damaged"
