"""Does the right unit come back? hit@k, recall@k, nDCG@10 and the cost of each engine on public questions.

    PYTHONPATH=benchmarks python -m retrieval --locomo locomo10.zip --units FOLDER --beir scifact.zip --out FILE

``--model``: a folder with an ONNX file, for ``LocalEmbedder(path=...)``; without it all-MiniLM-L6-v2. ``--beir`` may be
given several times. Embeddings are made once beforehand and kept in ``--cache``, so the times are those of the search
alone: ``wall`` as the clock says, which on a busy machine counts the others' work too, and ``cpu``, the processor time
of the calling thread. hit@5 and the times are those of ``top_k=5``; the other figures come from 50 results.
``questions`` of the results holds for each question the rank of the first answer among 50, 0 where there is none; it
holds no text. Nothing here is random.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, publish, rounded

from memevolve_gpu import LocalEmbedder

from .engines import Engine, engines
from .sets import Question, Set, beir, embedded, locomo, units_of

DEPTH = 50


def main() -> None:
    """Measure what is asked for and publish it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--locomo", type=Path)
    parser.add_argument("--units", type=Path)
    parser.add_argument("--beir", type=Path, action="append", default=[])
    parser.add_argument("--model")
    parser.add_argument("--rerank", help="a cross-encoder: a name that fastembed knows, or a path")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    asked = [(locomo, given.locomo), (units_of, given.units), *((beir, path) for path in given.beir)]
    sets = [read(path) for read, path in asked if path is not None]
    if not sets:
        parser.error("give --locomo, --units or --beir")
    found: dict[str, Any] = {
        "machine": machine(),
        "command": f"PYTHONPATH=benchmarks python -m retrieval {' '.join(_shown(sys.argv[1:]))}",
        "model": "all-MiniLM-L6-v2" if given.model is None else Path(given.model).name,
        "versions": {name: _version(name) for name in ("lancedb", "chromadb")},
    }
    embedder = LocalEmbedder(path=given.model)
    for data in sets:
        rows = embedded([unit["content"] for unit in data.units], embedder.embed_batch, given.cache)
        queries = embedded([one.text for one in data.questions], embedder.embed_batch, given.cache)
        found[data.name] = measure(data, rows, queries, given.rerank)
    publish(found, given.out)


def measure(data: Set, rows: Any, queries: Any, rerank: str | None = None) -> dict[str, Any]:
    """The figures of every engine on a set. rerank: a cross-encoder to measure too."""
    found: dict[str, Any] = {"units": len(data.units), "asked": len(data.questions), "engines": {}, "questions": {}}
    with tempfile.TemporaryDirectory() as folder, engines(data, rows, queries, Path(folder), rerank) as tried:
        for name, engine in tried.items():
            started = time.perf_counter()
            figures, ranks = figures_of(data, engine)
            found["engines"][name] = rounded(figures)
            found["questions"][name] = " ".join(map(str, ranks))
            print(f"{data.name}: {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def figures_of(data: Set, engine: Engine) -> tuple[dict[str, Any], list[int]]:
    """The figures of an engine, and the rank of the first answer for each question."""
    session_of = {unit["id"]: (unit.get("metadata") or {}).get("session") for unit in data.units}
    engine(0, 5)
    wall, cpu, columns, ranks = [], [], [], []
    for at, one in enumerate(data.questions):
        clock, worked = time.perf_counter(), time.thread_time()
        first = engine(at, 5)
        cpu.append(time.thread_time() - worked)
        wall.append(time.perf_counter() - clock)
        deep = engine(at, DEPTH)
        ranks.append(next((rank for rank, name in enumerate(deep, 1) if name in one.answers), 0))
        columns.append(_scores(one, first, deep, session_of))
    half = np.array([one.half for one in data.questions])
    names = columns[0].keys()
    table = {name: np.array([row[name] for row in columns]) for name in names}
    means = {
        part: {name: float(np.mean(values[chosen])) for name, values in table.items()}
        for part, chosen in (("all", half >= 0), ("half A", half == 0), ("half B", half == 1))
    }
    times = {
        f"{kind} {name} ms": 1e3 * float(np.percentile(taken, share))
        for kind, taken in (("wall", wall), ("cpu", cpu))
        for name, share in (("p50", 50), ("p95", 95))
    }
    return {**means, **times}, ranks


def _scores(one: Question, first: list[str], deep: list[str], session_of: dict[str, Any]) -> dict[str, float]:
    gains = [1.0 / math.log2(rank + 1) for rank in range(1, 11)]
    gained = sum(gain for gain, name in zip(gains, deep, strict=False) if name in one.answers)
    scores = {
        "hit@1": float(any(name in one.answers for name in deep[:1])),
        "hit@5": float(any(name in one.answers for name in first)),
        "hit@10": float(any(name in one.answers for name in deep[:10])),
        "recall@10": len(one.answers.intersection(deep[:10])) / len(one.answers),
        "nDCG@10": gained / sum(gains[: len(one.answers)]),
    }
    if one.sessions:
        sessions = list(dict.fromkeys(session_of[name] for name in deep))[:10]
        scores["session recall@10"] = len(one.sessions.intersection(sessions)) / len(one.sessions)
    return scores


def _shown(arguments: list[str]) -> list[str]:
    """The arguments without the folders of this machine."""
    return [Path(one).name if "/" in one else one for one in arguments]


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
