"""What an index is trained on: vectors of the store, and service samples where there are too few of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ..errors import EmbeddingError, EngineError, InvalidVectorError
from ..types import FloatArray, Metric
from ..utils.vectors import check_vectors, normalize_rows
from .texts import sample_texts

__all__ = [
    "Embed",
    "Progress",
    "SampleCache",
    "TrainingSet",
    "TrainingSource",
    "collect",
    "drawn_like",
    "existing_sample",
    "samples_wanted",
    "source_for",
]

TrainingSource = Literal["existing", "hybrid", "service"]
Embed = Callable[[Sequence[str]], FloatArray]
"""Embeds n texts: (n, dim). May raise EmbeddingError."""
Progress = Callable[[str, float], None]
"""Called with ``samples`` and the finished fraction, 0 to 1; what it raises ends the collection."""

ENOUGH_EXISTING = 1000
ENOUGH_FOR_HYBRID = 100
HYBRID_TOTAL = 1500
SERVICE_TOTAL = 2000
MOST_EXISTING = 65_536
"""More vectors than any plan trains on."""
BATCH = 64
GIVE_UP_AFTER = 3
"""Batches that fail one after another before the service is left alone."""
_DIRECTION_ROWS = 2048


class SampleCache(Protocol):
    """Keeps embedded service samples, so that no text is paid for twice."""

    def load(self) -> tuple[Sequence[str], FloatArray]:
        """All texts kept and their vectors (n, dim) in the same order; none where the model has changed."""
        ...  # pragma: no cover

    def save(self, texts: Sequence[str], vectors: FloatArray) -> None:
        """Keep these as well; called after every batch."""
        ...  # pragma: no cover


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSet:
    """Vectors float32 (m, dim) to train on, normalised under cosine, and where they come from.

    m = existing + service + cached + fallbacks: rows of the store, samples embedded just now, samples embedded before,
    and vectors drawn in place of samples that could not be embedded. Where ``usable`` is False the store must stay
    exact, and ``reason`` says why in words; ``error`` is the first failure of the embedding function.
    """

    vectors: FloatArray
    source: TrainingSource
    existing: int = 0
    service: int = 0
    cached: int = 0
    fallbacks: int = 0
    usable: bool = True
    reason: str = ""
    error: str = ""


def source_for(count: int) -> TrainingSource:
    """What an index over ``count`` units is trained on: its own vectors from 1,000 on, with service samples from 100
    on, service samples alone below."""
    if count >= ENOUGH_EXISTING:
        return "existing"
    return "hybrid" if count >= ENOUGH_FOR_HYBRID else "service"


def samples_wanted(count: int) -> int:
    """How many service samples go with ``count`` units: none, as many as make 1,500 in all, or 2,000."""
    return {"existing": 0, "hybrid": HYBRID_TOTAL - count, "service": SERVICE_TOTAL}[source_for(count)]


def existing_sample(vectors: FloatArray, limit: int, seed: int) -> FloatArray:
    """At most ``limit`` of the rows (n, dim), seeded, in their order; the same array where all fit."""
    if len(vectors) <= limit:
        return vectors
    return vectors[np.sort(np.random.default_rng(seed).choice(len(vectors), limit, replace=False))]


def drawn_like(vectors: FloatArray, count: int, metric: Metric, seed: int) -> FloatArray:
    """Draws from the Gaussian with the mean and covariance of ``vectors`` (n, dim), n at least 2.

    Mixtures of centred rows have the sample's covariance without its being computed. Normalised under cosine.
    """
    rng = np.random.default_rng(seed)
    base = existing_sample(vectors, _DIRECTION_ROWS, seed)
    mean = base.mean(axis=0)
    mixed = rng.standard_normal((count, len(base)), dtype=np.float32) @ (base - mean)
    drawn = np.asarray(mean + mixed / np.sqrt(len(base) - 1), dtype=np.float32)
    return np.ascontiguousarray(normalize_rows(drawn) if metric == "cosine" else drawn)


def collect(
    existing: FloatArray,
    *,
    metric: Metric,
    seed: int,
    embed: Embed | None = None,
    cache: SampleCache | None = None,
    proportions: Mapping[str, float] | None = None,
    progress: Progress | None = None,
    limit: int = MOST_EXISTING,
) -> TrainingSet:
    """Gather what to train on; a failing embedding function is answered with fallbacks, never with an error.

    Args:
        existing: the store's vectors, float32 (n, dim), normalised under cosine; n decides what else is needed.
        metric: l2, cosine or ip.
        seed: decides the sample, the texts and the fallbacks.
        embed: embeds a batch of texts; None where there is no embedding function.
        cache: texts embedded before; None pays for all of them.
        proportions: how often the store holds each type of unit.
        progress: told after every batch of texts.
        limit: most existing vectors to take.

    Raises:
        StorageError: the cache cannot be read or written.
    """
    source, dim = source_for(len(existing)), existing.shape[1]
    own = existing_sample(existing, limit, seed) if source != "service" else existing[:0]
    wanted = samples_wanted(len(existing))
    if not wanted:
        return TrainingSet(own, source, existing=len(own))
    samples = _Samples(dim, metric, cache)
    error = samples.fill(sample_texts(wanted, seed=seed, proportions=proportions), embed, progress or _silent)
    real = existing if len(existing) > 1 else samples.vectors
    missing = wanted - len(samples.vectors)
    fallbacks = drawn_like(real, missing, metric, seed) if missing and len(real) > 1 else existing[:0]
    reason = _objection(wanted, missing, error)
    return TrainingSet(
        vectors=np.concatenate([own, samples.vectors, fallbacks]),
        source=source,
        existing=len(own),
        service=samples.fresh,
        cached=samples.cached,
        fallbacks=len(fallbacks),
        usable=not reason,
        reason=reason,
        error=error,
    )


class _Samples:
    """Vectors of texts, from the cache where they are in it."""

    def __init__(self, dim: int, metric: Metric, cache: SampleCache | None) -> None:
        self._dim = dim
        self._metric: Metric = metric
        self._cache = cache
        self._pieces: list[FloatArray] = []
        self.cached = 0
        self.fresh = 0

    @property
    def vectors(self) -> FloatArray:
        """float32 (m, dim), normalised under cosine."""
        found = np.concatenate([np.empty((0, self._dim), np.float32), *self._pieces])
        return normalize_rows(found) if self._metric == "cosine" else found

    def fill(self, texts: Sequence[str], embed: Embed | None, progress: Progress) -> str:
        """Get the vectors of ``texts``; returns the first error, empty where there was none."""
        missing = self._from_cache(texts)
        first_error = "" if embed or not missing else "there is no embedding function"
        failures = 0
        for start in range(0, len(missing) if embed else 0, BATCH):
            error = self._embed(missing[start : start + BATCH], embed)
            first_error = first_error or error
            failures = failures + 1 if error else 0
            progress("samples", min(1.0, (start + BATCH) / len(missing)))
            if failures == GIVE_UP_AFTER:
                break
        return first_error

    def _from_cache(self, texts: Sequence[str]) -> list[str]:
        """Take what is kept; returns the texts that are not."""
        kept, vectors = self._cache.load() if self._cache else ((), np.empty((0, self._dim), np.float32))
        if len(kept) != len(vectors) or vectors.shape[1:] != (self._dim,):
            return list(texts)
        rows = dict(zip(kept, range(len(kept)), strict=True))
        found = [rows[text] for text in texts if text in rows]
        self.cached = len(found)
        self._pieces.append(vectors[found])
        return [text for text in texts if text not in rows]

    def _embed(self, batch: list[str], embed: Embed | None) -> str:
        if embed is None:
            return ""
        try:
            vectors = check_vectors(embed(batch), self._dim, self._metric, name="embed(texts)")
            if len(vectors) != len(batch):
                return f"embed(texts) returned {len(vectors)} vectors for {len(batch)} texts"
        except (EmbeddingError, InvalidVectorError, EngineError) as error:
            return str(error)
        self._pieces.append(vectors)
        self.fresh += len(batch)
        if self._cache is not None:
            self._cache.save(batch, vectors)
        return ""


def _objection(wanted: int, missing: int, error: str) -> str:
    """Why these samples must not be trained on; empty where they may."""
    if 2 * missing <= wanted:
        return ""
    return f"{missing} of {wanted} training samples could not be embedded, more than half: {error}; staying exact"


def _silent(_stage: str, _share: float) -> None:
    return
