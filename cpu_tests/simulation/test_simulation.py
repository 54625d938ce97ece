"""Simulated lives of a store: fixed seeds hold, a seed replays, and the harness finds faults that are planted.

Many more seeds: ``scripts/endure``; one of them: ``scripts/endure --seed N``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import apsw
import pytest
from fault_vfs import FAULTS
from simulation.simulated import BrokenPromiseError, simulate

from memevolve_gpu.index import snapshot_file, vector_table
from memevolve_gpu.live import live_index, maintenance
from memevolve_gpu.records import backup, lineage, opening, pool, writer
from memevolve_gpu.records.records import Records
from memevolve_gpu.records.transaction import Transaction
from memevolve_gpu.types import Change, Op

SEEDS = (*range(24), 36)
"""Together they have everything in them that the second test names."""


@pytest.fixture(scope="module")
def lives() -> Counter[str]:
    """What happened in the lives of all fixed seeds."""
    total: Counter[str] = Counter()
    for seed in SEEDS:
        total += simulate(seed).tally
    return total


@pytest.mark.slow
def test_every_promise_holds_in_the_lives_of_fixed_seeds(lives: Counter[str]) -> None:
    print(dict(lives))
    assert lives["cut"] > len(SEEDS)
    assert lives["kill"] > len(SEEDS) // 2


@pytest.mark.slow
def test_these_lives_have_everything_in_them(lives: Counter[str]) -> None:
    """Otherwise the test above says less than it seems to."""
    damages = [f"snapshot: {how}" for how in ("truncate", "delete", "flip", "many flips", "an old snapshot", "foreign")]
    wanted = [
        *FAULTS,
        *damages,
        "taken back",
        "meanwhile",
        "cut while recovering",
        "looks into a commit",
        "restore",
        "backup",
        "prune",
        "jump",
    ]
    assert [name for name in wanted if not lives[name]] == []


class TestReplay:
    def test_a_seed_gives_the_same_trace_whatever_ran_before(self) -> None:
        first = simulate(5).trace
        simulate(6)
        assert simulate(5).trace == first

    def test_and_in_another_process(self, repository: Path) -> None:
        paths = os.pathsep.join(str(repository / folder) for folder in ("cpu_tests", "cpu_tests/helpers"))
        said = subprocess.run(
            [sys.executable, "-m", "simulation.campaign", "--seed", "5"],
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "12345"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said.splitlines()[-1] == f"trace {simulate(5).trace}"

    def test_other_seeds_give_other_traces(self) -> None:
        assert len({simulate(seed, 10).trace for seed in range(8)}) == 8

    def test_a_shorter_life_is_the_beginning_of_a_longer_one(self) -> None:
        lines: list[str] = []
        simulate(7, 40, lines.append)
        whole = list(lines)
        lines.clear()
        simulate(7, 15, lines.append)
        assert lines == whole[:15]


# Faults that are planted in the package


@contextmanager
def log_is_not_synced() -> Iterator[None]:
    def careless(con: apsw.Connection, _durability: str) -> None:
        con.execute("PRAGMA synchronous = off")

    with patch.object(opening, "set_up_writer", careless), patch.object(writer, "set_up_writer", careless):
        yield


@contextmanager
def folder_is_not_synced() -> Iterator[None]:
    with patch.object(backup, "sync_folder", lambda _folder: None):
        yield


@contextmanager
def deletes_are_not_logged() -> Iterator[None]:
    log = Transaction._log

    def forgetful(self: Transaction, op: int, slot: int) -> None:
        if op != Op.DROP or slot % 3:
            log(self, op, slot)

    with patch.object(Transaction, "_log", forgetful):
        yield


@contextmanager
def wrong_slot_is_applied() -> Iterator[None]:
    read = Records.read_after

    def shifted(self: Records, seq: int, limit: int) -> list[Change]:
        found = read(self, seq, limit)
        if len(found) > 3 and found[0].op == found[1].op == Op.PUT and found[0].id and found[1].id:
            one, two = found[0], found[1]
            found[:2] = [one._replace(vector=two.vector), two._replace(vector=one.vector)]
        return found

    with patch.object(Records, "read_after", shifted):
        yield


@contextmanager
def vector_of_the_old_text_is_kept() -> Iterator[None]:
    put = Transaction.put

    def lazy(self: Transaction, unit: Any, vector: bytes, unit_id: str) -> int:
        old = self._raw("SELECT v.vector FROM units u JOIN vectors v ON v.slot = u.slot WHERE u.id = ?", (unit_id,))
        return put(self, unit, old[0][0] if old else vector, unit_id)

    with patch.object(Transaction, "put", lazy):
        yield


@contextmanager
def checksums_are_not_compared() -> Iterator[None]:
    """Nor are rows of the snapshot compared with the records, which finds as much in stores this small."""
    with (
        patch.object(snapshot_file, "zlib", SimpleNamespace(crc32=lambda *_: 0)),
        patch.object(vector_table, "zlib", SimpleNamespace(crc32=lambda *_: 0)),
        patch.object(live_index, "agrees", lambda *_: True),
        patch.object(maintenance, "agrees", lambda *_: True),
    ):
        yield


@contextmanager
def foreign_logs_are_replayed() -> Iterator[None]:
    with patch.object(lineage, "why_foreign", lambda *_: None), patch.object(pool, "why_foreign", lambda *_: None):
        yield


@contextmanager
def batches_are_written_in_two_transactions() -> Iterator[None]:
    many = Transaction.put_many

    def halved(self: Transaction, rows: Any) -> None:
        given = list(rows)
        many(self, given[: len(given) // 2])
        self.finish()
        self.outside(lambda con: con.execute("COMMIT; BEGIN IMMEDIATE"))
        many(self, given[len(given) // 2 :])

    with patch.object(Transaction, "put_many", halved):
        yield


PLANTED: dict[Callable[[], AbstractContextManager[None]], int] = {
    log_is_not_synced: 0,
    folder_is_not_synced: 0,
    deletes_are_not_logged: 0,
    wrong_slot_is_applied: 0,
    vector_of_the_old_text_is_kept: 0,
    foreign_logs_are_replayed: 0,
    batches_are_written_in_two_transactions: 25,
    checksums_are_not_compared: 10,
}
"""Faults, and the seed from which on they are searched for."""


def try_seeds(first: int) -> None:
    for seed in range(first, first + 100):
        simulate(seed)


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Callable[[], AbstractContextManager[None]]) -> None:
    with plant(), pytest.raises(BrokenPromiseError, match="seed") as found:
        try_seeds(PLANTED[plant])
    print(found.value)
