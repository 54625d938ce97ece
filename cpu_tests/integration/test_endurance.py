"""kill -9 at any point, with the snapshot hurt in between. The long run is ``scripts/endure``."""

from __future__ import annotations

from pathlib import Path

import pytest
from endurance import endure

pytestmark = pytest.mark.slow
SEED = 20_240_607


@pytest.mark.parametrize("index_type", ["ivf", "hnsw"])
def test_what_was_acknowledged_survives_every_kill(tmp_path: Path, index_type: str) -> None:
    print(f"seed {SEED}")
    tally = endure(500, SEED, index_type, tmp_path)
    assert tally["operations"] >= 500
    assert tally["kills"] >= 1
