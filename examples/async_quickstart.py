"""The store under asyncio: writes at once, a search, a feed of changes that another task follows.

Run it with ``python examples/async_quickstart.py``. Nothing is downloaded: the hashing embedder compares words, not
meanings. The store is created in a temporary folder; pass a path prefix as the first argument to keep it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from memevolve_gpu import AsyncVectorStore, F, HashingEmbedder

UNITS = Path(__file__).with_name("memory_units.jsonl")


async def main(prefix: Path) -> None:
    units = [json.loads(line) for line in UNITS.read_text(encoding="utf-8").splitlines()]
    async with AsyncVectorStore.open(prefix, HashingEmbedder()) as store:
        following = asyncio.create_task(follow(store, await store.change_number(), len(units)))
        halves = units[:150], units[150:]
        stored = await asyncio.gather(*(store.store_batch(half) for half in halves))
        print(f"Stored {sum(map(len, stored))} units; the other task saw {await following} changes.")

        print("\nThree searches at once:")
        questions = ("a pod restarts with exit code 137", "undo a rebase", "slow query")
        answers = await asyncio.gather(*(store.search_units(question, top_k=1) for question in questions))
        for question, hits in zip(questions, answers, strict=True):
            print(f"  {question}: {hits[0].id}")

        tools = [unit["id"] async for unit in store.units(F("type") == "tool", limit=3)]
        print(f"\nThe first three tools: {', '.join(tools)}")


async def follow(store: AsyncVectorStore, after: int | None, wanted: int) -> int:
    """Count the changes as they come, until there were as many as are wanted."""
    seen = 0
    async for _change in store.watch(after):
        seen += 1
        if seen == wanted:
            break
    return seen


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(main(Path(sys.argv[1])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(main(Path(folder) / "memory"))
