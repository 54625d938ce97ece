"""Vectors to build indexes from, and the exact answers to queries, computed in float64 by numpy alone."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest

from memevolve_gpu.index import costs, ivf
from memevolve_gpu.index.base import Index, Written
from memevolve_gpu.index.bitmap import RowFilter
from memevolve_gpu.index.registry import build
from memevolve_gpu.types import AnyArray, FloatArray, IndexPlan, IntArray, Metric, Precision, Rows

KINDS = ("exact", "two_stage", "ivf", "hnsw")
TORCH_KINDS = ("torch-exact", "torch-ivf")
"""The kinds of the torch engine, here on CPU tensors."""
EVERY_KIND = (*KINDS, *TORCH_KINDS)
WAYS = (*KINDS, "lists", *TORCH_KINDS)
"""All of them, and an ivf index whose codes lie in its lists."""
METRICS: tuple[Metric, ...] = ("l2", "cosine", "ip")


def pairs(kinds: Sequence[str], turn: int = 0) -> list[tuple[str, Metric]]:
    """Each kind with one metric and each metric with some kind; three turns pair every kind with every metric."""
    cases = max(len(kinds), len(METRICS))
    return [(kinds[i % len(kinds)], METRICS[(i + turn) % len(METRICS)]) for i in range(cases)]


def parametrize_case(metafunc: pytest.Metafunc, kinds: Sequence[str]) -> None:
    """Run a test that takes ``case`` for the pairs of a turn that its name decides.

    Together the tests of a contract try every kind with every metric; each of them tries every kind and every metric.
    """
    if "case" in metafunc.fixturenames:
        turn = zlib.crc32(metafunc.function.__name__.encode())
        metafunc.parametrize("case", pairs(kinds, turn), indirect=True, scope="module", ids="-".join)


def contents(index: Index) -> dict[str, AnyArray]:
    """The parts of an index as arrays, also those that are made while they are written."""
    return {name: one if isinstance(one, np.ndarray) else written(one) for name, one in index.parts().items()}


def written(part: Written) -> npt.NDArray[np.uint8]:
    pieces: list[bytes] = []
    part.write(pieces.append)
    assert sum(map(len, pieces)) == part.nbytes
    return np.frombuffer(b"".join(pieces), np.uint8)


def clustered(rng: np.random.Generator, n: int, dim: int, metric: Metric, clusters: int = 40) -> FloatArray:
    """Vectors around random centres in a space of at most 12 dimensions, slightly off it, as embeddings are.

    Every call with the same ``dim`` uses the same space and centres. Unit length under cosine.
    """
    fixed = np.random.default_rng(dim)
    latent = min(12, dim)
    space = fixed.standard_normal((latent, dim))
    centres = fixed.standard_normal((clusters, latent))
    points = centres[rng.integers(clusters, size=n)] + 0.5 * rng.standard_normal((n, latent))
    vectors = points @ space + 0.1 * rng.standard_normal((n, dim))
    return fitted(vectors.astype(np.float32), metric)


def fitted(vectors: FloatArray, metric: Metric) -> FloatArray:
    """What a store would hand to an index: unit length under cosine."""
    if metric == "cosine":
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def rows_of(vectors: FloatArray) -> Rows:
    """Row versions 10, 13, 16, ... with ids ``unit-é-0``, ``unit-é-1``, ..."""
    ids = [f"unit-é-{i}".encode() for i in range(len(vectors))]
    ends = np.cumsum([len(i) for i in ids], dtype=np.int64)
    slots = 10 + 3 * np.arange(len(vectors), dtype=np.int64)
    return Rows(slots, np.frombuffer(b"".join(ids), np.uint8), ends, vectors)


def plan_of(kind: str, vectors: FloatArray, precision: Precision = "float32") -> IndexPlan:
    """A plan for ``kind`` with lists where it has any; skips the test where torch is wanted and missing."""
    if kind in TORCH_KINDS:
        pytest.importorskip("torch", reason="torch is not installed")
        return replace(plan_of(kind.removeprefix("torch-"), vectors, precision), engine="torch")
    nlist = max(1, min(32, len(vectors) // 20)) if kind in {"ivf", "lists"} else 0
    return IndexPlan(kind="ivf" if kind == "lists" else kind, nlist=nlist, precision=precision)  # type: ignore[arg-type]


def index_of(kind: str, vectors: FloatArray, metric: Metric, precision: Precision = "float32", seed: int = 7) -> Index:
    with patch.object(ivf, "WHOLE_ROWS", 0 if kind == "lists" else costs.WHOLE_ROWS):
        return build(plan_of(kind, vectors, precision), rows_of(vectors), metric, seed=seed)


def all_distances(queries: FloatArray, vectors: FloatArray, metric: Metric) -> npt.NDArray[np.float64]:
    """Distances float64 (nq, n) by definition."""
    q, x = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return np.asarray([((x - one) ** 2).sum(axis=1) for one in q]).reshape(len(q), len(x))
    dots: npt.NDArray[np.float64] = q @ x.T
    return 1.0 - dots if metric == "cosine" else -dots


def nearest(
    queries: FloatArray, vectors: FloatArray, metric: Metric, k: int, row_filter: RowFilter | None = None
) -> npt.NDArray[np.float64]:
    """The k smallest distances float64 (nq, k) of each query, +inf where fewer rows are allowed."""
    distances = all_distances(queries, vectors, metric)
    if row_filter is not None:
        distances = np.where(row_filter.rows, distances, np.inf)
    missing = max(0, k - distances.shape[1])
    distances = np.pad(distances, ((0, 0), (0, missing)), constant_values=np.inf)
    return np.sort(distances, axis=1)[:, :k]


def recall(found: FloatArray, truth: npt.NDArray[np.float64], tolerance: float = 1e-5) -> float:
    """The share of true results found; ties count as hits, and what does not exist is not asked for."""
    exists = np.isfinite(truth)
    found = found[:, : truth.shape[1]]
    last = np.where(exists, truth, -np.inf).max(axis=1, keepdims=True)
    hits = (found <= last + tolerance * (1 + np.abs(last))) & exists
    return float(hits.sum() / max(1, exists.sum()))


def check_answer(
    index: Index,
    queries: FloatArray,
    vectors: FloatArray,
    answer: tuple[FloatArray, IntArray],
    row_filter: RowFilter | None = None,
    tolerance: float = 2e-4,
) -> None:
    """Shapes, types, order, padding, no row twice, nothing forbidden, and each distance that of its row.

    A ``tolerance`` above 0.001, for narrow precisions, is meant relative to the usual distance of the query.
    """
    distances, positions = answer
    assert distances.dtype == np.float32
    assert positions.dtype == np.int64
    assert distances.shape == positions.shape
    truth = all_distances(queries, vectors, index.metric)
    for row in range(len(queries)):
        found = positions[row] >= 0
        count = int(found.sum())
        assert found[:count].all(), "results come before padding"
        assert np.isposinf(distances[row, count:]).all()
        assert (np.diff(distances[row, :count]) >= 0).all()
        assert len(set(positions[row, :count].tolist())) == count
        if row_filter is not None:
            assert row_filter.rows[positions[row, :count]].all()
        own = truth[row, positions[row, :count]]
        scale = 1.0 if tolerance < 1e-3 else 1.0 + float(np.median(np.abs(truth[row])))
        np.testing.assert_allclose(distances[row, :count], own, rtol=tolerance, atol=tolerance * scale)
