"""A real standalone server that is killed, and one that hangs. Runs where one was asked for: scripts/test-milvus."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from milvus_kit import URI, Standalone, milvus_folder, running
from milvus_scenarios import killed_while_writing, paused

if milvus_folder() is None:
    pytest.skip("no real Milvus was asked for: scripts/test-milvus", allow_module_level=True)

from memevolve_gpu import VectorStore
from memevolve_gpu.components.store.copy import copy_store
from memevolve_gpu.errors import StoreUnavailableError
from memevolve_gpu.milvus.store import MilvusStore

DIM = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    standalone = Standalone(tmp_path_factory.mktemp("milvus"))
    with running(standalone):
        yield standalone


def test_every_acknowledged_unit_is_back_after_kill_9(server: Standalone) -> None:
    figures = killed_while_writing(server, seconds=3.0)
    print(figures)
    assert figures["acknowledged_before_the_kill"] > 20
    assert figures["acknowledged"] > figures["acknowledged_before_the_kill"]
    assert (figures["lost"], figures["not_found_by_their_vectors"], figures["calls_that_gave_up"]) == (0, 0, 0)
    assert figures["counted"] == figures["acknowledged"]


def test_a_server_that_is_not_there_is_an_error_after_the_stated_time() -> None:
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError, match=r"127.0.0.1:1 gave no answer within 2 s.*MEMEVOLVE_MILVUS_URI"):
        MilvusStore(None, DIM, milvus_config={"uri": "http://127.0.0.1:1", "timeout": 2})
    assert time.monotonic() - began < 6


def test_a_copy_there_and_back_keeps_everything(server: Standalone, tmp_path: Path) -> None:
    vectors = np.random.default_rng(5).standard_normal((2_500, DIM)).astype("float32")
    units = [{"id": f"id {i} é\"'", "content": f"fact {i}", "n": i} for i in range(len(vectors))]
    quiet = {"background": False}
    with (
        VectorStore(tmp_path / "a", None, DIM, storage_config=quiet) as source,
        MilvusStore(None, DIM, milvus_config={"uri": URI, "collection": "copied"}) as there,
        VectorStore(tmp_path / "b", None, DIM, storage_config=quiet) as back,
    ):
        source.store_batch(units, vectors)
        outward, homeward = copy_store(source, there), copy_store(there, back)
        assert (outward.copied, homeward.copied, homeward.count) == (2_500, 2_500, 2_500)
        for (unit, vector), (other, its) in zip(source.export_rows(), back.export_rows(), strict=True):
            assert unit == other
            assert np.array_equal(vector, its)


def test_an_exact_search_is_exact_before_and_after_the_server_has_indexed(server: Standalone) -> None:
    vectors = np.random.default_rng(6).standard_normal((8_000, DIM)).astype("float32")
    queries = np.random.default_rng(7).standard_normal((20, DIM)).astype("float32")
    truth = np.sort(np.square(queries[:, None] - vectors[None]).sum(axis=2), axis=1)[:, :10]
    with MilvusStore(None, DIM, milvus_config={"uri": URI, "collection": "exact"}) as store:
        store.store_batch([{"id": f"u{i}"} for i in range(len(vectors))], vectors)
        for _ in range(2):
            assert np.allclose(store.search_vectors(queries, 10, recall=1.0)[0], truth, rtol=1e-4)
            store.run_maintenance()
        assert store.statistics()["server"]["rows_indexed"] == len(vectors)


@pytest.mark.parametrize(("index_type", "kind"), [("flat", "FLAT"), ("ivf", "IVF_FLAT"), ("hnsw", "HNSW")])
def test_every_index_meets_its_target(server: Standalone, index_type: str, kind: str) -> None:
    rng = np.random.default_rng(8)
    centres = rng.standard_normal((30, DIM))
    vectors = (centres[rng.integers(0, 30, 4_000)] + 0.5 * rng.standard_normal((4_000, DIM))).astype("float32")
    queries = vectors[::80] + np.float32(0.01)
    truth = np.sort(np.square(queries[:, None] - vectors[None]).sum(axis=2), axis=1)[:, 9:10]
    place = {"uri": URI, "collection": f"index_{index_type}"}
    with MilvusStore(None, DIM, {"index_type": index_type}, place) as store:
        store.store_batch([{"id": f"u{i}"} for i in range(len(vectors))], vectors)
        store.run_maintenance()
        assert store.index.kind == kind
        found = store.search_vectors(queries, 10, recall=0.95)[0]
        assert np.mean(found <= truth * 1.001) >= 0.95


FORKING = """
import os, sys
from memevolve_gpu.milvus.store import MilvusStore

store = MilvusStore(None, 4, milvus_config={"collection": "forked"})
store.store_batch([{"content": "of the parent"}], [[1, 2, 3, 4]])
child = os.fork()
if not child:
    store.store_batch([{"content": "of the child"}], [[4, 3, 2, 1]])
    os._exit(0 if store.count() == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
store.refresh()
assert store.count() == 2
assert len(set(store.data)) == 2
store.close()
"""


def test_a_forked_child_goes_on(server: Standalone) -> None:
    run = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


def test_the_commands_work_on_a_server(server: Standalone, tmp_path: Path) -> None:
    def command(*arguments: str) -> dict[str, Any]:
        line = [sys.executable, "-m", "memevolve_gpu.cli", *arguments, "--json"]
        run = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        document: dict[str, Any] = json.loads(run.stdout)
        return document

    address = "milvus://127.0.0.1:19530/commands"
    (tmp_path / "units.jsonl").write_text(
        '{"id": "a", "content": "git rebase"}\n{"id": "b", "content": "tar archive"}\n'
    )
    command("add", "units.jsonl", "--store", "here", "--embedder", "hashing")
    assert command("copy", "here", address)["copied"] == 2
    assert command("search", "rebase", "--store", address)["hits"][0]["id"] == "a"
    assert command("health", "--store", address)["current_count"] == 2
    assert command("stats", "--store", address)["index"]["kind"] == "IVF_FLAT"
    assert command("maintain", "--store", address)["actions"][0] == "flushed"
    assert command("copy", address, "again")["count"] == 2
    line = [sys.executable, "-m", "memevolve_gpu.cli", "check", "--store", address]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 2


def test_a_server_that_hangs_is_an_error_after_the_stated_time(server: Standalone) -> None:
    # The last of these: a server that hung longer than its lease (5 s) may end itself.
    figures = paused(server, timeout=2.0)
    print(figures)
    assert "within 2 s" in figures["message"]
    assert figures["waited_s"] < 5
    assert figures["right_afterwards"]
