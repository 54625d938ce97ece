"""What is done to a real Milvus, in tests and in benchmarks alike: each returns the figures that it found."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from milvus_kit import URI, Cluster, Standalone

from memevolve_gpu.errors import StoreUnavailableError
from memevolve_gpu.milvus.store import MilvusStore

__all__ = ["killed_while_writing", "paused", "query_node_killed"]

SLOW = 1.0
"""Seconds from which an answer counts as late."""

DIM = 64


def opened(collection: str, dim: int, **named: Any) -> MilvusStore:
    place = {"uri": URI, "collection": collection, **named.pop("place", {})}
    return MilvusStore(None, dim, {"max_memory_units": 10**6, **named}, place)


@contextmanager
def in_background(act: Callable[[], None]) -> Iterator[threading.Event]:
    """Do something again and again until the block ends."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            act()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(180)


def killed_while_writing(server: Standalone, seconds: float, collection: str = "killed") -> dict[str, Any]:
    """kill -9 while units are stored one by one and in batches, start again, and look for every acknowledged one."""
    rng = np.random.default_rng(1)
    acknowledged: dict[str, Any] = {}
    failed: list[str] = []

    with opened(collection, DIM, place={"timeout": 90.0}) as store:

        def write() -> None:
            size = 1 if len(acknowledged) % 3 else 20
            vectors = rng.standard_normal((size, DIM)).astype("float32")
            units = [{"content": f"unit {len(acknowledged) + i}"} for i in range(size)]
            try:
                ids = store.store_batch(units, vectors)
            except StoreUnavailableError as error:
                failed.append(str(error))
                return
            acknowledged.update(zip(ids, vectors, strict=True))

        with in_background(write):
            time.sleep(seconds)
            server.kill()
            before, killed = len(acknowledged), time.monotonic()
            time.sleep(1.0)
            server.start()
            healthy = time.monotonic() - killed
            while len(acknowledged) <= before and time.monotonic() - killed < 90:
                time.sleep(0.05)
            resumed = time.monotonic() - killed
            time.sleep(seconds)

    with opened(collection, DIM) as again:
        ids = list(acknowledged)
        held: dict[str, Any] = dict(again.vectors_of(ids))
        lost = [
            unit_id
            for unit_id in ids
            if unit_id not in held or not np.array_equal(held[unit_id], acknowledged[unit_id])
        ]
        probe = ids[:: max(1, len(ids) // 50)]
        found = again.search_vectors(np.array([acknowledged[one] for one in probe]), 1)[1]
        return {
            "acknowledged_before_the_kill": before,
            "acknowledged": len(ids),
            "lost": len(lost),
            "counted": again.count(),
            "not_found_by_their_vectors": sum(row != [one] for row, one in zip(found, probe, strict=True)),
            "calls_that_gave_up": len(failed),
            "server_healthy_after_s": round(healthy, 1),
            "writer_went_on_after_s": round(resumed, 1),
        }


def paused(server: Standalone, timeout: float, collection: str = "paused") -> dict[str, Any]:
    """A server that hangs: the error comes after the stated time, and afterwards all is well."""
    vectors = np.random.default_rng(2).standard_normal((20, DIM)).astype("float32")
    with opened(collection, DIM, place={"timeout": timeout}) as store:
        ids = store.store_batch([{"content": str(i)} for i in range(20)], vectors)
        server.pause()
        began = time.monotonic()
        try:
            store.search_vectors(vectors[:1], 1)
            message = ""
        except StoreUnavailableError as error:
            message = str(error)
        waited = time.monotonic() - began
        server.go_on()
        until = time.monotonic() + 60
        right = False
        while not right and time.monotonic() < until:
            try:
                right = store.search_vectors(vectors[:1], 1)[1] == [[ids[0]]]
            except StoreUnavailableError:
                time.sleep(0.2)
        return {"message": message, "waited_s": round(waited, 2), "right_afterwards": right}


@dataclass
class _Asked:
    """Answers as they came: (when it was asked, seconds that it took), and what was wrong."""

    times: list[tuple[float, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    written: int = 0


def query_node_killed(
    cluster: Cluster, vectors: Any, queries: Any, seconds: tuple[float, float], collection: str = "load"
) -> dict[str, Any]:
    """One of two query nodes is killed while searches and writes go on; every answer is compared with the exact one."""
    dim = vectors.shape[1]
    asked = _Asked()
    ids = [f"u{i}" for i in range(len(vectors))]
    place = {"timeout": 60.0, "replicas": 2}
    with opened(collection, dim, index_type="flat", place=place) as store:
        for start in range(0, len(vectors), 2_000):
            store.store_batch([{"id": one} for one in ids[start : start + 2_000]], vectors[start : start + 2_000])
        store.run_maintenance()
        truth = np.sort(_distances(queries, vectors), axis=1)[:, :10]
        writer = _Writer(store, dim, asked)
        began = time.monotonic()
        with in_background(lambda: _search(store, queries, truth, asked, began)), in_background(writer.write):
            time.sleep(seconds[0])
            cluster.nodes["query1"].kill()
            killed = time.monotonic() - began
            time.sleep(seconds[1])
        counted = store.count()
    before = [taken for at, taken in asked.times if at + taken < killed]
    late = [at + taken for at, taken in asked.times if at + taken >= killed and taken >= SLOW]
    return {
        "units": len(vectors),
        "answers_before": len(before),
        "answers_after": len(asked.times) - len(before),
        "wrong_answers": len(asked.wrong),
        "first_wrong": asked.wrong[:1],
        "errors_that_reached_the_caller": len(asked.errors),
        "first_error": asked.errors[:1],
        "written_meanwhile": asked.written,
        "units_missing": len(vectors) + asked.written - counted,
        "median_ms_before": round(float(np.median(before)) * 1e3, 1),
        "slowest_answer_s": round(max(taken for _, taken in asked.times), 2),
        "recovered_after_s": round(max(late, default=killed) - killed, 1),
    }


def _search(store: MilvusStore, queries: Any, truth: Any, asked: _Asked, began: float) -> None:
    at = len(asked.times) % len(queries)
    started = time.monotonic()
    try:
        distances, _ = store.search_vectors(queries[at : at + 1], 10, {"far": {"exists": False}})
    except StoreUnavailableError as error:
        asked.errors.append(str(error))
        return
    asked.times.append((started - began, time.monotonic() - started))
    if not np.allclose(distances[0], truth[at], rtol=1e-3, atol=1e-3):
        asked.wrong.append(f"query {at}: {distances[0].tolist()} for {truth[at].tolist()}")


class _Writer:
    """Writes units far from all queries, and looks for each right after."""

    def __init__(self, store: MilvusStore, dim: int, asked: _Asked) -> None:
        self.store, self.dim, self.asked = store, dim, asked
        self.rng = np.random.default_rng(3)

    def write(self) -> None:
        vector = 1e3 + self.rng.standard_normal((1, self.dim)).astype("float32") * 1e2
        try:
            (unit_id,) = self.store.store_batch([{"far": True}], vector)
            self.asked.written += 1
            found = self.store.search_vectors(vector, 1)[1]
        except StoreUnavailableError as error:
            self.asked.errors.append(str(error))
            return
        if found != [[unit_id]]:
            self.asked.wrong.append(f"{unit_id} was written and not found, but {found}")
        time.sleep(0.2)


def _distances(queries: Any, vectors: Any) -> Any:
    squares = np.square(queries).sum(axis=1)[:, None] + np.square(vectors).sum(axis=1)[None]
    return np.maximum(0, squares - 2 * queries @ vectors.T)
