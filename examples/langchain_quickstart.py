"""The store as a LangChain vector store: add documents, search with filters and scores, diversity (MMR), a retriever.

Run it with ``python examples/langchain_quickstart.py``; it needs ``pip install -e ".[cpu,langchain]"``.
Nothing is downloaded: the hashing embedder compares words, not meanings. For real use, pass any
``Embeddings`` of LangChain. The store is created in a temporary folder; pass a path prefix as the first argument to
keep it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from langchain_core.documents import Document

from memevolve_gpu import HashingEmbedder
from memevolve_gpu.integrations.langchain import FunctionEmbeddings, MemEvolveVectorStore

UNITS = Path(__file__).with_name("memory_units.jsonl")


def main(prefix: Path) -> None:
    embedding = FunctionEmbeddings(HashingEmbedder())
    with MemEvolveVectorStore.open(prefix, embedding) as store:
        fill(store)
        search(store)
        asyncio.run(ask(store))
        change(store)
    with MemEvolveVectorStore.open(prefix, embedding) as store:
        print("\nOpened again:")
        show(store.similarity_search("a pod restarts with exit code 137", k=1))


def fill(store: MemEvolveVectorStore) -> None:
    units = [json.loads(line) for line in UNITS.read_text(encoding="utf-8").splitlines()]
    documents = [
        Document(
            id=unit.get("id"),
            page_content=unit["content"],
            metadata={"type": unit["type"], "tags": unit["tags"], **unit["metadata"]},
        )
        for unit in units
    ]
    ids = store.add_documents(documents)  # one transaction: all of them or none
    print(f"Added {len(ids)} documents; the first is {ids[0]!r}.")


def search(store: MemEvolveVectorStore) -> None:
    print("\nThe three nearest to 'database is locked when two processes write', with relevance from 0 to 1:")
    found = store.similarity_search_with_relevance_scores("database is locked when two processes write", k=3)
    for document, score in found:
        print(f"  {score:.3f}  {document.id}")

    print("\nOnly tools and skills tagged git, or anything with a score of at least 0.95:")
    either = {"$or": [{"type": ["tool", "skill"], "tags": "git"}, {"score": {"$gte": 0.95}}]}
    show(store.similarity_search("find out which change broke it", k=3, filter=either))

    print("\nAlike, and unlike each other:")
    show(store.max_marginal_relevance_search("undo the last commit", k=3, fetch_k=30, lambda_mult=0.4))


async def ask(store: MemEvolveVectorStore) -> None:
    retriever = store.as_retriever(search_kwargs={"k": 1, "filter": {"type": "lesson"}})
    answers = await asyncio.gather(*(retriever.ainvoke(text) for text in ("slow query", "flaky test", "disk full")))
    print("\nA retriever, asked three things at once:")
    show([document for documents in answers for document in documents])


def change(store: MemEvolveVectorStore) -> None:
    store.add_texts(["The staging cluster is rebuilt every Saturday."], [{"type": "lesson"}], ids=["staging"])
    store.add_texts(["The staging cluster is rebuilt every Sunday."], [{"type": "lesson"}], ids=["staging"])
    print(f"\nAn id that exists is replaced: {store.get_by_ids(['staging'])[0].page_content}")
    store.delete(["staging"])
    print(f"Deleted. Still there: {bool(store.get_by_ids(['staging']))}.")


def show(documents: list[Document]) -> None:
    for document in documents:
        print(f"  {document.metadata['type']:<11}  {document.id}: {document.page_content[:70]}...")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "memory")
