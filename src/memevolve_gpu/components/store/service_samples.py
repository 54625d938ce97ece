"""Service samples: training data beyond the store's own vectors, kept in the store."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from ...errors import StorageError
from ...monitoring.events import EventLog
from ...records.records import Records
from ...training.training_set import TrainingSet, collect
from ...types import FloatArray
from ...utils.embeddings import Embedder

KEY = "service_samples/{}"
_TEXTS_LENGTH = struct.Struct("<I")


class Samples:
    """The service samples of one store; the cache that ``collect`` takes."""

    def __init__(self, records: Records, embedder: Embedder | None, events: EventLog, seed: int) -> None:
        self._records, self._embedder, self._events, self._seed = records, embedder, events, seed

    @property
    def kept(self) -> int:
        """Number of samples that are embedded and kept."""
        return len(self.load()[0])

    def collect(self, existing: FloatArray) -> TrainingSet:
        """Return the training set for ``existing``, float32 (n, dim), with service samples where those are too few."""
        embed = None if self._embedder is None else self._embedder.embed_many
        found = collect(existing, metric=self._records.metric, seed=self._seed, embed=embed, cache=self)
        if found.source != "existing":
            self._events.record(
                "samples",
                found.reason or f"training on {found.source} samples",
                existing=found.existing,
                service=found.service,
                cached=found.cached,
                fallbacks=found.fallbacks,
            )
        return found

    def load(self) -> tuple[Sequence[str], FloatArray]:
        """Return all kept texts and their vectors, float32 (m, dim)."""
        texts: list[str] = []
        pieces = [np.empty((0, self._records.dim), dtype=np.float32)]
        for batch in self._batches():
            try:
                more, vectors = _opened_batch(batch, self._records.dim)
            except (ValueError, struct.error) as error:
                self._events.record("samples-damaged", f"they are embedded again when they are needed: {error}")
                continue
            texts += more
            pieces.append(vectors)
        return texts, np.concatenate(pieces)

    def save(self, texts: Sequence[str], vectors: FloatArray) -> None:
        """Keep these as well. Samples that cannot be written are embedded again another time."""
        if self._records.read_only:
            return
        written = json.dumps(list(texts)).encode()
        value = _TEXTS_LENGTH.pack(len(written)) + written + np.asarray(vectors, dtype="<f4").tobytes()
        try:
            with self._records.write() as tx:
                tx.set_meta(KEY.format(sum(1 for _ in self._batches())), value)
        except StorageError as error:
            self._events.record("samples-unsaved", str(error))

    def _batches(self) -> Iterator[bytes]:
        number = 0
        while (batch := self._records.get_meta(KEY.format(number))) is not None:
            yield batch
            number += 1


def _opened_batch(batch: bytes, dim: int) -> tuple[list[str], FloatArray]:
    """Return texts and vectors, float32 (m, dim), of a kept batch; ValueError or struct.error when it is damaged."""
    (length,) = _TEXTS_LENGTH.unpack_from(batch)
    start = _TEXTS_LENGTH.size
    texts = json.loads(batch[start : start + length])
    vectors = np.frombuffer(batch[start + length :], dtype="<f4").reshape(-1, dim)
    if not isinstance(texts, list) or len(texts) != len(vectors):
        raise ValueError("texts and vectors differ in number")
    return texts, vectors
