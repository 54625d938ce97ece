"""An open store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from records_kit import DIM, Fault, FaultyVFS

from memevolve_gpu.records import Records


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Where the store under test lives."""
    return tmp_path / "memory"


@pytest.fixture
def records(prefix: Path) -> Iterator[Records]:
    """A new, empty store; what "full" adds is tested where the disk fails."""
    with Records.open(prefix, dim=DIM, durability="normal") as opened:
        yield opened


@pytest.fixture
def fault() -> Iterator[Fault]:
    """A file system of the name "faulty", which fails as the test says."""
    made = Fault()
    vfs = FaultyVFS("faulty", made)
    yield made
    vfs.unregister()
