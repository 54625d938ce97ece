"""What an index is trained on, with an embedding service that works, fails, or comes back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from support import SEED, FakeBatchEmbedder

from memevolve_gpu.errors import DimensionMismatchError, EmbeddingError, StorageError
from memevolve_gpu.training.training_set import collect, drawn_like, existing_sample, samples_wanted, source_for
from memevolve_gpu.types import FloatArray, Metric

DIM = 16


def stored(n: int, seed: int = SEED) -> FloatArray:
    rng = np.random.default_rng(seed)
    vectors = (rng.standard_normal((n, 4)) @ rng.standard_normal((4, DIM)) + 0.5).astype(np.float32)
    unit: FloatArray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


class Kept:
    """A cache in memory."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.vectors = np.empty((0, DIM), np.float32)

    def load(self) -> tuple[Sequence[str], FloatArray]:
        return self.texts, self.vectors

    def save(self, texts: Sequence[str], vectors: FloatArray) -> None:
        self.texts.extend(texts)
        self.vectors = np.concatenate([self.vectors, vectors])


class Failing(FakeBatchEmbedder):
    """Answers the calls whose numbers are in ``good``, counted from 0."""

    def __init__(self, good: range) -> None:
        super().__init__(DIM)
        self.good = good
        self.asked = 0

    def embed_batch(self, texts: Sequence[str]) -> FloatArray:
        self.asked += 1
        if self.asked - 1 not in self.good:
            raise EmbeddingError(f"call {self.asked} failed")
        return super().embed_batch(texts)


@pytest.mark.parametrize(
    ("count", "source", "samples"),
    [
        (0, "service", 2000),
        (99, "service", 2000),
        (100, "hybrid", 1400),
        (999, "hybrid", 501),
        (1000, "existing", 0),
        (10**6, "existing", 0),
    ],
)
def test_the_count_decides_what_is_trained_on(count: int, source: str, samples: int) -> None:
    assert (source_for(count), samples_wanted(count)) == (source, samples)


def test_enough_vectors_need_no_service() -> None:
    found = collect(stored(1200), metric="cosine", seed=SEED)
    np.testing.assert_array_equal(found.vectors, stored(1200))
    assert (found.existing, found.usable, found.error) == (1200, True, "")


def test_a_large_store_gives_a_seeded_sample() -> None:
    vectors = stored(5000)
    first, second = (collect(vectors, metric="l2", seed=SEED, limit=1500).vectors for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first, axis=0)) == 1500
    assert not np.array_equal(first, existing_sample(vectors, 1500, SEED + 1))


def test_a_middling_store_is_filled_up_to_1500() -> None:
    embedder, shares = FakeBatchEmbedder(DIM), []
    found = collect(
        stored(300),
        metric="cosine",
        seed=SEED,
        embed=embedder.embed_batch,
        proportions={"skill": 1.0},
        progress=lambda stage, share: shares.append((stage, share)),
    )
    assert (found.source, found.existing, found.service, found.fallbacks) == ("hybrid", 300, 1200, 0)
    assert found.usable
    assert found.vectors.shape == (1500, DIM)
    assert found.vectors.dtype == np.float32
    np.testing.assert_array_equal(found.vectors[:300], stored(300))
    assert all(text.endswith(" skill") for text in embedder.texts)
    assert embedder.batches == len(shares) > 1
    assert [stage for stage, _ in shares] == ["samples"] * len(shares)
    assert shares[-1][1] == 1.0


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_a_small_store_is_trained_on_service_samples(metric: Metric) -> None:
    def embed(texts: Sequence[str]) -> FloatArray:
        return 3 * FakeBatchEmbedder(DIM).embed_batch(texts)

    found = collect(stored(0), metric=metric, seed=SEED, embed=embed)
    assert (found.existing, found.service, len(found.vectors), found.usable) == (0, 2000, 2000, True)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1.0 if metric == "cosine" else 3.0, rtol=1e-5)


def test_no_text_is_embedded_twice() -> None:
    embedder, cache = FakeBatchEmbedder(DIM), Kept()
    first = collect(stored(300), metric="cosine", seed=SEED, embed=embedder.embed_batch, cache=cache)
    again = collect(stored(350), metric="cosine", seed=SEED, embed=embedder.embed_batch, cache=cache)
    more = collect(stored(120), metric="cosine", seed=SEED, embed=embedder.embed_batch, cache=cache)
    assert len(embedder.texts) == len(set(embedder.texts)) == len(cache.texts) == 1380
    assert (first.cached, again.cached, more.cached) == (0, 1150, 1200)
    assert (again.service, more.service) == (0, 180)
    assert len(more.vectors) == 1500


def test_what_was_paid_for_survives_an_interruption() -> None:
    embedder, cache = FakeBatchEmbedder(DIM), Kept()

    def stop(_stage: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(stored(0), metric="l2", seed=SEED, embed=embedder.embed_batch, cache=cache, progress=stop)
    assert len(cache.texts) == len(embedder.texts) > 1000
    found = collect(stored(0), metric="l2", seed=SEED, embed=embedder.embed_batch, cache=cache)
    assert found.cached + found.service == 2000 == len(embedder.texts)


def test_a_cache_of_another_model_is_passed_over() -> None:
    cache = Kept()
    cache.texts, cache.vectors = ["old"], np.ones((1, DIM + 1), np.float32)
    embedder = FakeBatchEmbedder(DIM)
    cache.save = lambda texts, vectors: None  # type: ignore[method-assign]
    found = collect(stored(0), metric="l2", seed=SEED, embed=embedder.embed_batch, cache=cache)
    assert (found.cached, found.service) == (0, 2000)


def test_a_few_failures_are_filled_with_draws_like_the_real_vectors() -> None:
    embedder = Failing(range(2, 100))
    found = collect(stored(500), metric="cosine", seed=SEED, embed=embedder.embed_batch)
    assert (found.existing, found.service, found.fallbacks) == (500, 872, 128)
    assert found.usable
    assert found.error == "call 1 failed"
    drawn = found.vectors[-128:]
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1.0, atol=1e-5)
    assert np.linalg.norm(drawn.mean(axis=0) - stored(500).mean(axis=0)) < 0.25


def test_more_than_half_drawn_is_not_good_enough() -> None:
    embedder = Failing(range(5))
    found = collect(stored(500), metric="cosine", seed=SEED, embed=embedder.embed_batch)
    assert not found.usable
    assert found.reason == ("680 of 1000 training samples could not be embedded, more than half: call 6 failed")
    assert embedder.asked == 5 + 3, "a dead service is left alone"


@pytest.mark.parametrize("existing", [0, 1, 50, 500])
def test_without_a_service_the_store_stays_exact(existing: int) -> None:
    found = collect(stored(existing), metric="cosine", seed=SEED)
    assert not found.usable
    assert "no embedding function" in found.reason
    assert found.fallbacks == (samples_wanted(existing) if existing > 1 else 0)


def test_the_cache_serves_while_the_service_is_away() -> None:
    cache = Kept()
    collect(stored(0), metric="l2", seed=SEED, embed=FakeBatchEmbedder(DIM).embed_batch, cache=cache)
    found = collect(stored(0), metric="l2", seed=SEED, embed=Failing(range(0)).embed_batch, cache=cache)
    assert (found.cached, found.usable, found.error) == (2000, True, "")


@pytest.mark.parametrize(
    "output",
    [np.ones((64, DIM + 1)), np.ones((3, DIM)), np.full((64, DIM), np.nan), np.zeros((64, DIM)), ["no", "numbers"]],
)
def test_nonsense_from_the_service_counts_as_failure(output: object) -> None:
    found = collect(stored(200), metric="cosine", seed=SEED, embed=lambda texts: output)  # type: ignore[arg-type,return-value]
    assert not found.usable
    assert "embed(texts)" in found.reason


def test_a_service_of_another_dimension_is_a_failing_service() -> None:
    def embed(texts: Sequence[str]) -> FloatArray:
        raise DimensionMismatchError(DIM, 7)

    assert "expected 16, got 7" in collect(stored(200), metric="l2", seed=SEED, embed=embed).reason


def test_a_failing_cache_is_no_failing_service() -> None:
    class Broken(Kept):
        def load(self) -> tuple[Sequence[str], FloatArray]:
            raise StorageError("disk")

    with pytest.raises(StorageError):
        collect(stored(0), metric="l2", seed=SEED, cache=Broken())


def test_draws_have_the_mean_and_the_covariance_of_the_vectors() -> None:
    vectors = stored(3000)
    drawn = drawn_like(vectors, 8000, "l2", SEED)
    np.testing.assert_allclose(drawn.mean(axis=0), vectors.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(vectors.T), atol=0.015)
    np.testing.assert_array_equal(drawn, drawn_like(vectors, 8000, "l2", SEED))
