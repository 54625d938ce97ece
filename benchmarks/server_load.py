"""Load a server over HTTP: searches per second by vector and by text, their latency, and a kill -9 under writes.

    .venv/bin/python benchmarks/server_load.py --seconds 10 --out benchmarks/results/server_load.json

Needs the extra ``server``. The server is ``memevolve-store serve`` in a process of its own; the load comes from this
process, on the same machine, over connections that are kept open.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from harness import generated, machine, publish, rounded

from memevolve_gpu import HashingEmbedder, VectorStore

HOST, SEED = "127.0.0.1", 3


def filled(prefix: Path, count: int) -> np.ndarray:
    """Make the store; returns queries."""
    data = generated(count)
    config = {"background": False, "max_memory_units": 2 * count}
    with VectorStore(prefix, HashingEmbedder(384), storage_config=config) as store:
        for at in range(0, count, 5_000):
            store.store_batch(data.units[at : at + 5_000], data.vectors[at : at + 5_000])
        store.run_maintenance()
        store.snapshot()
    return data.queries["in"]


@contextmanager
def serving(prefix: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "memevolve_gpu", "serve", "--store", str(prefix), "--port", str(port), *options]
    limits = {"MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS": "1000000"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, **limits})
    try:
        asyncio.run(answering(port))
        yield process
    finally:
        process.kill()
        process.wait()


async def answering(port: int) -> None:
    for _ in range(600):
        try:
            _, writer = await asyncio.open_connection(HOST, port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise TimeoutError(f"nothing listens on port {port}")


def request(path: str, body: Any) -> bytes:
    text = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


class Caller(asyncio.Protocol):
    """One connection: sends the next request when the answer to the last one is whole."""

    def __init__(self, run: Run) -> None:
        self.run, self.held, self.started = run, b"", 0.0
        self.transport: Any = None
        self.sent: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.sent, text = self.run.next()
        self.started = time.perf_counter()
        self.transport.write(text)

    def data_received(self, data: bytes) -> None:
        self.held += data
        end = self.held.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.held[:end].lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(self.held) < end + 4 + length:
            return
        body, self.held = self.held[end + 4 :], b""
        self.run.answered(time.perf_counter() - self.started, int(head[9:12]), self.sent, body)
        if time.perf_counter() < self.run.until:
            self.send()
        else:
            self.transport.close()


class Run:
    """Requests, and what came of them."""

    def __init__(self, requests: list[tuple[Any, bytes]], seconds: float) -> None:
        self.requests, self.seconds = requests, seconds
        self.until = time.perf_counter() + seconds
        self.latencies: list[float] = []
        self.refused = 0
        self.acknowledged: list[Any] = []
        self._rng = random.Random(SEED)
        self._writes = iter(requests)

    def next(self) -> tuple[Any, bytes]:
        return self.requests[self._rng.randrange(len(self.requests))]

    def answered(self, seconds: float, status: int, sent: Any, body: bytes) -> None:
        del body
        self.latencies.append(seconds)
        self.refused += status >= 400
        self.acknowledged += [sent] if status < 300 else []

    def figures(self) -> dict[str, Any]:
        milliseconds = np.array(self.latencies) * 1e3
        p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99]).tolist()
        rate = len(milliseconds) / self.seconds
        return {"per_second": rate, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "refused": self.refused}


class Writes(Run):
    """Every request once."""

    def next(self) -> tuple[Any, bytes]:
        return next(self._writes)


async def load(run: Run, port: int, connections: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(lambda: Caller(run), HOST, port)
    await asyncio.sleep(max(0.0, run.until + 0.5 - time.perf_counter()))


def searches(port: int, queries: np.ndarray, seconds: float, connections: int) -> dict[str, Any]:
    encoded = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in queries]
    bodies: dict[str, list[dict[str, Any]]] = {
        "by vector, ids": [{"vector": text, "top_k": 10, "units": False} for text in encoded],
        "by vector, units": [{"vector": text, "top_k": 10} for text in encoded],
        "by text, ids": [{"query": f"generated unit {7 * i}", "top_k": 10, "units": False} for i in range(5_000)],
        "by text, units": [{"query": f"generated unit {7 * i}", "top_k": 10} for i in range(5_000)],
    }
    found = {}
    for name, given in bodies.items():
        requests = [(None, request("/v1/search", body)) for body in given]
        asyncio.run(load(Run(requests, 2.0), port, connections))  # a warm-up
        run = Run(requests, seconds)
        asyncio.run(load(run, port, connections))
        found[name] = run.figures()
        print(name, rounded(found[name]))
    return found


def killed(prefix: Path, port: int, seconds: float, connections: int) -> dict[str, Any]:
    """Write one unit per request, kill -9 the server meanwhile, open the store and look for every acknowledged id."""
    units = [{"id": f"k{i}", "content": f"written under load {i}"} for i in range(200_000)]
    requests = [(unit["id"], request("/v1/units", {"units": [unit]})) for unit in units]
    with serving(prefix, port) as process:
        run = Writes(requests, seconds + 2)

        async def both() -> None:
            asyncio.get_running_loop().call_later(seconds, process.send_signal, signal.SIGKILL)
            await load(run, port, connections)

        asyncio.run(both())
    with VectorStore(prefix, HashingEmbedder(384), storage_config={"background": False}) as store:
        held = store.retrieve_batch(run.acknowledged)
        findings = [str(finding) for finding in store.check()]
    lost = [unit_id for unit_id in run.acknowledged if unit_id not in held]
    rate = len(run.acknowledged) / seconds
    return {"acknowledged": len(run.acknowledged), "per_second": rate, "lost": len(lost), "check": findings}


def spans(prefix: Path, rounds: int) -> dict[str, Any]:
    """Time of a search in this process without and with spans, in turns."""
    from opentelemetry.sdk.trace import TracerProvider

    from memevolve_gpu.server.metrics import trace_calls

    with VectorStore(prefix, HashingEmbedder(384), storage_config={"background": False}) as store:
        plain = type(store)
        kinds = {"off": plain}
        for name, tracer in (("on, no provider", None), ("on, SDK", TracerProvider().get_tracer("load"))):
            trace_calls(store, tracer)
            kinds[name], store.__class__ = type(store), plain
        taken: dict[str, list[float]] = {name: [] for name in kinds}
        order = list(kinds)
        for at in range(rounds * len(order)):
            name = order[(at + at // len(order)) % len(order)]
            store.__class__ = kinds[name]
            started = time.perf_counter()
            store.search_units(f"generated unit {at}", 10)
            taken[name].append(time.perf_counter() - started)
        store.__class__ = plain
    medians = {name: float(np.median(times)) * 1e6 for name, times in taken.items()}
    return {name: {"median_us": value, "ratio": value / medians["off"]} for name, value in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--port", type=int, default=8399)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    started = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "memory"
        queries = filled(prefix, given.units)
        with serving(prefix, given.port):
            found = searches(given.port, queries, given.seconds, given.connections)
        print("spans", rounded(traced := spans(prefix, 3_000)))
        print("killed", rounded(lost := killed(prefix, given.port + 1, given.seconds / 2, given.connections)))
    described = {"units": given.units, "connections": given.connections, "seconds": given.seconds, "note": given.note}
    described |= {"load_average_at_start": started, "searches": found, "spans": traced, "kill": lost}
    publish({"machine": machine(), "command": " ".join(sys.argv), **described}, given.out)


if __name__ == "__main__":
    main()
