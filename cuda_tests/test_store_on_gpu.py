"""A store on a GPU, through its public doors, with each engine: what a store promises, and a card that fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_tests.card_kit import (
    DEVICE,
    ENGINES,
    Hooks,
    device_of,
    embeddings,
    event_kinds,
    filled_card,
    free_bytes,
    need_engine,
    open_store,
    scratch_of,
    units,
)

from memevolve_gpu import VectorStore
from memevolve_gpu.types import FloatArray

REHEARSED = Hooks.tensors == "cpu"
N, DIM = (1200, 48) if REHEARSED else (6000, 384)
MANY = 20_000 if REHEARSED else 200_000


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    need_engine(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def vectors() -> FloatArray:
    return embeddings(N, DIM)


@pytest.fixture(params=["flat", "ivf"])
def store(request: pytest.FixtureRequest, engine: str, vectors: FloatArray, tmp_path: Path) -> Iterator[VectorStore]:
    """A store of N units whose index lies on the device."""
    with open_store(tmp_path / "memory", engine, dim=DIM, index_type=request.param) as made:
        made.store_batch(units(0, N), embeddings=vectors)
        made.run_maintenance()
        yield made


def on_device(store: VectorStore, engine: str) -> Any:
    """The device's report, after it was found to be at work."""
    report = device_of(store)
    assert (report["device"], report["engine"]) == (DEVICE, engine), report
    assert report["measured_bytes"] > 0
    assert report["problem"] is None
    return report


def exact(queries: FloatArray, vectors: FloatArray, names: list[str], k: int) -> list[list[str]]:
    """The names of the k nearest by squared distance in float64, computed by numpy alone."""
    q, x = queries.astype(np.float64), vectors.astype(np.float64)
    distances = (q**2).sum(axis=1)[:, None] + (x**2).sum(axis=1)[None] - 2 * q @ x.T
    return [[names[at] for at in row] for row in np.argsort(distances, axis=1, kind="stable")[:, :k]]


def agreement(found: list[list[str | None]], truth: list[list[str]]) -> float:
    """Share of the true results that were found."""
    pairs = zip(found, truth, strict=True)
    return float(np.mean([len(set(ours) & set(theirs)) / len(theirs) for ours, theirs in pairs]))


def promised(store: VectorStore) -> float:
    """The least agreement: what the store was asked for, less the uncertainty of some hundred queries."""
    return 0.999 if store.index_type == "flat" else store.config.target_recall - 0.03


def names_of(start: int, stop: int) -> list[str]:
    return [f"u{row}" for row in range(start, stop)]


def test_the_index_lies_on_the_device_and_says_so(store: VectorStore, engine: str) -> None:
    report = on_device(store, engine)
    assert report["budget"]["after"]["limit"] > 0
    statistics = store.statistics()
    assert statistics["index"]["device"] == DEVICE
    assert DEVICE in statistics["plan"]["reason"]
    assert event_kinds(store)["device"] >= 1


def test_searches_answer_as_exact_search_does(store: VectorStore, vectors: FloatArray) -> None:
    queries = embeddings(200, DIM, seed=5)
    truth = exact(queries, vectors, names_of(0, N), 10)
    for batch in (1, 16, 200):
        found = [ids for at in range(0, 200, batch) for ids in store.search_vectors(queries[at : at + batch], 10)[1]]
        assert agreement(found, truth) >= promised(store)


def test_filters_hold(store: VectorStore, vectors: FloatArray) -> None:
    queries = embeddings(400, DIM, seed=6)
    rows = np.arange(N)
    for filters, kept in (({"metadata.topic": 1}, rows[rows % 3 == 1]), ({"type": "tool"}, rows[rows % 3 == 2])):
        truth = exact(queries, vectors[kept], [f"u{row}" for row in kept], 10)
        assert agreement(store.search_vectors(queries, 10, filters)[1], truth) >= promised(store)


def test_writes_are_found_and_deletions_are_not(store: VectorStore, engine: str, vectors: FloatArray) -> None:
    fresh = embeddings(300, DIM, seed=7)
    store.store_batch(units(N, N + 300), embeddings=fresh)
    gone = [f"u{row}" for row in range(0, 600, 2)]
    assert store.delete_batch(gone) == len(gone)
    for _ in range(2):  # before the index is built again, and after
        assert [ids[0] for ids in store.search_vectors(fresh, 1)[1]] == names_of(N, N + 300)
        found = store.search_vectors(vectors[:600], 5)[1]
        assert not {name for ids in found for name in ids} & set(gone)
        assert [ids[0] for ids in found[1::2]] == [f"u{row}" for row in range(1, 600, 2)]
        store.retrain()
        on_device(store, engine)


def test_updates_move_units(store: VectorStore, vectors: FloatArray) -> None:
    moved = embeddings(1, DIM, seed=8)
    replaced = store.replace_batch(["u5"], [{**units(5, 6)[0], "content": "elsewhere"}], embeddings=moved)
    assert replaced == ["u5"]
    assert store.search_vectors(moved, 1)[1] == [["u5"]]
    assert store.search_vectors(vectors[5:6], 1)[1] != [["u5"]]


def test_reopening_serves_at_once_and_returns_to_the_device(engine: str, vectors: FloatArray, tmp_path: Path) -> None:
    prefix = tmp_path / "memory"
    with open_store(prefix, engine, dim=DIM) as store:
        store.store_batch(units(0, N), embeddings=vectors)
        store.run_maintenance()
        on_device(store, engine)
    with open_store(prefix, engine) as store:
        assert [ids[0] for ids in store.search_vectors(vectors[:50], 1)[1]] == names_of(0, 50)
        store.run_maintenance()
        on_device(store, engine)
        assert [ids[0] for ids in store.search_vectors(vectors[:50], 1)[1]] == names_of(0, 50)


WRITER = """
import sys, numpy as np
from pathlib import Path
sys.path[:0] = {paths!r}
if {rehearsed}:
    from cuda_tests import rehearsal
    rehearsal.start()
from cuda_tests.card_kit import embeddings, open_store, units
with open_store(Path({prefix!r}), {engine!r}, dim={dim}) as store:
    store.store_batch(units(0, {n}), embeddings=embeddings({n}, {dim}))
    store.run_maintenance()
    print(store.statistics()["index"]["device"], flush=True)
    more = embeddings(100_000, {dim}, seed=9)
    for row in range(100_000):
        store.store_batch(units({n} + row, {n} + row + 1), embeddings=more[row:row + 1])
        store.search_vectors(more[row:row + 1], 1)
        print({n} + row, flush=True)
"""


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(engine: str, tmp_path: Path) -> None:
    prefix, n = tmp_path / "memory", 2000
    program = WRITER.format(
        paths=[str(Path(__file__).parents[1]), *sys.path],
        rehearsed=REHEARSED,
        prefix=str(prefix),
        engine=engine,
        dim=DIM,
        n=n,
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as writer:
        if writer.stdout is None:
            raise RuntimeError("no pipe")
        assert writer.stdout.readline().strip() == DEVICE
        told = [int(writer.stdout.readline()) for _ in range(300)]
        writer.send_signal(signal.SIGKILL)
        told += [int(line) for line in writer.stdout if line.endswith("\n") and line.strip()]
    more = embeddings(100_000, DIM, seed=9)
    with open_store(prefix, engine) as store:
        assert store.count() in (n + len(told), n + len(told) + 1)
        assert store.check() == []
        for _ in range(2):
            found = store.search_vectors(more[: len(told)], 1)[1]
            assert [ids[0] for ids in found] == [f"u{row}" for row in told]
            store.run_maintenance()
        on_device(store, engine)


def test_a_card_that_others_fill_leaves_the_cpu_and_comes_back(
    engine: str, vectors: FloatArray, tmp_path: Path
) -> None:
    with open_store(tmp_path / "memory", engine, dim=DIM, index_type="flat") as store:
        store.store_batch(units(0, N), embeddings=vectors)
        with filled_card():
            store.run_maintenance()
            report = device_of(store)
            assert report["device"] == "cpu"
            # Either the plan saw it coming, or the device refused.
            told = [store.statistics()["plan"]["reason"], *store.get_storage_health()["recommendations"]]
            assert any("do not fit" in text or "GPU is not used" in text for text in told), told
            assert [ids[0] for ids in store.search_vectors(vectors[:50], 1)[1]] == names_of(0, 50)
        store.run_maintenance()
        on_device(store, engine)
        assert [ids[0] for ids in store.search_vectors(vectors[:50], 1)[1]] == names_of(0, 50)


def test_an_index_on_a_card_that_fills_up_goes_on(store: VectorStore, engine: str, vectors: FloatArray) -> None:
    on_device(store, engine)
    with filled_card(leave=2 << 20):
        found = store.search_vectors(vectors[:1000], 1)[1]
        assert [ids[0] for ids in found] == names_of(0, 1000)
        store.store_batch(units(N, N + 10), embeddings=embeddings(10, DIM, seed=11))
        assert store.search_vectors(embeddings(10, DIM, seed=11), 1)[1] == [[name] for name in names_of(N, N + 10)]
        store.get_storage_health()
    found = store.search_vectors(vectors[:1000], 1)[1]
    assert [ids[0] for ids in found] == names_of(0, 1000)
    assert store.check() == []


def test_growth_on_a_card_without_room_goes_on(engine: str, tmp_path: Path) -> None:
    """New rows beside an index, and the longer index that takes them in, while another process has all the memory."""
    rows, step = embeddings(8 * N, DIM), 2 * N
    with open_store(tmp_path / "memory", engine, dim=DIM, index_type="flat") as store:
        store.store_batch(units(0, step), embeddings=rows[:step])
        store.run_maintenance()
        on_device(store, engine)
        with filled_card(leave=4 << 20):
            for start in range(step, 8 * N, step):
                store.store_batch(units(start, start + step), embeddings=rows[start : start + step])
                assert found_all(store, rows, start + step)
                store.run_maintenance()
                assert found_all(store, rows, start + step)
        store.run_maintenance()
        on_device(store, engine)
        assert found_all(store, rows, 8 * N)
        assert store.check() == []


def found_all(store: VectorStore, rows: FloatArray, count: int) -> bool:
    """Is each of some of the first ``count`` units the nearest to its own vector, in batches and one by one?"""
    some = list(range(0, count, max(1, count // 300)))
    batch = [ids[0] for ids in store.search_vectors(rows[some], 1)[1]]
    alone = [store.search_vectors(rows[row : row + 1], 1)[1][0][0] for row in some[-5:]]
    expected = [f"u{row}" for row in some]
    return batch == expected and alone == expected[-5:]


def _child_answers(prefix: str, engine: str, store: VectorStore, vectors: FloatArray, path: str) -> None:
    ids = [found[0] for found in store.search_vectors(vectors[:50], 1)[1]]
    store.store_batch(units(N, N + 1), embeddings=embeddings(1, DIM, seed=12))
    Path(path).write_text(json.dumps({"ids": ids, "device": store.statistics()["index"]["device"]}))
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on_without_the_device(
    store: VectorStore, engine: str, vectors: FloatArray, tmp_path: Path
) -> None:
    on_device(store, engine)
    answer = tmp_path / "answer.json"
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_child_answers, args=(str(tmp_path), engine, store, vectors, str(answer)))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert json.loads(answer.read_text()) == {"ids": names_of(0, 50), "device": "cpu"}
    assert store.search_vectors(embeddings(1, DIM, seed=12), 1)[1] == [[f"u{N}"]]
    on_device(store, engine)


@pytest.mark.parametrize("index_type", ["flat", "ivf"])
def test_predicted_bytes_of_a_plan_are_what_the_device_reports(engine: str, index_type: str, tmp_path: Path) -> None:
    n = MANY
    rows = embeddings(n, DIM, around=1000)  # with fewer centres than lists, some lists get two and others none
    with open_store(tmp_path / "first", engine, dim=DIM, index_type="flat") as first:
        first.store_batch(units(0, 2000), embeddings=rows[:2000])
        first.run_maintenance()
        first.search_vectors(rows[:1024], 10)
        with open_store(tmp_path / "memory", engine, dim=DIM, index_type=index_type) as store:
            store.store_batch(units(0, n), embeddings=rows)
            before = free_bytes()
            store.run_maintenance()
            taken = before - free_bytes()
            report = on_device(store, engine)
            predicted = report["predicted_bytes"] - scratch_of(engine)
            print(f"{engine} {index_type}: predicted {predicted}, body {report['measured_bytes']}, card {taken}")
            assert report["measured_bytes"] == pytest.approx(predicted, rel=0.1)
            assert taken == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("index_type", ["flat", "ivf"])
def test_real_queries_are_answered_as_the_cpu_answers_them(
    engine: str, index_type: str, shared_data: Path, tmp_path: Path
) -> None:
    if REHEARSED:
        pytest.skip("takes too long without a card")
    rows = np.load(shared_data / "tldr_minilm_f16.npy").astype(np.float32)
    queries = np.load(shared_data / "tldr_queries_minilm_f16.npy").astype(np.float32)
    truth = exact(queries, rows, names_of(0, len(rows)), 10)
    with open_store(tmp_path / "memory", engine, dim=rows.shape[1], index_type=index_type) as store:
        store.store_batch(units(0, len(rows)), embeddings=rows)
        store.run_maintenance()
        on_device(store, engine)
        found = agreement(store.search_vectors(queries, 10)[1], truth)
        print(f"{engine} {index_type}: recall@10 {found:.4f} on {len(queries)} real queries")
        assert found >= (0.999 if index_type == "flat" else store.config.target_recall - 0.01)
