"""The store in two minutes: store memory units, find them by words, change them, and read the health report.

Run it with ``python examples/quickstart.py``. Nothing is downloaded: the hashing embedder compares words, not meanings.
For real use, pass an embedding model: any function from a text to a vector. The store is created in a temporary
folder; pass a path prefix as the first argument to keep it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from memevolve_gpu import HashingEmbedder, Hit, VectorStore

UNITS = Path(__file__).with_name("memory_units.jsonl")


def main(prefix: Path) -> None:
    units = [json.loads(line) for line in UNITS.read_text(encoding="utf-8").splitlines()]
    with VectorStore(prefix, HashingEmbedder()) as store:
        fill(store, units)
        find(store)
        change(store)
        look_after(store)
    with VectorStore(prefix, HashingEmbedder()) as store:
        print(f"\nOpened again: {len(store)} units, found as before:")
        show(store.search_units("a pod restarts with exit code 137", top_k=1))


def fill(store: VectorStore, units: list[dict[str, Any]]) -> None:
    ids = store.store_batch(units)  # one transaction: all of them or none
    numbered = [unit_id for unit_id in ids if unit_id.startswith("unit_")]
    print(
        f"Stored {len(ids)} units. The first is {ids[0]!r}; {len(numbered)} came without an id, like {numbered[0]!r}."
    )


def find(store: VectorStore) -> None:
    print("\nThe three nearest to 'database is locked when two processes write':")
    show(store.search_units("database is locked when two processes write", top_k=3))

    print("\nOnly tools and skills tagged git or shell, with a score of at least 0.7:")
    filters = {"type": ["tool", "skill"], "tags": ["git", "shell"], "metadata.score": {"gte": 0.7}}
    show(store.search_units("find out which change broke it", top_k=3, filters=filters))

    print("\nThe old interface gives (distance, id), here with exact search:")
    for distance, unit_id in store.search("slow query", top_k=2, recall=1.0):
        print(f"  {distance:.3f}  {unit_id}")


def change(store: VectorStore) -> None:
    unit_id = store.store({"type": "lesson", "content": "The staging cluster is rebuilt every Sunday at 03:00 UTC."})
    unit = store.retrieve(unit_id)
    if unit is not None:
        store.update(unit_id, {**unit, "content": "The staging cluster is rebuilt every Saturday at 03:00 UTC."})
    print("\nAfter an update the new text is found:")
    show(store.search_units("when is staging rebuilt on Saturday", top_k=1))
    print(f"Deleted: {store.delete(unit_id)}. Still there: {unit_id in store}.")


def look_after(store: VectorStore) -> None:
    store.run_maintenance()
    health = store.get_storage_health()
    print(f"\nHealth: {health['current_count']} of {health['max_units']} units, {health['performance_status']}.")
    print("\n".join(f"  - {sentence}" for sentence in health["recommendations"]) or "  Nothing needs to be done.")
    print(f"Index: {store.index.kind}, because {store.statistics()['plan']['reason']}")
    print(f"Problems found by check: {len(store.check())}")


def show(hits: list[Hit]) -> None:
    for hit in hits:
        print(f"  {hit.score:.3f}  {hit.unit['type']:<11}  {hit.id}: {hit.unit['content'][:70]}...")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "memory")
