"""The faiss engine on a GPU: the contract of all bodies, its bytes, and a device that has no room.

The tests of ``cpu_tests/index/faiss_gpu`` run here once more, on the device instead of its stand-in.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cuda_tests.card_kit import embeddings, filled_card, free_bytes, need_engine
from index.faiss_gpu import test_faiss_gpu_contract as contract
from index.oracle import rows_of

from memevolve_gpu.errors import DeviceError
from memevolve_gpu.index.allowed import Allowed
from memevolve_gpu.index.base import Body
from memevolve_gpu.index.catalog import build
from memevolve_gpu.index.faiss_gpu.owner import owner_of
from memevolve_gpu.index.faiss_gpu.sizes import TEMPORARY_BYTES, plan_device_bytes
from memevolve_gpu.index.scan import exact_scan
from memevolve_gpu.types import Effort, FloatArray, IndexPlan, IntArray, Precision

# The tests of the contract and their cases, collected here as if they were written here.
globals().update({name: found for name, found in vars(contract).items() if name.startswith("test_")})
case, index_preferred = contract.case, contract.index_preferred


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    need_engine("faiss")


@pytest.fixture
def card() -> None:
    """Takes the place of the stand-in: the real card needs nothing."""


@pytest.fixture(scope="module")
def shared_card(_engine: None) -> None:
    """The same for the module."""


def plan_of(kind: str, n: int, precision: Precision = "float32", nlist: int = 256) -> IndexPlan:
    return IndexPlan(kind, nlist if kind == "ivf" else 0, precision=precision, engine="faiss", device="cuda:0")  # type: ignore[arg-type]


def same_neighbours(found: IntArray, truth: IntArray) -> float:
    """Share of the true neighbours that were found."""
    pairs = zip(found.tolist(), truth.tolist(), strict=True)
    return float(np.mean([len(set(ours) & set(theirs)) / len(theirs) for ours, theirs in pairs]))


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_real_queries_are_answered_as_the_cpu_answers_them(precision: Precision, shared_data: Path) -> None:
    vectors = np.load(shared_data / "tldr_minilm_f16.npy").astype(np.float32)
    for name in ("tldr_queries", "ood_queries"):
        queries = np.load(shared_data / f"{name}_minilm_f16.npy").astype(np.float32)
        body = build(plan_of("exact", len(vectors), precision), rows_of(vectors), "l2", seed=1)
        distances, found = body.search(queries, 10, Effort())
        truth = body.table.scan(queries, 10)
        assert same_neighbours(found, truth[1]) >= 0.999
        np.testing.assert_allclose(distances, truth[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_real_queries_find_their_neighbours_in_lists(precision: Precision, shared_data: Path) -> None:
    vectors = np.load(shared_data / "tldr_minilm_f16.npy").astype(np.float32)
    queries = np.load(shared_data / "tldr_queries_minilm_f16.npy").astype(np.float32)
    truth = exact_scan(queries, vectors, 10, "l2")[1]
    body = build(plan_of("ivf", len(vectors), precision), rows_of(vectors), "l2", seed=1)
    recalls = [same_neighbours(body.search(queries, 10, Effort(nprobe=n))[1], truth) for n in (8, 64, 256)]
    assert recalls == sorted(recalls)
    assert recalls[1] >= 0.93
    assert recalls[2] >= (0.97 if precision == "int8" else 0.999)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_predicted_bytes_are_what_the_device_reports(kind: str, precision: Precision) -> None:
    n, dim = 300_000, 384
    vectors = embeddings(n, dim)
    first = build(plan_of("exact", 1000), rows_of(vectors[:1000]), "l2", seed=1)
    plan = plan_of(kind, n, precision, nlist=1024)
    rows = rows_of(vectors)
    body: Body | None = None
    gc.collect()
    before, ours = free_bytes(), owner_of("cuda:0").allocated()
    body = build(plan, rows, "l2", seed=1)
    after, held = free_bytes(), owner_of("cuda:0").allocated() - ours
    predicted = plan_device_bytes(plan, n, dim) - TEMPORARY_BYTES
    print(f"{kind} {precision}: predicted {predicted}, said {body.device_bytes}, faiss {held}, card {before - after}")
    assert body.device_bytes == pytest.approx(predicted, rel=0.1)
    assert held == pytest.approx(body.device_bytes, rel=0.02)
    assert before - after == pytest.approx(predicted, rel=0.1)
    del body
    gc.collect()
    assert free_bytes() >= before - (16 << 20), "what a body held is given back"
    assert first.device == "cuda:0"


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_large_batches_are_tiled(kind: str) -> None:
    vectors = embeddings(200_000, 384)
    body = build(plan_of(kind, len(vectors), nlist=1024), rows_of(vectors), "cosine", seed=1)
    queries = embeddings(3000, 384, seed=2)
    effort = Effort(nprobe=1024)
    distances, _ = body.search(queries, 10, effort)
    single = np.concatenate([body.search(query[None], 10, effort)[0] for query in queries[::100]])
    np.testing.assert_allclose(distances[::100], single, atol=1e-5)
    assert body.incidents() == []


def test_many_threads_and_bodies_share_the_device() -> None:
    vectors = embeddings(20_000, 96)
    bodies = [build(plan_of(kind, len(vectors), nlist=64), rows_of(vectors), "l2", seed=1) for kind in ("exact", "ivf")]
    mask = Allowed(np.arange(len(vectors)) % 3 > 0)

    def ask(row: int) -> bool:
        body = bodies[row % 2]
        found = body.search(vectors[row : row + 1], 5, Effort(nprobe=64), mask if row % 3 else None)[1][0]
        build(plan_of("exact", 500), rows_of(vectors[:500]), "l2", seed=1)
        return int(found[0]) == row

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(600)))
    assert all(body.incidents() == [] and body.device == "cuda:0" for body in bodies)


@pytest.fixture
def resident() -> tuple[Body, FloatArray]:
    """A body on the device, and its vectors."""
    vectors = embeddings(50_000, 384)
    return build(plan_of("exact", len(vectors)), rows_of(vectors), "l2", seed=1), vectors


def test_a_full_card_refuses_bodies_and_answers_from_those_it_holds(resident: tuple[Body, FloatArray]) -> None:
    body, vectors = resident
    with filled_card():
        with pytest.raises(DeviceError) as caught:
            build(plan_of("exact", len(vectors)), rows_of(vectors), "l2", seed=1)
        assert caught.value.cause == "out-of-memory"
        found = body.search(vectors[:2000], 1, Effort())[1][:, 0]
        assert found.tolist() == list(range(2000))
    again = build(plan_of("exact", len(vectors)), rows_of(vectors), "l2", seed=1)
    assert again.search(vectors[:10], 1, Effort())[1][:, 0].tolist() == list(range(10))
    assert again.device == "cuda:0"
